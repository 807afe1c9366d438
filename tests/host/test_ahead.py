"""Pages that are found ahead of the reads: never one that somebody has claimed."""

import gc
import threading
import time
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import write_tiny

import zinfer.memory.ahead as ahead_module
from zinfer import LLM, SamplingParams
from zinfer.chunks.table import HUGE_PAGE
from zinfer.memory.ahead import Ahead
from zinfer.memory.slab import HostSlab

PAGES = 8


class Stores:
    """In place of memset: each store waits until the test lets it happen."""

    def __init__(self, monkeypatch):
        self.begun, self.allowed = threading.Semaphore(0), threading.Semaphore(0)
        self.pages = []
        monkeypatch.setattr(ahead_module, "memset", self)

    def __call__(self, address, _value, _count):
        self.pages.append(address // HUGE_PAGE)
        self.begun.release()
        self.allowed.acquire()

    def let_all(self):
        self.allowed.release(10 * PAGES)


class Nowhere:
    """In place of a tensor at address 0."""

    @staticmethod
    def data_ptr():
        return 0


def ended(ahead):
    ahead._thread.join()


def test_every_page_is_found_in_order_where_nobody_claims(monkeypatch):
    stores = Stores(monkeypatch)
    stores.let_all()
    ahead = Ahead(Nowhere, PAGES * HUGE_PAGE - 1)
    ended(ahead)
    assert stores.pages == list(range(PAGES))
    ahead.close()


def test_what_is_claimed_is_left_alone(monkeypatch):
    stores = Stores(monkeypatch)
    ahead = Ahead(Nowhere, PAGES * HUGE_PAGE)
    stores.begun.acquire()  # page 0 is being found
    ahead.claim(3 * HUGE_PAGE + 5, HUGE_PAGE)  # parts of two pages
    ahead.claim(6 * HUGE_PAGE, 1)
    ahead.claim(5 * HUGE_PAGE, 0)
    ahead.claim((PAGES + 3) * HUGE_PAGE, HUGE_PAGE)  # beyond what is found ahead
    stores.let_all()
    ended(ahead)
    assert stores.pages == [0, 1, 2, 5, 7]


def test_what_nobody_will_use_is_not_found(monkeypatch):
    stores = Stores(monkeypatch)
    stores.let_all()
    ahead = Ahead(Nowhere, PAGES * HUGE_PAGE, [(HUGE_PAGE, 2 * HUGE_PAGE), (7 * HUGE_PAGE, 5)])
    ended(ahead)
    assert stores.pages == [0, 3, 4, 5, 6]


def test_a_claim_waits_for_the_store_under_way_and_for_no_other(monkeypatch):
    stores = Stores(monkeypatch)
    ahead = Ahead(Nowhere, PAGES * HUGE_PAGE)
    stores.begun.acquire()
    ahead.claim(HUGE_PAGE, HUGE_PAGE)  # returns: the store is elsewhere
    order = []

    def claim():
        ahead.claim(0, HUGE_PAGE)
        order.append("claimed")

    claimer = threading.Thread(target=claim)
    claimer.start()
    while not ahead._is_claimed[0]:
        time.sleep(0.001)
    order.append("stored")
    assert order == ["stored"]  # the claimer waits
    stores.let_all()
    claimer.join()
    ended(ahead)
    assert order == ["stored", "claimed"]
    assert stores.pages == [0]  # readers have caught up: the next ones are theirs


def test_close_ends_it_early(monkeypatch):
    stores = Stores(monkeypatch)
    ahead = Ahead(Nowhere, PAGES * HUGE_PAGE)
    stores.begun.acquire()
    closer = threading.Thread(target=ahead.close)
    closer.start()
    while not ahead._is_ended:
        time.sleep(0.001)
    stores.let_all()
    closer.join()
    assert stores.pages == [0]


def spans():
    lengths = st.tuples(st.integers(0, PAGES * HUGE_PAGE - 1), st.integers(1, 3 * HUGE_PAGE))
    return lengths.map(lambda span: (span[0], min(span[1], PAGES * HUGE_PAGE - span[0])))


@given(st.lists(spans(), max_size=12))
def test_bytes_that_were_written_after_a_claim_stay(claims):
    slab = HostSlab(PAGES * HUGE_PAGE)
    try:
        slab.find_ahead(PAGES * HUGE_PAGE)
        for offset, nbytes in claims:
            slab.claim(offset, nbytes)
            slab.bytes_N[offset : offset + nbytes : 4096] = 7
            slab.bytes_N[offset] = slab.bytes_N[offset + nbytes - 1] = 7
        ended(slab._ahead)
        for offset, nbytes in claims:
            assert slab.bytes_N[offset] == slab.bytes_N[offset + nbytes - 1] == 7
            assert bool((slab.bytes_N[offset : offset + nbytes : 4096] == 7).all())
    finally:
        slab.close()


def test_what_was_given_back_is_not_found_again(monkeypatch):
    stores = Stores(monkeypatch)
    slab = HostSlab(PAGES * HUGE_PAGE)
    slab.find_ahead(PAGES * HUGE_PAGE)
    stores.begun.acquire()
    slab.discard(2 * HUGE_PAGE, 5 * HUGE_PAGE)
    stores.let_all()
    ended(slab._ahead)
    first = slab.bytes_N.data_ptr() // HUGE_PAGE
    assert [page - first for page in stores.pages] == [0, 1, 7]
    slab.close()
    slab.close()


def test_a_slab_that_was_dropped_without_closing_stays_mapped_while_pages_are_found(monkeypatch):
    stores = Stores(monkeypatch)
    slab = HostSlab(PAGES * HUGE_PAGE)
    slab.find_ahead(PAGES * HUGE_PAGE)
    mapping, thread = weakref.ref(slab._map), slab._ahead._thread
    stores.begun.acquire()
    del slab
    gc.collect()
    assert mapping() is not None
    stores.let_all()
    thread.join()
    assert len(stores.pages) == PAGES
    del thread
    gc.collect()
    assert mapping() is None


def test_small_slabs_are_not_searched():
    slab = HostSlab(HUGE_PAGE - 1)
    slab.find_ahead(HUGE_PAGE - 1)
    assert slab._ahead is None
    slab.claim(0, 10)
    slab.close()


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_an_engine_claims_what_it_reads_into(device, tmp_path, monkeypatch):
    """Only where reads fill the memory: a simulated device's is filled by copies, and poisoned."""
    folder = write_tiny("llama", tmp_path / "m", hidden_size=256, intermediate_size=2048)
    claimed, found = [], []
    real = HostSlab.claim
    monkeypatch.setattr(HostSlab, "claim", lambda slab, *span: (claimed.append(span), real(slab, *span))[1])
    monkeypatch.setattr(HostSlab, "find_ahead", lambda slab, nbytes, unused: found.append(nbytes))
    memory = {"host": "64MiB"} | ({"device": "64MiB"} if device == "sim" else {})
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    with LLM(folder, device=device, machine="sim-default", memory=memory, threads=1) as llm:
        llm.generate([[3, 4]], params)
        places = llm._session._engine.manager._memory.tiers[llm.plan.placement.compute_tier].places
        spans = [(place.offset, place.nbytes) for place in places.values()]
    assert set(spans) <= set(claimed)
    assert bool(found) is (device == "cpu")


def test_an_engine_answers_the_same_with_pages_found_ahead(tmp_path, monkeypatch):
    folder = write_tiny("llama", tmp_path / "m", hidden_size=256, intermediate_size=2048)
    runs = []
    for is_ahead in (True, False):
        if not is_ahead:
            monkeypatch.setattr(HostSlab, "find_ahead", lambda slab, nbytes, unused: None)
        with LLM(folder, device="cpu", machine="sim-default", memory={"host": "64MiB"}, threads=1) as llm:
            runs.append(llm.logits([3, 4, 5]))
    assert torch.equal(*runs)
