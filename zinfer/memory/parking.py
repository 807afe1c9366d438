"""Host memory for what waits there for a device.  In: sizes.  Out: page-locked tensors from one exact slab."""

from __future__ import annotations

import torch
from torch import Tensor

from zinfer.arena import Arena
from zinfer.memory.slab import HostSlab


class Parking:
    """A slab of the size that the plan has set aside, lent out in pieces.

    A piece belongs to its borrower from take() to give_back(); what does not fit is ordinary memory, from which copies
    are slow but right.  Used by one thread.
    """

    def __init__(self, nbytes: int) -> None:
        self.slab = HostSlab(nbytes)
        self._arena = Arena(nbytes, align_bytes=64)
        self._lent: dict[int, int] = {}  # address -> offset
        self.num_misses = 0

    def take(self, like: Tensor) -> Tensor:
        """An uninitialised host tensor of the same shape and dtype, contiguous."""
        offset = self._arena.take(like.nbytes) if like.nbytes else None
        if offset is None:
            self.num_misses += bool(like.nbytes)
            return torch.empty(like.shape, dtype=like.dtype)
        piece_N = self.slab.bytes_N[offset : offset + like.nbytes]
        self._lent[piece_N.data_ptr()] = offset
        return piece_N.view(like.dtype).view(like.shape)

    def give_back(self, x: Tensor) -> None:
        """The piece is free; a tensor that is none of ours is no matter."""
        offset = self._lent.pop(x.data_ptr(), None)
        if offset is not None:
            self._arena.give_back(offset)

    def clear(self) -> None:
        """Everything is free: nobody will come for what waits."""
        for offset in self._lent.values():
            self._arena.give_back(offset)
        self._lent.clear()

    def close(self) -> None:
        """Give the memory back."""
        self._lent.clear()
        self.slab.close()
