"""Counter-based random numbers.  In: seeds and steps.  Out: one uniform number each, in [0, 1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))


def philox(counter_4N: NDArray[np.uint64], key_2N: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Philox4x32-10 (Salmon et al. 2011) of N counters under N keys; 32-bit words held in uint64."""
    a, b, c, d = counter_4N
    key_0, key_1 = key_2N
    for _ in range(10):
        product_0, product_1 = _MULTIPLIERS[0] * a, _MULTIPLIERS[1] * c
        a, b, c, d = (
            (product_1 >> _HALF) ^ b ^ key_0,
            product_1 & _LOW,
            (product_0 >> _HALF) ^ d ^ key_1,
            product_0 & _LOW,
        )
        key_0, key_1 = (key_0 + _WEYL[0]) & _LOW, (key_1 + _WEYL[1]) & _LOW
    return np.stack((a, b, c, d))


def uniform(seeds: Sequence[int], steps: Sequence[int]) -> NDArray[np.float64]:
    """One float64 in [0, 1) with 53 random bits per (seed below 2**64, step): the same in any batch."""
    seed_N, step_N = np.array(seeds, np.uint64), np.array(steps, np.uint64)
    zero_N = np.zeros_like(step_N)
    words = philox(
        np.stack((step_N & _LOW, step_N >> _HALF, zero_N, zero_N)), np.stack((seed_N & _LOW, seed_N >> _HALF))
    )
    bits = (words[0] << _HALF | words[1]) >> np.uint64(11)
    return np.asarray(bits * 2.0**-53, np.float64)
