"""Leases that outlast a pass.  In: the steps of a schedule.  Out: neighbours that stay, computed in one go.

What stays in the compute tier and has nothing moving between needs no new lease in every pass: at batch 1 a lease for
each of a hundred chunks costs the host more than the device has to do.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

from zinfer.chunks.table import ChunkId
from zinfer.memory.lease import Lease, WeightKey
from zinfer.memory.manager import ChunkManager
from zinfer.plan.records import Compute, Step


@dataclass(frozen=True, slots=True)
class Together:
    """Compute chunks that stay, one behind the other; nothing is fetched or evicted in between."""

    chunks: tuple[ChunkId, ...]


class Stays:
    """Holds leases on the chunks of `Together` steps until let_go(): before that their places cannot change."""

    def __init__(self, manager: ChunkManager) -> None:
        self._manager = manager
        self._leases: dict[tuple[ChunkId, ...], list[Lease]] = {}
        self._views: dict[tuple[ChunkId, ...], dict[WeightKey, Tensor]] = {}

    def joined(self, steps: Iterable[Step]) -> tuple[Step | Together, ...]:
        """The same steps, neighbouring chunks that stay being one."""
        return tuple(self._join(steps))

    def views(self, chunks: tuple[ChunkId, ...]) -> dict[WeightKey, Tensor]:
        """The weights of all of them.  Raises as ChunkManager.lease."""
        if chunks not in self._leases:
            leases = self._leases[chunks] = []
            for chunk in chunks:
                leases.append(self._manager.lease(chunk))
            self._views[chunks] = {key: view for lease in leases for key, view in lease.views.items()}
        return self._views[chunks]

    def where(self, chunks: tuple[ChunkId, ...]) -> Hashable:
        """A key for the addresses of their weights."""
        return tuple((lease.chunk, lease.address) for lease in self._leases[chunks])

    def let_go(self) -> None:
        """End all leases."""
        leases = [lease for held in self._leases.values() for lease in held]
        self._leases.clear()
        self._views.clear()
        for lease in leases:
            lease.release()

    def _join(self, steps: Iterable[Step]) -> Iterator[Step | Together]:
        for stays, run in groupby(steps, key=self._stays):
            found: Sequence[Step] = list(run)
            chunks = tuple(step.chunk for step in found if isinstance(step, Compute))
            if stays:
                yield Together(chunks)
            else:
                yield from found

    def _stays(self, step: Step) -> bool:
        return isinstance(step, Compute) and self._manager.placement.resident(step.chunk)
