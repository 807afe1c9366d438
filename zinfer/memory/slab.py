"""Exact-size allocations.  In: a number of bytes.  Out: one uint8 tensor to cut slots from, given back on close()."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol
from weakref import finalize

import torch
from torch import Tensor

from zinfer.chunks.table import HUGE_PAGE
from zinfer.errors import BudgetError
from zinfer.memory.ahead import Ahead
from zinfer.memory.numa import Near
from zinfer.memory.pinning import Locked, Pinning, no_entry
from zinfer.units import Bytes, round_up

_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_MAP_NORESERVE = 0x4000  # likewise: the addresses are no promise of memory
_MADV_DONTNEED = 4  # the mmap module names it only where the C library did at build time


class Slab(Protocol):
    """Bytes of one tier.  Owns them until close(); views taken before keep their address, not their contents."""

    bytes_N: Tensor  # uint8

    def claim(self, offset: int, nbytes: int) -> None:
        """The range is about to be written: nobody else may store into it."""
        ...

    def discard(self, offset: int, nbytes: int) -> None:
        """The range holds nothing of value: give its memory back where the tier can (whole pages)."""
        ...

    def close(self) -> None:
        """Give everything back; may be called again."""
        ...


class HostSlab:
    """Private anonymous memory, on 2 MiB pages where it is large enough: direct reads into such pages cost a sixth
    of the CPU.  Resident memory grows with what is read into it.

    Closing returns the pages at once.  The address range itself lives as long as the last view of it, so a stale
    view reads zeros and never another's memory.  With `spare_bytes` more addresses are set aside, which cost nothing
    until something is put there: a larger budget needs no other slab.  Where the system refuses them there are none.
    """

    def __init__(self, nbytes: int, spare_bytes: int = 0) -> None:
        is_huge = nbytes + spare_bytes >= HUGE_PAGE
        slack = HUGE_PAGE if is_huge else 0
        self._map: mmap.mmap | None = None
        if spare_bytes:
            with suppress(OSError, ValueError, OverflowError):
                self._map = mmap.mmap(-1, nbytes + spare_bytes + slack, flags=_PRIVATE | _MAP_NORESERVE)
                nbytes += spare_bytes
        try:
            if self._map is None:
                self._map = mmap.mmap(-1, max(nbytes + slack, mmap.PAGESIZE), flags=_PRIVATE)
        except OSError as error:
            raise _too_much("host", nbytes, error) from error
        # Through a memoryview, which pins the mapping: torch alone would let it be unmapped under a live tensor.
        whole_N = torch.frombuffer(memoryview(self._map), dtype=torch.uint8)
        self._begin = -whole_N.data_ptr() % HUGE_PAGE if is_huge else 0
        self._nbytes = nbytes
        self.bytes_N = whole_N[self._begin : self._begin + nbytes]
        self._pin: Pinning | None = None
        self._unpin: finalize[..., HostSlab] | None = None
        self._ahead: Ahead | None = None
        if is_huge and hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE, self._begin, round_up(nbytes, mmap.PAGESIZE))

    def pin(
        self,
        cuts: Sequence[int],
        runtime: Any,
        *,
        near: Near | None = None,
        enter: Callable[[], None] = no_entry,
        is_quiet: bool = False,
    ) -> Pinning:
        """Begin to page-lock the slab for the CUDA runtime, in the background; `cuts` and `enter` as for `Pinning`.

        Its pages come from `near`'s node: nothing has touched them yet.
        """
        if near is not None and self._map is not None:
            near.bind_memory(self.bytes_N.data_ptr(), round_up(self._nbytes, mmap.PAGESIZE))
        self._pin = Pinning(self.bytes_N.data_ptr(), cuts, runtime, enter=enter, is_quiet=is_quiet)
        # Whoever drops the slab without closing it leaves an address that the driver still maps to these pages: copies
        # from the next slab that lies there would bring what was in this one.
        self._unpin = finalize(self, self._pin.undo)
        self._unpin.atexit = False
        return self._pin

    def find_ahead(self, nbytes: int, unused: Sequence[tuple[int, int]] = ()) -> None:
        """Begin to find the pages of the first `nbytes`, ranges of `unused` aside; whoever writes claims first.

        What was being found before is left.
        """
        if self._ahead is not None:
            self._ahead.close()
        if nbytes >= HUGE_PAGE:
            self._ahead = Ahead(self.bytes_N, min(nbytes, self._nbytes), unused)

    def claim(self, offset: int, nbytes: int) -> None:
        """The range is about to be written by somebody who finds its pages himself."""
        if self._ahead is not None:
            self._ahead.claim(offset, nbytes)

    @property
    def locked(self) -> Locked:
        """What of it is page-locked by now."""
        return Locked(0, 0, True) if self._pin is None else self._pin.locked

    def discard(self, offset: int, nbytes: int) -> None:
        """Return the pages that lie wholly inside the range; they read as zeros afterwards."""
        self.claim(offset, nbytes)
        begin = round_up(offset, mmap.PAGESIZE)
        nbytes = (offset + nbytes - begin) // mmap.PAGESIZE * mmap.PAGESIZE
        if self._map is not None and self._pin is None and nbytes > 0:
            self._map.madvise(_MADV_DONTNEED, self._begin + begin, nbytes)

    def close(self) -> None:
        """Unpin, return every page, let go of the mapping."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
        if self._unpin is not None:
            self._unpin()
            self._unpin = self._pin = None
        self.discard(0, round_up(self._nbytes, mmap.PAGESIZE))
        self._map = None
        self.bytes_N = torch.empty(0, dtype=torch.uint8)


class DeviceSlab:
    """Device memory: one allocation of torch's, at least 512-byte aligned, never split or moved."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        try:
            self.bytes_N = torch.empty(nbytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise _too_much("device", nbytes, error) from error

    def claim(self, offset: int, nbytes: int) -> None:
        """Nobody else stores into it."""

    def discard(self, offset: int, nbytes: int) -> None:
        """Part of an allocation cannot be returned to the device."""

    def close(self) -> None:
        """Hand the allocation back to torch and, where the last view of it is gone, by torch to the device.

        torch would keep it for the next one of that size; another process, or a plan with other sizes, wants it now.
        """
        is_cuda = self.bytes_N.is_cuda
        self.bytes_N = torch.empty(0, dtype=torch.uint8)
        if is_cuda:
            with suppress(RuntimeError):  # of a device that is lost
                torch.cuda.empty_cache()


def _too_much(tier: str, nbytes: int, error: BaseException) -> BudgetError:
    return BudgetError(
        "ZI-2402",
        f"{Bytes(nbytes)} of {tier} memory for weights were asked of the system, it refuses: {error}",
        remedy=f"--{tier}-mem 50%   # less than is free now",
    )
