"""An allocator over a range of offsets.  In: sizes.  Out: offsets that do not overlap.  Touches no bytes."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from zinfer.errors import InternalError


class Arena:
    """Offsets [0, size), handed out in multiples of `align_bytes`: best fit, free neighbours are joined at once.

    Blocks of one size, such as slots, never fragment it; of different sizes, ask `largest_free_bytes`.
    """

    def __init__(self, size: int, align_bytes: int = 4096) -> None:
        self.size = size - size % align_bytes
        self.align_bytes = align_bytes
        self._taken: dict[int, int] = {}  # offset -> bytes
        self._gaps: list[tuple[int, int]] = (
            [(0, self.size)] if self.size else []
        )  # (offset, bytes), by offset

    @property
    def free_bytes(self) -> int:
        """Bytes in all gaps together."""
        return sum(nbytes for _, nbytes in self._gaps)

    @property
    def largest_free_bytes(self) -> int:
        """The largest block that `take` would grant."""
        return max((nbytes for _, nbytes in self._gaps), default=0)

    def blocks(self) -> list[tuple[int, int]]:
        """Blocks handed out, (offset, bytes), by offset."""
        return sorted(self._taken.items())

    def take(self, size: int) -> int | None:
        """The offset of a block of at least `size` bytes; None when no gap is large enough."""
        need = max(-(-size // self.align_bytes), 1) * self.align_bytes
        fitting = [(nbytes, offset) for offset, nbytes in self._gaps if nbytes >= need]
        if not fitting:
            return None
        nbytes, offset = min(fitting)
        at = bisect_left(self._gaps, (offset, nbytes))
        self._gaps[at : at + 1] = [(offset + need, nbytes - need)] if nbytes > need else []
        self._taken[offset] = need
        return offset

    def give_back(self, offset: int) -> None:
        """Free the block at `offset`.  Raises InternalError ZI-0101 if there is none."""
        nbytes = self._taken.pop(offset, None)
        if nbytes is None:
            raise InternalError("ZI-0101", f"offset {offset} was given back, no block begins there")
        at = bisect_right(self._gaps, (offset, nbytes))
        begin, end, low, high = offset, offset + nbytes, at, at
        if at < len(self._gaps) and self._gaps[at][0] == end:
            end, high = end + self._gaps[at][1], at + 1
        if at and sum(self._gaps[at - 1]) == begin:
            begin, low = self._gaps[at - 1][0], at - 1
        self._gaps[low:high] = [(begin, end - begin)]

    def check(self) -> None:
        """Every byte is in one block or one gap, and no two gaps touch.  Raises InternalError ZI-0102 otherwise."""
        end, was_gap = 0, False
        parts = [(*block, False) for block in self.blocks()] + [(*gap, True) for gap in self._gaps]
        for offset, nbytes, is_gap in sorted(parts):
            if offset != end or nbytes <= 0 or (is_gap and was_gap):
                raise InternalError("ZI-0102", f"the arena is broken at offset {offset}: {sorted(parts)}")
            end, was_gap = offset + nbytes, is_gap
        if end != self.size:
            raise InternalError("ZI-0102", f"the arena accounts for {end} of {self.size} bytes")
