"""The CUDA transfer on a real device: right bytes under delays on either stream, page-locked slabs, nothing left."""

import ctypes
import gc
import random

import chunk_files
import pytest
import torch
from chunk_passes import summed_passes

from zinfer.memory.assemble import open_manager
from zinfer.memory.cuda import CudaTransfer
from zinfer.plan.records import Budget, Tier

pytestmark = pytest.mark.gpu

PAGES = [200, 300, 100, 300, 200, 300, 250, 120]
DELAY_CYCLES = 20_000_000  # about 10 ms of a stream's time


def open_cuda(table, *, resident=(0,), host=(2, 5), slots=3, staging=2, **options):
    placement = chunk_files.sim_placement(table, resident, host, slots, staging)
    budget = Budget(*(chunk_files.needed_bytes(table, placement, tier) for tier in (Tier.HOST, Tier.DEVICE)))
    return open_manager(table, placement, budget, device="cuda:0", **options)


def right_sums(contents, passes):
    return [sum(content) for content in contents] * passes


@pytest.mark.parametrize("shift", [0, 8])
def test_every_pass_shows_the_files_bytes(tmp_path, shift):
    table, contents = chunk_files.write_chunks(tmp_path, PAGES, shift=shift, piece=64 * 4096)
    manager = open_cuda(table)
    assert manager.device == torch.device("cuda:0")
    assert summed_passes(manager) == right_sums(contents, 4)
    streamed = [chunk for chunk in table.chunks if chunk.id]
    moved = manager.stats().link_bytes
    # Look-ahead wraps: three chunks of a fifth pass are on their way.
    assert moved["h2d"] >= table.chunks[0].nbytes + 4 * sum(chunk.nbytes for chunk in streamed)
    assert manager.surprises == 0
    manager.close()


@pytest.mark.parametrize("seed", range(3))
def test_a_busy_compute_stream_keeps_its_slots(tmp_path, seed):
    """Computation lags behind the host by many chunks: no slot may be overwritten before it was read."""
    table, contents = chunk_files.write_chunks(tmp_path, PAGES, seed=seed)
    chance = random.Random(seed)
    manager = open_cuda(table)
    sums = summed_passes(manager, between=lambda: torch.cuda._sleep(int(chance.random() * DELAY_CYCLES)))
    assert sums == right_sums(contents, 4)
    manager.close()


def delayed_copies(monkeypatch):
    """Every copy is late by some milliseconds of device time."""
    issue = CudaTransfer._issue

    def late(self, trip):
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(DELAY_CYCLES)
        issue(self, trip)

    monkeypatch.setattr(CudaTransfer, "_issue", late)


def test_computation_waits_for_a_late_copy(tmp_path, monkeypatch):
    table, contents = chunk_files.write_chunks(tmp_path, PAGES)
    delayed_copies(monkeypatch)
    manager = open_cuda(table)
    assert summed_passes(manager, passes=2) == right_sums(contents, 2)
    manager.close()


def test_a_lease_that_does_not_wait_is_caught(tmp_path, monkeypatch):
    table, contents = chunk_files.write_chunks(tmp_path, PAGES)
    delayed_copies(monkeypatch)
    monkeypatch.setattr(CudaTransfer, "ready", lambda self, ticket: None)
    manager = open_cuda(table)
    assert summed_passes(manager, passes=2) != right_sums(contents, 2)
    manager.close()


def test_a_copy_that_ignores_the_last_reader_is_caught(tmp_path, monkeypatch):
    table, contents = chunk_files.write_chunks(tmp_path, PAGES)
    monkeypatch.setattr(CudaTransfer, "fence", lambda self: None)
    manager = open_cuda(table)
    sums = summed_passes(manager, between=lambda: torch.cuda._sleep(DELAY_CYCLES))
    assert sums != right_sums(contents, 4)
    manager.close()


def test_a_lease_does_not_wait_for_the_device(tmp_path):
    """The host runs ahead: when all of a pass is issued, the device has not even begun."""
    table, _ = chunk_files.write_chunks(tmp_path, [20] * 4)
    manager = open_cuda(table, resident=(), host=range(4), slots=4, staging=0)
    for number in range(4):
        manager.lease(number).release()
    torch.cuda.synchronize()
    torch.cuda._sleep(50 * DELAY_CYCLES)
    behind = torch.cuda.Event()
    behind.record()
    for number in range(4):
        with manager.lease(number) as lease:
            lease[table.chunks[number].tensors[0].key].sum()
    assert not behind.query()
    torch.cuda.synchronize()
    manager.close()


def test_host_memory_is_page_locked_and_given_back(tmp_path):
    table, contents = chunk_files.write_chunks(tmp_path, PAGES)
    manager = open_cuda(table)
    slab = manager._memory.tiers[Tier.HOST].slab
    slab._pin._thread.join()
    # torch asks for the beginning of a storage, which is the mapping's and not the slab's: so one of its own.
    whole_N = slab.bytes_N
    seen = ctypes.c_uint8.from_address(whole_N.data_ptr())
    assert torch.frombuffer(seen, dtype=torch.uint8).is_pinned()
    assert summed_passes(manager, passes=1) == right_sums(contents, 1)
    manager.close()
    assert not torch.frombuffer(seen, dtype=torch.uint8).is_pinned()


def test_a_manager_that_nobody_closes_leaves_nothing_page_locked(tmp_path):
    """The next slab lies at the same address: copies from it must not bring what the dropped one held."""
    for seed in range(4):
        table, contents = chunk_files.write_chunks(tmp_path, PAGES, seed=seed)
        manager = open_cuda(table)
        manager._memory.tiers[Tier.HOST].slab._pin._thread.join()
        assert summed_passes(manager, passes=2) == right_sums(contents, 2)
        torch.cuda.synchronize()
        del manager
        gc.collect()


def test_without_page_locking_the_copies_are_right(tmp_path, monkeypatch):
    class Refusing:
        @staticmethod
        def cudaHostRegister(address, nbytes, flags):
            return 2

    monkeypatch.setattr(torch.cuda, "cudart", Refusing)
    table, contents = chunk_files.write_chunks(tmp_path, PAGES)
    manager = open_cuda(table)
    assert summed_passes(manager) == right_sums(contents, 4)
    manager.close()


def test_rows_arrive_on_the_device(tmp_path):
    for number in (0, 2, 3):  # on the device, in host memory, on disk
        table, contents = chunk_files.write_chunks(tmp_path, PAGES, seed=number)
        table = chunk_files.with_rows(table, number)
        manager = open_cuda(table)
        want = torch.frombuffer(bytearray(contents[number]), dtype=torch.int32)[:160].view(10, 16)
        for _ in range(2):
            rows = manager.rows(f"w{number}", torch.tensor([7, 0, 7], device="cuda"))
            assert rows.device == manager.device
            assert torch.equal(rows.cpu().view(torch.int32), want[[7, 0, 7]])
            manager.lease(number).release()
        manager.close()


def test_twenty_rounds_leave_nothing_on_the_device(tmp_path):
    table, _ = chunk_files.write_chunks(tmp_path, PAGES)
    gc.collect()  # of a test before this one that failed
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        manager = open_cuda(table)
        for number in (1, 2, 3):
            manager.prefetch(number)  # on their way when it closes
        manager.close()
    assert torch.cuda.memory_allocated() == before
