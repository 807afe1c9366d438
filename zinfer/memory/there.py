"""Which free memory the machine still has.  In: how much would be used.  Out: what of it comes at once, and its rate.

A virtual machine's free memory goes back to its host some seconds after it was given back; from then on finding a page
of it takes as long as reading it from a disk.  What is not gone yet is used first.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from zinfer.chunks.table import HUGE_PAGE
from zinfer.config.machine import There
from zinfer.memory.slab import HostSlab
from zinfer.units import MIB, round_up

_PRESENT_BYTES_PER_S = (
    1e9  # clearing a page is several times as fast on any machine, asking a host for it is slower
)
_BLOCK = 2 * HUGE_PAGE
_SLOW_BLOCKS = 3  # in a row: a single one may have lost its core for a moment
_LEAST_BYTES = 32 * MIB  # less shows in no forecast


def memory_there(most_bytes: int, seconds: float) -> There:
    """Find memory as a run would, until it no longer comes at once, there is enough of it, or time is up.

    Where time is up as much again is expected: what ends somewhere is half through, as far as anybody can say.

    All of it is given back, and is the first to be found again: what was slow to come will be there then.
    """
    with held_there(most_bytes, seconds) as there:
        return there


@contextmanager
def held_there(most_bytes: int, seconds: float) -> Iterator[There]:
    """`memory_there`, and nobody else can have it meanwhile."""
    slab = HostSlab(round_up(max(most_bytes, 1), _BLOCK))
    try:
        yield _found(slab, most_bytes, seconds)
    finally:
        slab.close()


def _found(slab: HostSlab, most_bytes: int, seconds: float) -> There:
    begin_s = at_s = there_s = time.perf_counter()
    num_slow = there_bytes = 0
    for offset in range(0, most_bytes, _BLOCK):
        slab.bytes_N[offset : offset + _BLOCK : HUGE_PAGE].fill_(0)  # without the interpreter's lock
        last_s, at_s = at_s, time.perf_counter()
        num_slow = num_slow + 1 if at_s - last_s > _BLOCK / _PRESENT_BYTES_PER_S else 0
        if not num_slow:
            there_bytes, there_s = offset + _BLOCK, at_s
        if num_slow == _SLOW_BLOCKS:
            break
        if at_s - begin_s > seconds:
            there_bytes *= 2
            there_s += there_s - begin_s
            break
    if there_bytes < _LEAST_BYTES:
        return There()
    return There(nbytes=min(there_bytes, most_bytes), bytes_per_s=there_bytes / (there_s - begin_s))
