"""G8: close() leaves no thread, descriptor, mapping or byte, whatever was on its way and whatever went wrong."""

import errno
import gc
import mmap
import os
import sys
import threading
import time
import weakref
from pathlib import Path

import chunk_files
import pytest

from zinfer.chunks.table import HUGE_PAGE
from zinfer.errors import MachineError
from zinfer.memory import assemble, nvme
from zinfer.memory.assemble import open_manager
from zinfer.plan.records import Budget, Tier

PAGES = [3, 2, 3, 1, 3]


def open_either(device, table):
    placement = (
        chunk_files.cpu_placement(table, (0,), 2)
        if device == "cpu"
        else chunk_files.sim_placement(table, (0,), (1,), 2, 1)
    )
    budget = Budget(*(chunk_files.needed_bytes(table, placement, tier) for tier in (Tier.HOST, Tier.DEVICE)))
    return open_manager(table, placement, budget, device=device, machine=chunk_files.FAST)


def traces(folder):
    """Threads of ours, descriptors of files in `folder`, resident bytes, switch interval."""
    threads = sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("zinfer"))
    files = [link for fd in os.listdir("/proc/self/fd") if (link := _link(fd)).startswith(str(folder))]
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    return threads, files, resident, sys.getswitchinterval()


def _link(fd):
    try:
        return str(Path(f"/proc/self/fd/{fd}").readlink())
    except FileNotFoundError:  # the descriptor of the listing itself
        return ""


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_fifty_rounds_leave_nothing(tmp_path, device):
    table, _ = chunk_files.write_chunks(tmp_path, [16 * pages for pages in PAGES])
    before = None
    for count in range(51):
        manager = open_either(device, table)
        for number in range(len(PAGES)):
            manager.lease(number).release()
        manager.close()
        manager.close()
        if count == 0:
            gc.collect()
            before = traces(tmp_path)
    gc.collect()
    after = traces(tmp_path)
    assert after[0] == before[0] == []
    assert after[1] == before[1] == []
    # The C library keeps some tens of MiB for threads that have ended; fifty slabs would be more.
    assert after[2] - before[2] < 40 * HUGE_PAGE
    assert after[3] == before[3]


@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize("trouble", ["none", "slow", "broken", "leased"])
def test_close_with_transfers_on_their_way(tmp_path, monkeypatch, device, trouble):
    table, _ = chunk_files.write_chunks(tmp_path, PAGES)
    real = os.preadv

    def preadv(*args):
        if trouble == "broken":
            raise OSError(errno.EIO, "Input/output error")
        time.sleep(0.01 if trouble == "slow" else 0)
        return real(*args)

    monkeypatch.setattr(nvme.os, "preadv", preadv)
    manager = open_either(device, table)
    tickets = [manager.prefetch(number) for number in (0, 1, 3)]
    lease = manager.lease(1) if trouble == "leased" else None
    manager.close()
    assert all(ticket.done for ticket in tickets)
    assert traces(tmp_path)[:2] == ([], [])
    for memory in manager._memory.tiers.values():
        memory.check()
        assert not memory.ledger.held
        assert len(memory.slab.bytes_N) == 0
    if lease is not None:
        lease.release()
    assert manager.stats().num_fetches == 3


def test_a_stale_view_is_readable_and_empty(tmp_path):
    table, _ = chunk_files.write_chunks(tmp_path, PAGES)
    manager = open_either("cpu", table)
    lease = manager.lease(1)
    weight = lease[table.chunks[1].tensors[0].key]
    assert weight.count_nonzero()
    manager.close()
    assert not weight.count_nonzero()


def test_what_fails_to_open_leaves_nothing(tmp_path, monkeypatch):
    table, _ = chunk_files.write_chunks(tmp_path, PAGES)
    before = sys.getswitchinterval()

    def broken(*_, **__):
        raise MachineError("ZI-0000", "no such device")

    monkeypatch.setattr(assemble, "SimTransfer", broken)
    with pytest.raises(MachineError):
        open_either("sim", table)
    assert traces(tmp_path)[:2] == ([], [])
    assert sys.getswitchinterval() == before


def test_memory_grows_only_with_what_is_read(tmp_path):
    """A budget of 512 MiB, of which 8 MiB are used."""
    table, _ = chunk_files.write_chunks(tmp_path, [512] * 4, piece=256 * 4096, digests=False)
    placement = chunk_files.cpu_placement(table, (), 256)
    before = traces(tmp_path)[2]
    manager = open_manager(table, placement, Budget(host=2**29 + 2**21))
    for number in range(4):
        manager.lease(number).release()
        grown = traces(tmp_path)[2] - before
        assert grown < 4 * table.slot_bytes + 2 * HUGE_PAGE, "the places of four chunks, found ahead"
    for _ in range(3):
        for number in range(4):  # the same slots again
            manager.evict(number)
            manager.lease(number).release()
    assert traces(tmp_path)[2] - before < 4 * table.slot_bytes + 2 * HUGE_PAGE
    manager.close()
    assert traces(tmp_path)[2] - before < 2 * HUGE_PAGE


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_memory_goes_back_without_the_collectors_help(tmp_path, device):
    """What a device was given must be free for the next engine at once, whatever was on its way."""
    table, _ = chunk_files.write_chunks(tmp_path, PAGES)
    gc.collect()
    gc.disable()
    try:
        manager = open_either(device, table)
        for number in (0, 1, 3):
            manager.prefetch(number)
        compute = manager._memory.tiers[Tier.HOST if device == "cpu" else Tier.DEVICE]
        mapping = weakref.ref(compute.slab._map)
        manager.close()
        del manager, compute
        assert mapping() is None
    finally:
        gc.enable()
