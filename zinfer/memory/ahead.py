"""Find the pages of a slab before they are needed.  In: who takes which range.  Out: fresh memory that is there."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from ctypes import memset

from torch import Tensor

from zinfer.chunks.table import HUGE_PAGE
from zinfer.units import round_up

_LEAP = 32  # huge pages that are left out where readers have caught up: they find what they need themselves


class Ahead:
    """A thread that stores into one huge page after the other, from the first, unless somebody has claimed it or it
    lies in a range (offset, bytes) of `unused`.

    Finding fresh memory takes a processor as long as reading as much from disk takes the disk; readers do it for what
    they are about to fill, this does it while cores would idle.  A page that was claimed is never stored into, and
    when `claim` returns no store into it is under way.  `bytes_N` begins at a multiple of HUGE_PAGE.  Plain stores
    take the lock of the mapping alone, so nobody who maps memory waits (docs/experiments.md, who finds pages for the
    weights).
    """

    def __init__(self, bytes_N: Tensor, nbytes: int, unused: Iterable[tuple[int, int]] = ()) -> None:
        self._bytes_N = bytes_N  # keeps the mapping, whoever drops the slab without closing it
        self._address = bytes_N.data_ptr()
        self._is_claimed = bytearray(round_up(nbytes, HUGE_PAGE) // HUGE_PAGE)
        self._at = -1  # the page that is being found
        self._leap = 0
        self._num_found = 0
        self._is_ended = False
        self._busy = threading.Lock()
        for offset, size in unused:
            self.claim(offset, size)
        self._thread = threading.Thread(target=self._find, name="zinfer-ahead", daemon=True)
        self._thread.start()

    def claim(self, offset: int, nbytes: int) -> None:
        """Bytes of the slab belong to the caller from now on; waits for one page at most."""
        if nbytes <= 0:
            return
        first, stop = offset // HUGE_PAGE, -(-(offset + nbytes) // HUGE_PAGE)
        first, stop = min(first, len(self._is_claimed)), min(stop, len(self._is_claimed))
        self._is_claimed[first:stop] = b"\1" * (stop - first)
        # The finder says where it is before it looks at the claim: one of the two sees the other.
        if first <= self._at < stop:
            self._leap = _LEAP
            with self._busy:
                pass

    @property
    def found_bytes(self) -> int:
        """What it has found by now."""
        return self._num_found * HUGE_PAGE

    def close(self) -> None:
        """End the thread; may be called again."""
        self._is_ended = True
        self._thread.join()

    def _find(self) -> None:
        page = 0
        while page < len(self._is_claimed) and not self._is_ended:
            with self._busy:
                self._at = page
                if not self._is_claimed[page]:
                    memset(self._address + page * HUGE_PAGE, 0, 1)  # without the interpreter's lock
                    self._num_found += 1
                self._at = -1
            page, self._leap = page + 1 + self._leap, 0
