"""Lengths in steps.  In: a length.  Out: the next step up, so that what differs little has one shape."""

from __future__ import annotations

from zinfer.units import round_up

_LEAST_STEP = 32  # lengths within a step, or within a quarter of their octave, count as one


def step_up(length: int) -> int:
    """At most a quarter more than `length`, or the least step."""
    return round_up(length, max(_LEAST_STEP, 1 << max(length.bit_length() - 3, 0)))
