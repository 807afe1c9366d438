"""Shares of a chunk.  In: a machine's links, a chunk's size.  Out: which bytes come over which link, in proportion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from zinfer.config.machine import Link, Machine
from zinfer.plan.records import Placement

DISK, COMPUTE, ROWS = "disk", "compute", "rows"  # what a pass occupies beside the links to devices
SHARE_ALIGN = 4096  # smaller pieces are not worth a copy of their own


@dataclass(frozen=True, slots=True)
class Share:
    """Bytes [begin, end) of a chunk."""

    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """May be 0."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Way:
    """From host memory to the device that computes: over the links of `hops` in turn, each with its name."""

    hops: tuple[tuple[str, Link], ...]

    @property
    def bytes_per_s(self) -> float:
        """Of a stream of shares: hops work side by side, the slowest one counts."""
        return min(link.bytes_per_s for _, link in self.hops)


def link_name(device: int) -> str:
    """Of a device's link to host memory: "h2d" for the one that computes, then "h2d:1", ..."""
    return f"h2d:{device}" if device else "h2d"


def peer_name(device: int) -> str:
    """Of the link from a device to the one that computes."""
    return f"peer:{device}"


def is_peer(lane: str) -> bool:
    """Whether bytes on that lane have left host memory behind."""
    return lane.startswith("peer:")


def ways_up(machine: Machine) -> list[Way]:
    """One way per device whose link is used, the computing one's first; none where there is no device."""
    if not machine.links:
        return [Way(((link_name(0), machine.h2d),))] if machine.h2d else []
    ways = []
    for device, link in enumerate(machine.links):
        own = ((link_name(device), link.at_once),)
        ways.append(Way((*own, (peer_name(device), link.peer)) if link.peer else own))
    return ways


def cut(nbytes: int, rates: Sequence[float]) -> list[Share]:
    """Cut 0:nbytes in proportion to the rates, at multiples of SHARE_ALIGN; shares join without gaps, some empty.

    Each cut lies within half of SHARE_ALIGN of its exact place, so that all links end within one such piece's time.
    """
    total, blocks = sum(rates), nbytes / SHARE_ALIGN
    ends = [round(part / total * blocks) * SHARE_ALIGN for part in accumulate(rates[:-1])]
    return [Share(begin, end) for begin, end in pairwise([0, *(min(end, nbytes) for end in ends), nbytes])]


def largest_share(nbytes: int, rates: Sequence[float], at: int) -> int:
    """Bytes that a place for share `at` of any chunk of at most `nbytes` needs."""
    exact = rates[at] / sum(rates) * nbytes
    return min(int(exact // SHARE_ALIGN + 2) * SHARE_ALIGN, nbytes)


def num_share_slots(placement: Placement) -> int:
    """Places for shares on each further device: as many as there are chunks on their way, and two while loading."""
    return max(placement.slots, 2)


def link_seconds(busy_s: dict[str, float]) -> float:
    """Of a simulated pass: the busiest link's seconds."""
    return max((seconds for lane, seconds in busy_s.items() if lane not in (COMPUTE, ROWS)), default=0.0)
