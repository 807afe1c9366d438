"""Chunks that come in shares over several simulated links: the file's bytes, by every link, whatever fails."""

import random
import threading
import time
from collections import Counter

import chunk_files
import pytest
import torch
from chunk_passes import run_passes
from links_of import with_links
from tiny_models import write_tiny

from zinfer import LLM, SamplingParams
from zinfer.errors import BudgetError, MachineError
from zinfer.memory import sim_shares
from zinfer.memory.assemble import open_manager
from zinfer.memory.shares import Gathering
from zinfer.memory.sim import POISON
from zinfer.parallel.aggregate import by_several_links
from zinfer.plan.records import Budget, Tier
from zinfer.plan.shares import Share, cut

PAGES = [8, 24, 4, 16, 12, 24, 20, 1]


def machine_of(*weights, **rates):
    """Links too fast to wait for, in these proportions."""
    return with_links(chunk_files.FAST, [weight * 1e12 for weight in weights], **rates)


def open_shared(table, machine, *, resident=(0,), host=(2, 5), slots=3, staging=1, spare=0, **options):
    placement = chunk_files.sim_placement(table, resident, host, slots, staging)
    budget = Budget(*(chunk_files.needed_bytes(table, placement, tier) for tier in (Tier.HOST, Tier.DEVICE)))
    make = by_several_links(table, placement, budget, machine, "sim", **options)
    assert make is not None
    return open_manager(table, placement, budget, device="sim", machine=machine, make_transfer=make)


def shares_moved(manager, table, weights):
    """Per lane what the fetches so far should have moved: every chunk's shares by proportion."""
    moves = manager.log.drain()
    for move in moves:
        if move.link != "disk":
            at = int(move.link.partition(":")[2] or 0)
            assert move.nbytes == cut(table.chunks[move.chunk].nbytes, weights)[at].nbytes
    return {link: sum(move.nbytes for move in moves if move.link == link) for link in {m.link for m in moves}}


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 2, 1, 4)])
def test_every_pass_shows_the_files_bytes_and_every_link_brought_its_share(tmp_path, weights):
    table, contents = chunk_files.write_chunks(tmp_path, PAGES, shift=8)
    manager = open_shared(table, machine_of(*weights))
    run_passes(manager, contents, passes=3)
    for number in list(manager._arriving):
        manager.lease(number).release()
    fetches = [
        1,
        *[4 if number <= 3 else 3 for number in range(1, len(PAGES))],
    ]  # the look-ahead wraps around
    moved = shares_moved(manager, table, [weight * 1e12 for weight in weights])
    manager.close()
    for at in range(1, len(weights)):
        assert moved[f"h2d:{at}"] == moved[f"peer:{at}"] > 0
    up = [moved["h2d"], *(moved[f"h2d:{at}"] for at in range(1, len(weights)))]
    assert [part / sum(up) for part in up] == pytest.approx(
        [weight / sum(weights) for weight in weights], abs=0.06
    )
    whole = sum(chunk.nbytes * number for chunk, number in zip(table.chunks, fetches, strict=True))
    assert sum(up) == whole


@pytest.mark.parametrize("seed", range(3))
def test_random_delays_on_every_link_change_nothing(tmp_path, monkeypatch, seed):
    table, contents = chunk_files.write_chunks(tmp_path, PAGES, seed=seed)
    chance, hop = random.Random(seed), sim_shares.SimShares._hop

    def slow_hop(*args):
        time.sleep(chance.random() * 0.002)
        return hop(*args)

    monkeypatch.setattr(sim_shares.SimShares, "_hop", slow_hop)
    manager = open_shared(table, machine_of(1, 1, 1))
    run_passes(manager, contents)
    assert manager.surprises == 0
    manager.close()


def test_two_swapped_shares_are_seen(tmp_path, monkeypatch):
    """The mutation: each way puts its bytes where the other one's belong."""
    table, contents = chunk_files.write_chunks(tmp_path, [8, 8, 8])

    def swapped(chunk, ways):
        first, second = cut(chunk.nbytes, [way.bytes_per_s for way in ways])
        return [Share(second.begin, second.end), Share(first.begin, first.end)]

    def crossed(self, lane, trip, share, from_N, into_N, due_s, is_copied):
        other = Share((share.begin + 4 * 4096) % (8 * 4096), 0)
        if lane != "h2d:1":  # what is written into the place goes to the other one's half
            into_N = trip.order.target_N[other.begin : other.begin + share.nbytes]
        return hop(self, lane, trip, share, from_N, into_N, due_s, is_copied)

    hop = sim_shares.SimShares._hop
    monkeypatch.setattr(sim_shares.SimShares, "_hop", crossed)
    manager = open_shared(table, machine_of(1, 1), resident=(), host=(0, 1, 2), staging=0)
    with pytest.raises(AssertionError, match="chunk 0"):
        run_passes(manager, contents)
    manager.close()
    # Swapping which way brings which half, and putting both where they belong, is right.
    monkeypatch.setattr(sim_shares.SimShares, "_hop", hop)
    monkeypatch.setattr(sim_shares, "shares_of", swapped)
    manager = open_shared(table, machine_of(1, 1), resident=(), host=(0, 1, 2), staging=0)
    run_passes(manager, contents)
    manager.close()


def test_landing_with_the_first_share_is_seen(tmp_path, monkeypatch):
    """The mutation: a chunk counts as there when one share is."""
    table, contents = chunk_files.write_chunks(tmp_path, PAGES)
    monkeypatch.setattr(
        Gathering, "ended", lambda self, at, mark=None, error=None: at or self._landed(self.trip, [], error)
    )
    hop = sim_shares.SimShares._hop

    def slow_hop(self, lane, *args):
        time.sleep(0.01 * (lane != "h2d"))
        return hop(self, lane, *args)

    monkeypatch.setattr(sim_shares.SimShares, "_hop", slow_hop)
    manager = open_shared(table, machine_of(1, 1))
    with pytest.raises(AssertionError, match="chunk"):
        run_passes(manager, contents)
    manager.close()


@pytest.mark.parametrize("lane", ["h2d", "h2d:1", "peer:1"])
def test_a_link_that_fails_is_one_error_that_names_it(tmp_path, monkeypatch, lane):
    table, contents = chunk_files.write_chunks(tmp_path, PAGES)
    real, broken = sim_shares.sleep_until, threading.Event()
    broken.set()
    names = {"h2d": "zinfer-h2d_", "h2d:1": "zinfer-h2d:1", "peer:1": "zinfer-peer:1"}

    def failing(due_s):
        if broken.is_set() and threading.current_thread().name.startswith(names[lane]):
            raise RuntimeError("the link went away")
        real(due_s)

    monkeypatch.setattr(sim_shares, "sleep_until", failing)
    manager = open_shared(table, machine_of(1, 1))
    with pytest.raises(MachineError, match=rf"ZI-5382.*over {lane}: the link went away") as told:
        manager.lease(1)
    assert told.value.remedy.startswith("--set runtime.devices=1")
    manager.check()
    broken.clear()
    run_passes(manager, contents)  # no slot, on either device, was lost with it
    manager.close()


def test_a_cancelled_fetch_ends_on_every_link_and_loses_no_slot(tmp_path):
    table, contents = chunk_files.write_chunks(tmp_path, PAGES)
    slow = with_links(chunk_files.FAST, [4e6, 4e6])
    manager = open_shared(table, slow)
    for number in (1, 2, 3):
        manager.prefetch(number)
    for number in (3, 2, 1):
        manager.evict(number)
        manager.check()
    with manager.lease(1) as lease:
        assert chunk_files.bytes_of(lease, table.chunks[1]) == contents[1]
    manager.close()


def test_the_further_devices_books_hold_its_shares_places_and_nothing_else(tmp_path):
    table, contents = chunk_files.write_chunks(tmp_path, PAGES)
    manager = open_shared(table, machine_of(1, 1))
    run_passes(manager, contents, passes=1)
    ledger = manager.transfer.ledgers["device:1"]
    helper = manager.transfer._helpers[1]
    assert ledger.reserved == {"staging": len(helper.slab.bytes_N)}
    assert ledger.peak_bytes == manager.stats().peak_bytes["device:1"] == len(helper.slab.bytes_N)
    assert ledger.peak_bytes < manager.stats().peak_bytes["device"]
    manager.check()
    ledger.free_bytes += 1
    with pytest.raises(Exception, match="ZI-0113"):
        manager.check()
    manager.close()
    assert len(helper.slab.bytes_N) == 0, "its memory went back"


def test_a_sent_share_leaves_poison_behind(tmp_path):
    table, contents = chunk_files.write_chunks(tmp_path, [8, 8])
    manager = open_shared(table, machine_of(1, 1), resident=(), host=(0, 1), staging=0)
    with manager.lease(0) as lease:
        assert chunk_files.bytes_of(lease, table.chunks[0]) == contents[0]
    slots = manager.transfer._helpers[1].slots
    manager.transfer._lanes["peer:1"].worker.shutdown()  # the poison comes before the slot's return
    assert all(int(byte) in (0, POISON) for slot in slots for byte in slot.unique())
    assert any(POISON in slot for slot in slots)
    manager._is_closed = True
    manager.transfer.close()


def test_a_budget_without_room_for_shares_is_refused(tmp_path):
    table, _ = chunk_files.write_chunks(tmp_path, PAGES)
    placement = chunk_files.sim_placement(table, (), (), 3, 1)
    make = by_several_links(table, placement, Budget(2**20, 4096), machine_of(1, 1), "sim")
    with pytest.raises(BudgetError, match="ZI-2401"):
        make(None, [], None)


def test_one_link_needs_nothing_of_this(tmp_path):
    table, _ = chunk_files.write_chunks(tmp_path, PAGES)
    placement = chunk_files.sim_placement(table, (), (), 3, 1)
    assert by_several_links(table, placement, Budget(1, 1), chunk_files.FAST, "sim") is None
    assert (
        by_several_links(table, chunk_files.cpu_placement(table, (), 2), Budget(1), machine_of(1, 1), "cpu")
        is None
    )


def test_shares_are_due_when_their_own_links_say(tmp_path, monkeypatch):
    """On a clock that stands still: each link queues its own shares, the peer link begins where a pull ends."""
    table, _ = chunk_files.write_chunks(tmp_path, [8, 8, 8])
    due = {}

    def note(due_s):
        lane = threading.current_thread().name.removeprefix("zinfer-").partition("_")[0]
        due.setdefault(lane, []).append(due_s)

    monkeypatch.setattr("zinfer.memory.links.time.perf_counter", lambda: 7.0)
    monkeypatch.setattr(sim_shares, "sleep_until", note)
    half = 4 * 4096
    machine = with_links(chunk_files.FAST, [half, half], peer=4 * half)
    manager = open_shared(table, machine, resident=(), host=(0, 1, 2), staging=0)
    for number in range(3):
        manager.prefetch(number)
    for number in range(3):
        manager.lease(number).release()
    manager.close()
    assert due == {"h2d": [8, 9, 10], "h2d:1": [8, 9, 10], "peer:1": [8.25, 9.25, 10.25]}


PROMPTS = [[5, 9, 200, 31, 7, 44], [17], [3, 3, 8, 120, 77, 45, 90, 14, 2, 60, 333]]
PARAMS = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
FIXED = {"machine": "sim-default", "max_rows": 24, "max_batch": 3, "threads": 1}


def run(folder, **options):
    with LLM(folder, **FIXED, **options) as llm:
        tokens = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)]
        manager = llm._session._engine.manager
        manager.check()
        while any(map(manager._await_one, manager._memory.tiers)):
            pass  # what the last pass asked for ahead lands, and counts, on every lane
        moved, peaks = Counter(manager.log.num_bytes), llm.stats.peak_bytes
        return tokens, llm.logits(PROMPTS[2]), moved, peaks


def test_a_run_with_two_devices_gives_one_devices_bits(tmp_path):
    folder = write_tiny("llama", tmp_path / "model", vocab_size=2051, intermediate_size=1024)
    memory = {"device": "1536KiB", "host": "64MiB"}
    one = run(folder, device="sim", memory=memory)
    two = run(folder, device="sim", memory=memory, devices=2)
    resident = run(folder, device="cpu", memory={"host": "1GiB"})
    assert one[0] == two[0] == resident[0]
    assert torch.equal(one[1], two[1]) and torch.equal(two[1], resident[1])
    assert two[2]["h2d:1"] == two[2]["peer:1"] > 0
    assert two[2]["h2d"] == pytest.approx(two[2]["h2d:1"], rel=0.05), "equal links carry equal shares"
    assert "device:1" in two[3] and "device:1" not in one[3]
