"""How many passes a schedule needs.  In: requests' lengths, slots.  Out: whole numbers; nothing is run or timed."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def static_passes(lengths: Sequence[int], slots: int) -> int:
    """Batches of `slots` in arrival order, each run to the end of its longest; a pass gives each row one token."""
    return sum(max(lengths[at : at + slots]) for at in range(0, len(lengths), slots))


def continuous_passes(lengths: Sequence[int], slots: int) -> int:
    """A slot is refilled in the pass after its request ended; a prompt rides in one pass with others' tokens."""
    ends = [0] * slots
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def padded_rows(lengths: Sequence[int]) -> int:
    """Rows of a batch that is padded to its longest."""
    return len(lengths) * max(lengths)
