"""Which tier has a chunk's bytes, and in which state.  In: events.  Out: states; an illegal event raises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from enum import StrEnum

from zinfer.chunks.table import ChunkId
from zinfer.errors import InternalError
from zinfer.plan.records import Tier


class State(StrEnum):
    """Of one chunk in one tier."""

    ABSENT = "absent"
    ARRIVING = "arriving"
    RESIDENT = "resident"
    LEASED = "leased"  # by one or more


class Event(StrEnum):
    """What can happen to a chunk in a tier."""

    FETCH = "fetch"
    ARRIVED = "arrived"
    FAILED = "failed"  # or cancelled
    LEASE = "lease"
    RELEASE = "release"
    EVICT = "evict"
    SETTLE = "settle"  # a guest leaves its slot and is being packed into its home


ALLOWED = {
    (State.ABSENT, Event.FETCH): State.ARRIVING,
    (State.ARRIVING, Event.ARRIVED): State.RESIDENT,
    (State.ARRIVING, Event.FAILED): State.ABSENT,
    (State.RESIDENT, Event.LEASE): State.LEASED,
    (State.LEASED, Event.LEASE): State.LEASED,
    (State.LEASED, Event.RELEASE): State.RESIDENT,  # when the last lease ends; until then it stays LEASED
    (State.RESIDENT, Event.EVICT): State.ABSENT,
    (State.RESIDENT, Event.SETTLE): State.ARRIVING,
}


class Residency:
    """The one table of states, per (chunk, tier).  Weights are read-only: to evict is to drop, nothing is written.

    A leased chunk cannot be evicted, an arriving one cannot be read, and neither can be fetched again: no such row
    exists in ALLOWED.  Used from one thread.
    """

    def __init__(self) -> None:
        self._states: dict[tuple[ChunkId, Tier], State] = {}  # ABSENT is not stored
        self._leases: Counter[tuple[ChunkId, Tier]] = Counter()

    def state(self, chunk: ChunkId, tier: Tier) -> State:
        """ABSENT for what was never named."""
        return self._states.get((chunk, tier), State.ABSENT)

    def num_leases(self, chunk: ChunkId, tier: Tier) -> int:
        """How many leases hold the chunk."""
        return self._leases[chunk, tier]

    def chunks(self, tier: Tier, *states: State) -> Iterator[ChunkId]:
        """Chunks of a tier in one of `states` (not ABSENT), in the order in which they were fetched."""
        return (chunk for (chunk, where), state in self._states.items() if where is tier and state in states)

    def move(self, chunk: ChunkId, tier: Tier, event: Event) -> State:
        """Apply an event; return the new state.  Raises InternalError ZI-0121 for what ALLOWED does not list."""
        key, before = (chunk, tier), self.state(chunk, tier)
        after = ALLOWED.get((before, event))
        if after is None:
            raise InternalError(
                "ZI-0121", f"chunk {chunk} is {before} in {tier} memory: {event} is not allowed"
            )
        self._leases[key] += (event is Event.LEASE) - (event is Event.RELEASE)
        if self._leases[key]:
            after = State.LEASED
        else:
            del self._leases[key]
        if after is State.ABSENT:
            del self._states[key]
        else:
            self._states[key] = after
        return after

    def check(self) -> None:
        """Leases are counted exactly where the state is LEASED.  Raises InternalError ZI-0122 otherwise."""
        leased = {key for key, state in self._states.items() if state is State.LEASED}
        if (
            leased != {key for key, count in self._leases.items() if count > 0}
            or State.ABSENT in self._states.values()
        ):
            raise InternalError("ZI-0122", f"leases {self._leases} do not match states {self._states}")
