"""What the CUDA transfer asks of the runtime, and in which order, with a runtime that writes it down.

tests/gpu has the tests of what then happens; this one needs no GPU.
"""

import threading
import time
from contextlib import ExitStack
from pathlib import Path

import chunk_files
import pytest
import torch
from cuda_double import Library, cuda_runtime  # noqa: F401

from zinfer.errors import MachineError
from zinfer.memory import assemble
from zinfer.memory.assemble import open_manager
from zinfer.memory.cuda import CudaTransfer
from zinfer.memory.links import LinkLog
from zinfer.memory.nvme import Files, Reader
from zinfer.memory.slab import HostSlab
from zinfer.memory.transfer import Order
from zinfer.plan.records import Budget, Tier

PAGES = [3, 3, 3, 3]


@pytest.fixture
def seam(tmp_path, runtime):
    """A table, its contents, a transfer with one staging slot, and four device places."""
    table, contents = chunk_files.write_chunks(tmp_path, PAGES)
    with ExitStack() as closing:
        files, staging, arena = Files(table.files), HostSlab(table.slot_bytes), HostSlab(4 * table.slot_bytes)
        reader = Reader(files, LinkLog())
        transfer = CudaTransfer(reader, [staging.bytes_N], LinkLog(), torch.device("cpu"))
        places = list(arena.bytes_N.split(table.slot_bytes))
        for thing in (arena, staging, files, reader, transfer):
            closing.callback(thing.close)
        closing.callback(runtime.finish.set)
        yield table, contents, transfer, places


def test_events_order_the_copy_behind_the_last_reader_and_computation_behind_the_copy(seam, runtime):
    table, contents, transfer, places = seam
    assert runtime.calls == [(name, "waits for", "compute") for name in ("weights", "up", "down")]
    runtime.calls.clear()
    fence = transfer.fence()
    ticket = transfer.begin(Order(table.chunks[0], places[0], after=fence))
    ticket.wait()
    transfer.ready(ticket)
    assert runtime.calls == [
        ("compute", "records", 1),
        ("weights", "waits for", 1),
        ("weights", "records", 2),
        ("weights", "records", 3),
        ("compute", "waits for", 3),
    ]
    assert chunk_files.bytes_of(dict(views(table.chunks[0], places[0])), table.chunks[0]) == contents[0]


def views(chunk, place_N):
    return ((piece.key, place_N[piece.offset : piece.offset + piece.nbytes]) for piece in chunk.tensors)


def test_a_staging_slot_is_filled_again_only_when_its_copy_has_ended(seam, runtime):
    table, _, transfer, places = seam
    runtime.finish.clear()
    first, second = (transfer.begin(Order(table.chunks[i], places[i])) for i in (0, 1))
    first.wait()  # the copy is queued on the device
    assert not second._landed.wait(0.05)
    assert transfer._free == []
    runtime.finish.set()
    second.wait()
    transfer.close()
    assert len(transfer._free) == 1
    assert transfer._log.num_bytes == {"h2d": 2 * table.chunks[0].nbytes}
    assert [movement.end_s - movement.begin_s for movement in transfer._log.drain()] == pytest.approx([1, 1])


def test_a_copy_that_fails_on_the_device_surfaces_at_the_next_lease(seam, runtime):
    table, _, transfer, places = seam
    runtime.error = RuntimeError("CUDA error: an illegal memory access was encountered")
    ticket = transfer.begin(Order(table.chunks[0], places[0]))
    ticket.wait()
    transfer.close()
    with pytest.raises(MachineError, match=r"ZI-5332.*chunk 0.*illegal memory access"):
        transfer.ready(ticket)
    assert len(transfer._free) == 1


def test_a_copy_that_cannot_be_issued_lands_with_an_error(seam, runtime):
    table, _, transfer, places = seam
    ticket = transfer.begin(Order(table.chunks[0], places[0][:10]))
    with pytest.raises(MachineError, match=r"ZI-5331.*chunk 0"):
        ticket.wait()
    again = transfer.begin(Order(table.chunks[0], places[0]))
    again.wait()  # its staging slot was free again


def test_nothing_is_recorded_on_torchs_allocator_and_nothing_synchronises_the_device(seam):
    import inspect

    from zinfer.memory import cuda

    source = inspect.getsource(cuda)
    assert "record_stream" not in source
    assert "cuda.synchronize" not in source


@pytest.fixture
def open_recorded(tmp_path, runtime, monkeypatch):
    """Opens managers on the recorded runtime: the whole path but the device.  Also its table and its library."""
    table, contents = chunk_files.write_chunks(tmp_path, PAGES)
    library = Library()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: library)
    monkeypatch.setattr(assemble, "DeviceSlab", lambda nbytes, device: HostSlab(nbytes))
    monkeypatch.setattr(assemble.torch, "device", lambda name: torch.empty(0).device)
    placement = chunk_files.sim_placement(table, (0,), (1,), 1, 1)
    budget = Budget(*(chunk_files.needed_bytes(table, placement, tier) for tier in (Tier.HOST, Tier.DEVICE)))

    def make(**options):
        return open_manager(table, placement, budget, device="cuda:0", **options)

    return make, table, contents, library


def run_pass(manager, table, contents):
    for number in range(4):
        manager.prefetch(number)
        with manager.lease(number) as lease:
            assert chunk_files.bytes_of(lease, table.chunks[number]) == contents[number]
        if number:
            manager.evict(number)
        manager.check()


def test_a_manager_on_the_recorded_runtime(open_recorded, runtime):
    """Slab, page-locking, fences at the end of leases, closing in order."""
    make, table, contents, library = open_recorded
    manager = make()
    for _ in range(2):
        run_pass(manager, table, contents)
    fences = [call for call in runtime.calls if call[:2] == ("compute", "records")]
    reused = [call for call in runtime.calls[1:] if call[:2] == ("weights", "waits for")]
    assert len(fences) == 8  # one per lease
    # Chunks 2 and 3 of the first pass, 1 to 3 of the second: the slot had a reader before.
    assert len(reused) == 5
    assert {call[2] for call in reused} <= {call[2] for call in fences}
    manager._memory.locks[0].settle()
    assert manager.stats().locked_bytes == 2 * table.slot_bytes
    assert sum(library.locked.values()) == 2 * table.slot_bytes
    manager.close()
    assert manager.log.num_bytes["h2d"] == 7 * table.slot_bytes  # counted when a copy has been seen to end
    assert library.locked == {}


def test_locking_that_fails_at_half_keeps_staging_and_the_right_bytes(open_recorded, caplog):
    make, table, contents, library = open_recorded
    library.most = table.slot_bytes
    manager = make()
    manager._memory.locks[0].settle()
    assert manager.stats().locked_bytes == table.slot_bytes
    assert "page-locked" in caplog.text
    run_pass(manager, table, contents)
    manager.close()
    assert library.locked == {}


def test_memory_in_which_micro_batches_wait_is_locked_too(open_recorded):
    make, table, _, library = open_recorded
    manager = make(parking_bytes=8192)
    for lock in manager._memory.locks:
        lock.settle()
    assert manager.stats().locked_bytes == 2 * table.slot_bytes + 8192
    assert torch.equal(manager.transfer.unpark(manager.transfer.park(torch.arange(5))), torch.arange(5))
    manager.close()
    assert library.locked == {}


def test_fifty_rounds_leave_nothing(open_recorded):
    make, table, contents, library = open_recorded

    def held():
        names = [thread.name for thread in threading.enumerate() if thread.name.startswith("zinfer")]
        return len(list(Path("/proc/self/fd").iterdir())), names

    before = held()
    for number in range(50):
        manager = make(parking_bytes=4096)
        if number % 5 == 0:
            run_pass(manager, table, contents)
        else:
            manager.prefetch(number % 4)  # on its way when it closes
        manager.close()
        assert library.locked == {}
    assert held() == before


def test_a_device_lost_on_the_way_is_one_error_and_closing_works(open_recorded, runtime):
    make, table, contents, library = open_recorded
    manager = make()
    run_pass(manager, table, contents)
    runtime.error = RuntimeError("CUDA error: unspecified launch failure")
    manager.prefetch(1)
    with pytest.raises(MachineError, match=r"ZI-5332.*lost"):
        for _ in range(200):
            manager.lease(1).release()
            time.sleep(0.01)
    manager.close()
    assert library.locked == {}
