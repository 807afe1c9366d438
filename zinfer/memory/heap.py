"""Make the C library give freed memory back.  In: nothing.  Out: resident memory that follows what is alive."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import cache

from zinfer.units import MIB

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names of <malloc.h>
MAPPED_BYTES = 4 * MIB  # an allocation from here on is a mapping of its own and ends with its owner
_KEPT_BYTES = 64 * MIB  # free memory at the heap's end that is kept: waiting micro-batches take it again


@cache
def give_freed_memory_back() -> bool:
    """From now on, for the whole process; False where the C library has no such setting.

    glibc raises its threshold to the largest mapping it has seen freed, up to 32 MiB: from then on activations of a
    pass lie in the heap, and what is freed between others stays resident, uncounted by any budget (mallopt(3)).
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES) and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))
    return False
