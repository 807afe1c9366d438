"""G5 under random delays: nothing is read before it is there, nothing overwritten before its last reader is done.

Every lease's bytes are compared with the file's while other slots are being overwritten.  Each mutation of the
machinery below must be caught by that comparison, by the residency table, or by a checksum.
"""

import os
import random
import time

import chunk_files
import pytest
import torch
from chunk_passes import run_passes

from zinfer.errors import IntegrityError, InternalError
from zinfer.memory import nvme, sim
from zinfer.memory.assemble import open_manager
from zinfer.memory.links import Ticket
from zinfer.memory.residency import ALLOWED, Event, State
from zinfer.memory.sim import POISON
from zinfer.memory.tier import TierMemory
from zinfer.memory.transfer import StagedTransfer
from zinfer.plan.records import Budget, Tier

PAGES = [2, 3, 1, 3, 2, 3, 3, 1]


def delays(monkeypatch, seed, longest_s=0.002):
    """Reads and copies take a random time more."""
    chance, read, move = random.Random(seed), os.preadv, sim.SimTransfer._move

    def slow_read(*args):
        time.sleep(chance.random() * longest_s)
        return read(*args)

    def slow_move(*args):
        time.sleep(chance.random() * longest_s)
        move(*args)

    monkeypatch.setattr(nvme.os, "preadv", slow_read)
    monkeypatch.setattr(sim.SimTransfer, "_move", slow_move)


def open_either(device, table):
    """Three slots; on the device two chunks come from host memory and all others through one staging slot."""
    if device == "cpu":
        placement = chunk_files.cpu_placement(table, (0,), 3)
    else:
        placement = chunk_files.sim_placement(table, (0,), (2, 5), 3, 1)
    budget = Budget(*(chunk_files.needed_bytes(table, placement, tier) for tier in (Tier.HOST, Tier.DEVICE)))
    return open_manager(table, placement, budget, device=device, machine=chunk_files.FAST)


@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize("seed", range(3))
def test_random_delays_change_nothing(tmp_path, monkeypatch, device, seed):
    table, contents = chunk_files.write_chunks(tmp_path, PAGES, shift=8, seed=seed)
    delays(monkeypatch, seed)
    manager = open_either(device, table)
    run_passes(manager, contents)
    assert manager.surprises == 0
    manager.close()


def skip_the_wait(monkeypatch):
    """A lease that takes every ticket for landed."""
    monkeypatch.setattr(Ticket, "done", True)
    monkeypatch.setattr(Ticket, "wait", lambda self: None)


def land_before_the_copy(monkeypatch):
    """A device transfer that says done when the bytes have reached host memory."""
    copy = sim.SimTransfer._copy

    def early(self, trip):
        trip.ticket.land()
        copy(self, trip)

    monkeypatch.setattr(sim.SimTransfer, "_copy", early)


def free_staging_too_early(monkeypatch):
    """A staging slot that is filled again before it has been copied from."""
    read = StagedTransfer._read

    def leaky(self, trip):
        read(self, trip)
        if trip.is_staged:
            self._free.append(trip.source_N)

    monkeypatch.setattr(StagedTransfer, "_read", leaky)


def forget_the_moves(monkeypatch):
    """A reader that leaves bytes where the file's offset puts them."""
    monkeypatch.setattr(nvme, "memmove", lambda *_: None)


def share_a_slot(monkeypatch):
    """Places that hand the same slot out twice."""
    take = TierMemory.take

    def greedy(self, chunk, **kind):
        place = take(self, chunk, **kind)
        if not self.has_home(chunk) and place.offset not in self._free:
            self._free.append(place.offset)
        return place

    monkeypatch.setattr(TierMemory, "take", greedy)
    monkeypatch.setattr(TierMemory, "check", lambda self: None)


MUTATIONS = [
    ("cpu", skip_the_wait),
    ("sim", skip_the_wait),
    ("sim", land_before_the_copy),
    ("sim", free_staging_too_early),
    ("cpu", forget_the_moves),
    ("cpu", share_a_slot),
    ("sim", share_a_slot),
]


@pytest.mark.parametrize(("device", "mutation"), MUTATIONS)
def test_a_mutation_is_caught(tmp_path, monkeypatch, device, mutation):
    table, contents = chunk_files.write_chunks(tmp_path, PAGES, shift=8)
    delays(monkeypatch, 1, longest_s=0.01)
    manager = open_either(device, table)
    mutation(monkeypatch)
    with pytest.raises((AssertionError, InternalError, IntegrityError)):
        run_passes(manager, contents)
    time.sleep(0.1)  # what the mutation left on its way
    monkeypatch.undo()
    manager._memory.transfer.close()
    manager._memory.reader.close()
    manager._memory.files.close()


def test_evicting_under_a_lease_would_be_caught(tmp_path, monkeypatch):
    """The table alone forbids it; with that row added the bytes under the lease change."""
    table, contents = chunk_files.write_chunks(tmp_path, PAGES)
    manager = open_either("sim", table)
    with manager.lease(1) as lease, pytest.raises(InternalError, match="ZI-0121"):
        manager.evict(1)
    monkeypatch.setitem(ALLOWED, (State.LEASED, Event.EVICT), State.ABSENT)
    lease = manager.lease(1)
    manager._residency._leases.clear()
    manager.evict(1)
    manager._memory.transfer._worker.submit(int).result()
    assert lease.is_stale
    assert chunk_files.bytes_of(lease.views, table.chunks[1]) != contents[1]
    manager.close()


def test_a_released_place_is_poisoned(tmp_path):
    table, contents = chunk_files.write_chunks(tmp_path, PAGES)
    manager = open_either("sim", table)
    with manager.lease(1) as lease:
        weight = lease[table.chunks[1].tensors[0].key]
        assert not weight.view(torch.uint8).eq(POISON).all()
    manager.evict(1)
    manager._memory.transfer._worker.submit(int).result()  # behind the poison
    assert weight.view(torch.uint8).eq(POISON).all()
    assert weight.isnan().all()
    with manager.lease(1) as again:
        assert chunk_files.bytes_of(again, table.chunks[1]) == contents[1]
    manager.close()
