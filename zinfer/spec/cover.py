"""Cut rows into pieces of a few sizes.  In: a number of rows, sizes.  Out: pieces, as ints."""

from __future__ import annotations

from collections.abc import Sequence

# The rows at which arithmetic costs as much as reading the weight once; it only ranks groups of sizes.
BALANCE_ROWS = 100


def cover(rows: int, sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """Cut `rows` rows into (start, stop, size) with sizes of the group; a piece shorter than its size is padded."""
    pieces, at = [], 0
    while at < rows:
        left = rows - at
        roof = next((size for size in sizes if size >= left), sizes[-1])
        floor = max((size for size in sizes if size <= left), default=roof)
        # A large size for a few rows more than the next smaller one would waste most of its arithmetic.
        size = floor if 2 * floor >= BALANCE_ROWS and roof > left * 1.25 else roof
        pieces.append((at, min(at + size, rows), size))
        at += size
    return pieces
