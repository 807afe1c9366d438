"""Slabs: exact sizes, memory only for what is used, pages back at once, and page-locking that may be refused."""

import gc
import logging
import mmap
import threading
from pathlib import Path

import pytest
import torch

from zinfer.errors import BudgetError
from zinfer.memory.pinning import pieces
from zinfer.memory.slab import HUGE_PAGE, DeviceSlab, HostSlab
from zinfer.units import GIB, KIB, MIB


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.parametrize("nbytes", [1, 4096, 100 * KIB, 2 * MIB, 5 * MIB + 4096])
def test_a_slab_is_as_large_as_asked_and_aligned(nbytes):
    slab = HostSlab(nbytes)
    assert slab.bytes_N.shape == (nbytes,)
    assert slab.bytes_N.dtype is torch.uint8
    assert slab.bytes_N.data_ptr() % (HUGE_PAGE if nbytes >= HUGE_PAGE else mmap.PAGESIZE) == 0
    assert not slab.bytes_N.any()
    slab.bytes_N.fill_(7)
    slab.close()
    slab.close()


def test_an_empty_slab_is_a_slab():
    slab = HostSlab(0)
    assert len(slab.bytes_N) == 0
    slab.close()


def test_resident_memory_grows_with_use_and_goes_at_once():
    gc.collect()
    before = resident_bytes()
    slab = HostSlab(256 * MIB)
    assert resident_bytes() - before < 4 * MIB
    slab.bytes_N[: 64 * MIB].fill_(1)
    assert 60 * MIB < resident_bytes() - before < 72 * MIB
    slab.discard(8 * MIB, 48 * MIB)
    assert resident_bytes() - before < 24 * MIB
    assert slab.bytes_N[: 8 * MIB].all()
    assert not slab.bytes_N[8 * MIB : 56 * MIB].any()
    stale_N = slab.bytes_N[:100]
    slab.close()
    assert resident_bytes() - before < 4 * MIB
    assert not stale_N.any()  # readable, and nobody else's


def test_part_of_a_page_is_not_discarded():
    slab = HostSlab(4 * 4096)
    slab.bytes_N.fill_(1)
    slab.discard(100, 4096)
    assert slab.bytes_N.all()
    slab.discard(100, 2 * 4096)
    assert slab.bytes_N.sum() == 3 * 4096
    slab.close()


def test_huge_pages_are_asked_for():
    slab = HostSlab(8 * MIB)
    ranges = Path("/proc/self/smaps").read_text().split("\n")
    at = next(i for i, line in enumerate(ranges) if line.startswith(f"{slab.bytes_N.data_ptr():x}-"))
    flags = next(line for line in ranges[at:] if line.startswith("VmFlags"))
    assert " hg" in flags
    slab.close()


def test_a_system_that_refuses_is_a_typed_error():
    with pytest.raises(BudgetError, match="ZI-2402"):
        HostSlab(2**62)


def test_a_device_slab_is_one_allocation():
    slab = DeviceSlab(1000, torch.device("cpu"))
    assert slab.bytes_N.shape == (1000,)
    slab.discard(0, 1000)
    slab.close()
    assert len(slab.bytes_N) == 0


class Runtime:
    """What the CUDA runtime is asked; refuses from the n-th registration on."""

    def __init__(self, refuse_from=99):
        self.calls, self.refuse_from, self.registered = [], refuse_from, {}
        self.asked = threading.Event()

    def cudaHostRegister(self, address, nbytes, flags):
        self.calls.append(nbytes)
        self.asked.set()
        if len(self.calls) > self.refuse_from:
            return 2
        self.registered[address] = nbytes
        return 0

    def cudaHostUnregister(self, address):
        del self.registered[address]
        return 0


def settled(runtime, slab, cuts):
    slab.pin(cuts, runtime)
    slab._pin._thread.join()


def test_the_whole_slab_is_page_locked_and_unlocked_before_it_goes():
    slab, runtime = HostSlab(6 * MIB), Runtime()
    settled(runtime, slab, [0, 2 * MIB, 6 * MIB])
    begin = slab.bytes_N.data_ptr()
    assert runtime.registered == {begin: 6 * MIB}
    slab.discard(0, 2 * MIB)  # locked pages stay
    slab.close()
    assert runtime.registered == {}


def test_a_refusal_is_announced_and_what_was_locked_is_unlocked_at_the_end(caplog):
    slab, runtime = HostSlab(4 * MIB), Runtime(refuse_from=0)
    with caplog.at_level(logging.WARNING, "zinfer"):
        settled(runtime, slab, [0, 4 * MIB])
    assert "could be page-locked" in caplog.text
    assert runtime.registered == {}
    slab.close()


def test_pieces_end_where_places_end():
    assert list(pieces([0, GIB // 2, GIB, GIB + GIB // 2])) == [(0, GIB), (GIB, GIB + GIB // 2)]
    assert list(pieces([0, 700 * MIB, 1400 * MIB])) == [(0, 700 * MIB), (700 * MIB, 1400 * MIB)]
    assert list(pieces([0, 3 * GIB, 3 * GIB + 4096])) == [(0, 3 * GIB), (3 * GIB, 3 * GIB + 4096)]
    assert list(pieces([0])) == []
    assert list(pieces([])) == []
