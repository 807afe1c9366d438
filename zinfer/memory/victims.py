"""Who leaves a tier when another chunk needs the room.  In: chunks as they are used.  Out: one that may go, or none."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from zinfer.chunks.table import ChunkId
from zinfer.plan.evict import Belady, Lru, Pinned, Policy

Choose = Callable[[Collection[int]], int | None]


class Victims:
    """Strays first, streamed chunks that came without a prefetch; then whom the policy names."""

    def __init__(self, policy: Policy | None) -> None:
        self._policy = policy or Pinned()
        self._recent = Lru()  # who goes when the order is not the planned one and the policy names nobody
        self._strays: set[ChunkId] = set()

    def used(self, chunk: ChunkId) -> None:
        """It is leased now."""
        self._policy.used(chunk)
        self._recent.used(chunk)

    def expect(self, order: Sequence[int]) -> None:
        """From now on chunks are used in this order."""
        self._policy = Belady(order)

    def strayed(self, chunk: ChunkId) -> None:
        """It came although nobody had fetched it, and has no home to stay in."""
        self._strays.add(chunk)

    def forget(self, chunk: ChunkId) -> None:
        """It is no stray, or no longer."""
        self._strays.discard(chunk)

    def choose(self, candidates: Collection[int]) -> int | None:
        """Of unleased chunks one that may go."""
        strays = [chunk for chunk in candidates if chunk in self._strays]
        return self._recent.victim(strays) if strays else self._policy.victim(candidates)

    def choose_any(self, candidates: Collection[int]) -> int | None:
        """Likewise where somebody has to."""
        victim = self.choose(candidates)
        return self._recent.victim(candidates) if victim is None else victim
