"""Page-locking: in the background, in pieces that end where places do, as much as the system allows, said once."""

import logging
import threading

import chunk_files
import pytest
import torch
from cuda_double import Library
from hypothesis import given
from hypothesis import strategies as st

from zinfer.config.limits import lock_limit
from zinfer.memory.ledger import Ledger
from zinfer.memory.pinning import Locked, Pinning, pieces
from zinfer.memory.slab import HostSlab
from zinfer.memory.tier import TierMemory
from zinfer.plan.records import Tier
from zinfer.units import GIB, MIB

CUTS = [at * 8 * MIB for at in range(17)]  # 16 places of 8 MiB


def locked(library, cuts=CUTS, **options):
    pinning = Pinning(0, cuts, library, **options)
    return pinning, pinning.settle()


def test_everything_is_locked_for_every_device():
    library = Library()
    pinning, found = locked(library)
    assert found == Locked(128 * MIB, 128 * MIB, True)
    assert library.calls == [(0, 128 * MIB, 1)]
    pinning.undo()
    assert library.locked == {}


def test_what_sticks_to_a_thread_sticks_to_one_of_ours():
    """The runtime shows a refusal to the next launch of the same thread: it must not be one that computes."""
    library, entered = Library(most=0), []
    pinning, _ = locked(library, enter=lambda: entered.append(threading.current_thread().name))
    pinning.undo()
    assert library.threads == {"zinfer-pin"}
    assert entered == ["zinfer-pin", "zinfer-unpin"]


def test_a_refusal_at_half_keeps_the_half_and_is_said_once(caplog):
    library = Library(most=64 * MIB)
    with caplog.at_level(logging.WARNING, "zinfer"):
        pinning, found = locked(library)
    assert found == Locked(64 * MIB, 128 * MIB, True)
    assert len(caplog.records) == 1
    assert "64.00 MiB of 128.00 MiB" in caplog.text
    assert "50 %" in caplog.text
    assert "half their speed" in caplog.text
    assert "CUDA error 2, out of memory" in caplog.text
    pinning.undo()
    assert library.locked == {}


@given(most=st.integers(0, 130 * MIB), sizes=st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_what_is_locked_is_a_beginning_and_no_place_straddles(most, sizes):
    cuts = [0]
    for size in sizes:
        cuts.append(cuts[-1] + size * MIB)
    library = Library(most)
    pinning, found = locked(library, cuts, is_quiet=True)
    ranges = sorted(library.locked.items())
    assert sum(library.locked.values()) == found.nbytes <= min(most, cuts[-1])
    end = 0
    for begin, nbytes in ranges:
        assert begin == end, "a gap: a later place was locked before an earlier one"
        end = begin + nbytes
        assert begin in cuts
        assert end in cuts
    assert cuts[-1] > most or found.nbytes == cuts[-1]
    pinning.undo()
    assert library.locked == {}


def test_a_limit_of_this_process_is_named(caplog, monkeypatch):
    monkeypatch.setattr("zinfer.memory.pinning.lock_limit", lambda: 8 * MIB)
    with caplog.at_level(logging.WARNING, "zinfer"):
        locked(Library(most=0))
    assert "this process may lock 8.00 MiB" in caplog.text
    assert lock_limit() is None or lock_limit() >= 0


def test_a_runtime_that_raises_is_announced_too(caplog):
    class Broken(Library):
        def cudaHostRegister(self, address, nbytes, flags):
            raise RuntimeError("no such symbol")

    with caplog.at_level(logging.WARNING, "zinfer"):
        _, found = locked(Broken())
    assert found.nbytes == 0
    assert "no such symbol" in caplog.text


def test_closing_does_not_wait_for_the_rest():
    class Slow(Library):
        def cudaHostRegister(self, address, nbytes, flags):
            asked.set()
            go_on.wait(20)
            return super().cudaHostRegister(address, nbytes, flags)

    asked, go_on = threading.Event(), threading.Event()
    library = Slow()
    pinning = Pinning(0, [0, GIB, 2 * GIB, 3 * GIB], library)
    assert asked.wait(20)
    stop = pinning._stop.set
    pinning._stop.set = lambda: (stop(), go_on.set())
    pinning.undo()
    assert len(library.calls) == 1
    assert library.locked == {}


def test_what_is_settled_has_been_counted_to_the_end():
    """The thread locks its last piece and ends while somebody counts."""
    go_on = threading.Event()

    class Slow(Library):
        def cudaHostRegister(self, address, nbytes, flags):
            assert go_on.wait(20)
            return super().cudaHostRegister(address, nbytes, flags)

    class Ending(list):
        def __iter__(self):
            counted = list.__iter__(list(self[:]))
            go_on.set()
            pinning._thread.join()
            return counted

    pinning = Pinning(0, CUTS, Slow())
    pinning._registered = Ending()
    assert pinning.locked == Locked(0, 128 * MIB, False), "not settled, or all of it"
    assert pinning.locked == Locked(128 * MIB, 128 * MIB, True)
    pinning.undo()


def test_staging_is_locked_before_homes(tmp_path):
    """Where only a part can be locked, it is the slots through which the disk's chunks pass in every pass."""
    table, _ = chunk_files.write_chunks(tmp_path, [2000] * 4, digests=False)
    placement = chunk_files.sim_placement(table, (), (0, 1), 1, 2)
    homes = {chunk: table.chunks[chunk].nbytes for chunk in (0, 1)}
    slab = HostSlab(4 * table.slot_bytes)
    memory = TierMemory(Ledger(Tier.HOST, 4 * table.slot_bytes), slab, homes, 2, placement.slot_bytes)
    library = Library(most=2 * table.slot_bytes)
    found = memory.pin(library).settle()
    assert found.nbytes == 2 * table.slot_bytes
    staging = memory.lend_slots("staging")
    (begin,) = library.locked
    inside = [begin <= x.data_ptr() < begin + library.locked[begin] for x in staging]
    assert inside == [True, True]
    homes_at = [slab.bytes_N.data_ptr() + memory._homes[chunk][0] for chunk in homes]
    assert not any(begin <= at < begin + library.locked[begin] for at in homes_at)
    memory.close()
    assert library.locked == {}


def test_pieces_of_nothing():
    assert list(pieces([])) == []
    pinning, found = locked(Library(), [])
    assert found == Locked(0, 0, True)
    pinning.undo()


def test_both_together():
    assert Locked(1, 2, True).plus(Locked(3, 4, False)) == Locked(4, 6, False)


def test_a_slab_that_was_never_locked_says_so():
    slab = HostSlab(4096)
    assert slab.locked == Locked(0, 0, True)
    slab.close()


@pytest.mark.parametrize("rounds", [50])
def test_rounds_leave_nothing_locked(rounds):
    library = Library(most=12 * MIB)
    for _ in range(rounds):
        slab = HostSlab(16 * MIB)
        slab.pin([0, 4 * MIB, 8 * MIB, 16 * MIB], library, is_quiet=True)
        torch.zeros(1)
        slab.close()
        assert library.locked == {}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("zinfer-")]


@pytest.mark.parametrize("is_closed", [True, False])
def test_a_slab_that_nobody_closes_is_unlocked_before_its_addresses_are_used_again(is_closed):
    library = Library()
    slab = HostSlab(4 * MIB)
    slab.pin([0, 4 * MIB], library).settle()
    assert library.locked
    if is_closed:
        slab.close()
        assert library.locked == {}
    del slab
    assert library.locked == {}
