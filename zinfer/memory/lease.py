"""The right to read a chunk.  In: its place.  Out: weights by (name, first row, end row), until it ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TypeAlias

import torch
from torch import Tensor

from zinfer.chunks.table import Chunk, ChunkId
from zinfer.errors import InternalError
from zinfer.memory.tier import Place, TierMemory
from zinfer.plan.records import Tier

WeightKey: TypeAlias = tuple[str, int, int]
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "U8": torch.uint8}


class Views:
    """Typed views of chunks where they lie, made once per place and form: addresses repeat, so views do."""

    def __init__(self) -> None:
        self._made: dict[tuple[ChunkId, Tier, int, int], dict[WeightKey, Tensor]] = {}

    def of(self, chunk: Chunk, memory: TierMemory) -> dict[WeightKey, Tensor]:
        """Every tensor of a chunk that has a place in `memory`."""
        key = (chunk.id, memory.ledger.tier, memory.places[chunk.id].offset, chunk.nbytes)
        if key not in self._made:
            place_N = memory.bytes_of(chunk.id)
            self._made[key] = {
                piece.key: place_N[piece.offset : piece.offset + piece.nbytes]
                .view(DTYPES[piece.dtype])
                .view(piece.shape)
                for piece in chunk.tensors
            }
        return self._made[key]

    def clear(self) -> None:
        """Let go of all, so that the memory can go."""
        self._made.clear()


class Lease:
    """One chunk stays in the compute tier, where it is, until this lease (and every other on it) has ended.

    `views` are typed tensors in place, 64-byte aligned; they are the chunk's bytes only while the lease lasts.
    """

    def __init__(
        self,
        chunk: ChunkId,
        place: Place,
        views: Mapping[WeightKey, Tensor],
        end: Callable[[ChunkId, Place], None],
        place_now: Callable[[ChunkId], Place | None],
    ) -> None:
        self.chunk = chunk
        self.views = views
        self._place = place
        self._end = end
        self._place_now = place_now
        self._is_held = True

    @property
    def address(self) -> int:
        """Where in its tier the chunk lies: the same place, the same addresses."""
        return self._place.offset

    @property
    def is_stale(self) -> bool:
        """Whether the place has been emptied since: what its views show is another's bytes, or none."""
        return self._place_now(self.chunk) != self._place

    def __getitem__(self, key: WeightKey) -> Tensor:
        """One weight.  Raises InternalError ZI-0151 when the lease has ended."""
        if not self._is_held:
            raise InternalError("ZI-0151", f"{key} is asked of an ended lease on chunk {self.chunk}")
        return self.views[key]

    def release(self) -> None:
        """End the lease; a second time does nothing."""
        if self._is_held:
            self._is_held = False
            self._end(self.chunk, self._place)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
