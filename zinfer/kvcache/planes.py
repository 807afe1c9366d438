"""How keys and values lie in pages.  In: rows of a layer.  Out: the same rows, as they are or from eight bits.

Int8 pages keep, per token and key-value head, integers of -127 to 127 and an fp32 scale: the largest absolute value is
met exactly, any other element is off by at most 1/254 of it.  (An fp16 scale would save 2 of D + 4 bytes and overflow
where activations exceed 8e6; the error would be the same.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from zinfer.kvcache.pages import PAGE_TOKENS, kv_cache_bytes

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_LEVELS = 127


class Planes(ABC):
    """Tensors [layers, 2, slots, ...], keys and values side by side; a token has the same slot in all of them."""

    tensors: tuple[Tensor, ...]

    @abstractmethod
    def encode(self, rows_TKD: Tensor) -> Sequence[Tensor]:
        """Rows, of keys or of values, as the planes hold them."""

    @abstractmethod
    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        """The way back: [2, n, K, D] in the model's dtype or fp32."""

    @property
    def nbytes(self) -> int:
        """All planes together."""
        return sum(plane.nbytes for plane in self.tensors)

    def write(self, layer: int, kind: int, slots_T: Tensor, rows_TKD: Tensor) -> None:
        """Put keys (kind 0) or values (1) into slots of one layer."""
        for plane, part in zip(self.tensors, self.encode(rows_TKD), strict=True):
            plane[layer, kind].index_copy_(0, slots_T, part)

    def parts(self, layer: int, slots: slice | Tensor) -> list[Tensor]:
        """What `decode` takes, of so many slots: views for a slice, else gathered."""
        if isinstance(slots, slice):
            return [plane[layer, :, slots] for plane in self.tensors]
        return [plane[layer].index_select(1, slots) for plane in self.tensors]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy slots to slots, in every layer."""
        for plane in self.tensors:
            plane.index_copy_(2, target, plane.index_select(2, source))


class PlainPlanes(Planes):
    """One slab in the model's dtype."""

    def __init__(self, slab: Tensor) -> None:
        self.tensors = (slab,)

    def encode(self, rows_TKD: Tensor) -> Sequence[Tensor]:
        return (rows_TKD,)

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0]


class Int8Planes(Planes):
    """Integers [layers, 2, slots, K, D] and scales [layers, 2, slots, K]."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.tensors = (codes, scales)

    def encode(self, rows_TKD: Tensor) -> Sequence[Tensor]:
        rows = rows_TKD.float()
        scales = rows.abs().amax(-1) / _LEVELS
        codes = rows / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        return codes.round_().clamp_(-_LEVELS, _LEVELS).to(torch.int8), scales

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        codes, scales = parts
        return codes * scales[..., None]


def make_planes(
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    num_pages: int,
    dtype: str,
    device: torch.device | str = "cpu",
) -> Planes:
    """Allocate, exactly; `dtype` is the word of ModelSpec.dtype, or "INT8"."""
    shape = (num_layers, 2, num_pages * PAGE_TOKENS, num_kv_heads)
    planes: Planes
    if dtype == "INT8":
        codes = torch.empty((*shape, head_dim), dtype=torch.int8, device=device)
        planes = Int8Planes(codes, torch.empty(shape, dtype=torch.float32, device=device))
    else:
        planes = PlainPlanes(torch.empty((*shape, head_dim), dtype=DTYPES[dtype], device=device))
    assert planes.nbytes == kv_cache_bytes(num_layers, num_kv_heads, head_dim, num_pages, dtype), "counted"
    return planes
