"""What brings a chunk in shares, whatever the devices.  In: a trip, its shares.  Out: one landing, when all have."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zinfer.chunks.table import Chunk
from zinfer.errors import MachineError
from zinfer.memory.ledger import Ledger
from zinfer.memory.slab import Slab
from zinfer.memory.transfer import Trip
from zinfer.plan.shares import Share, Way, cut


@dataclass(frozen=True, slots=True)
class Helper:
    """A further device: places for shares that pass through it, and the account that they are reserved in.

    The transfer that uses it closes it, when nothing moves any more.
    """

    slab: Slab
    num_slots: int
    ledger: Ledger

    @property
    def slots(self) -> list[Tensor]:
        """Equal places, uint8, each for the largest share of any chunk."""
        nbytes = len(self.slab.bytes_N) // self.num_slots
        return [self.slab.bytes_N[at * nbytes : (at + 1) * nbytes] for at in range(self.num_slots)]


class Gathering:
    """A chunk that comes in shares.  Each way calls `ended` once; the last call lands the chunk, with the first error.

    So nothing writes into the place any more when a failed fetch gives it back.
    """

    def __init__(
        self, trip: Trip, parts: int, landed: Callable[[Trip, list[Any], BaseException | None], None]
    ) -> None:
        self.trip = trip
        self._landed = landed
        self._lock = threading.Lock()
        self._remaining = parts
        self._marks: list[Any] = [None] * parts
        self._error: BaseException | None = None

    def ended(self, at: int, mark: Any = None, error: BaseException | None = None) -> None:
        """Share `at` is there, or never will be; `mark` is the device's own mark of its arrival."""
        with self._lock:
            self._marks[at] = mark
            self._error = self._error or error
            self._remaining -= 1
            is_last = not self._remaining
        if is_last:
            self._landed(self.trip, self._marks, self._error)


def shares_of(chunk: Chunk, ways: Sequence[Way]) -> list[Share]:
    """What each way brings of a chunk."""
    return cut(chunk.nbytes, [way.bytes_per_s for way in ways])


def lost_share(chunk: Chunk, lane: str, share: Share, error: BaseException) -> BaseException:
    """The error for a share that did not come; one that already says what is to be done stays as it is."""
    if isinstance(error, MachineError):
        return error
    return MachineError(
        "ZI-5382",
        f"bytes {share.begin} to {share.end} of chunk {chunk.id} did not come over {lane}: {error}",
        remedy="--set runtime.devices=1   # the first device's own link; then look at the other: nvidia-smi topo -m",
    )
