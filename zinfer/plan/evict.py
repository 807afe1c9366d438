"""Who goes when room is needed.  In: the order in which chunks are used.  Out: a victim.  Integers only."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Protocol


class Policy(Protocol):
    """Told of every use; asked for the chunk to drop next."""

    def used(self, chunk: int) -> None:
        """The chunk is being used now."""
        ...

    def victim(self, candidates: Collection[int]) -> int | None:
        """One of `candidates`; None: none of them may go."""
        ...


class Belady:
    """Drops the chunk whose next use lies farthest ahead in a cyclic order (Belady 1966, as in PatrickStar 1.1).

    For N equal chunks used once per cycle and room for C it fetches N(N-C)/(N-1) per cycle on average, the least
    that any policy can.  A use out of order moves the position to just behind that chunk's next turn.
    """

    def __init__(self, order: Sequence[int]) -> None:
        self._length = len(order)
        self._now = 0  # position in the cycle of the use that comes next
        self._turns: defaultdict[int, list[int]] = defaultdict(list)  # chunk -> ascending positions
        for position, chunk in enumerate(order):
            self._turns[chunk].append(position)

    def used(self, chunk: int) -> None:
        """Move behind this use."""
        distance = self._distance(chunk)
        if distance < self._length:
            self._now = (self._now + distance + 1) % self._length

    def victim(self, candidates: Collection[int]) -> int | None:
        """The farthest next use; what the order does not name goes first, of equals the higher number."""
        return max(candidates, key=lambda chunk: (self._distance(chunk), chunk), default=None)

    def _distance(self, chunk: int) -> int:
        turns = self._turns.get(chunk)
        if not turns:
            return self._length
        at = bisect_left(turns, self._now)
        return turns[at] - self._now if at < len(turns) else turns[0] + self._length - self._now


class Lru:
    """Drops the chunk that was used longest ago.  On a cycle larger than the room it never hits."""

    def __init__(self) -> None:
        self._last_use: dict[int, int] = {}
        self._clock = 0

    def used(self, chunk: int) -> None:
        """Note the time."""
        self._clock += 1
        self._last_use[chunk] = self._clock

    def victim(self, candidates: Collection[int]) -> int | None:
        """The oldest; what was never used goes first."""
        return min(candidates, key=lambda chunk: (self._last_use.get(chunk, 0), chunk), default=None)


class Pinned:
    """Drops nothing: the schedule alone says what goes (a fixed resident set, the rest through slots)."""

    def used(self, chunk: int) -> None:
        """Nothing to note."""

    def victim(self, candidates: Collection[int]) -> int | None:
        """None."""
        return None
