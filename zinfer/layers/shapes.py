"""Which shapes of an attention product agree bit for bit.  In: head counts.  Out: rows, keys and sequences of one call.

Libraries choose a kernel by the shape, and kernels add in different orders; exact attention uses only shapes of one
agreeing group, found by a self-test of the very function that is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from zinfer.kernels.choice import agreeing_sizes
from zinfer.kernels.paged import paged_serves
from zinfer.kernels.remembered import remembered
from zinfer.layers.partial import partial
from zinfer.layers.tiles import serving
from zinfer.layers.varlen import varlen_serves
from zinfer.spec.attention_cost import KEY_COUNTS, KV_BLOCK, QUERY_ROWS, stacked_pieces
from zinfer.spec.records import AttentionSizes, ModelSpec

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_FEW = 5  # different sequences in the test


@dataclass(frozen=True, slots=True)
class Shapes:
    """New `rows` of one sequence that may share a product, `keys` of a sequence's last block that it may be cut to,
    both ascending, and how many pieces of `size` rows over `keys` keys may be stacked in one call."""

    rows: tuple[int, ...]
    keys: tuple[int, ...]
    is_stackable: bool
    kv_heads: int
    group: int
    head_dim: int

    def at_once(self, size: int, keys: int, element_bytes: int = 0) -> int:
        """Pieces of one call; large ones fill a product by themselves.  `element_bytes` as in `stacked_pieces`."""
        if not self.is_stackable or 2 * size * self.group > QUERY_ROWS:
            return 1
        return stacked_pieces(self.kv_heads, self.head_dim, keys, size * self.group, element_bytes)

    def keys_for(self, count: int) -> int:
        """The fewest keys of an agreeing shape that hold `count`."""
        return next(size for size in self.keys if size >= count)


def prepare_attention(
    spec: ModelSpec, device: str, *, exact: bool = True, kv_dtype: str | None = None
) -> None:
    """Run the self-tests of a model's shape now, before the weights take the memory that they need.

    `kv_dtype` is the format of the pages, without it the model's.
    """
    heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    agreeing_shapes(kv_heads, heads // kv_heads, dim, device, torch.get_num_threads())
    if exact:
        return
    dtype = _DTYPES[spec.dtype]
    for is_windowed in {False, spec.sliding_window is not None}:
        varlen_serves(dtype, heads, kv_heads, dim, device, is_windowed)
    paged_serves(dtype, heads, kv_heads, dim, kv_dtype == "INT8", device)


def with_attention_sizes(spec: ModelSpec) -> ModelSpec:
    """The spec with how attention works on this processor, for the plan to count."""
    group = spec.num_heads // spec.num_kv_heads
    shapes = agreeing_shapes(spec.num_kv_heads, group, spec.head_dim, "cpu", torch.get_num_threads())
    found = serving("cpu", _DTYPES[spec.dtype])
    in_place = found is not None and found.attends(spec.num_heads, spec.num_kv_heads, spec.head_dim)
    return replace(spec, attention_sizes=AttentionSizes(shapes.rows, shapes.keys, in_place))


@cache
def agreeing_shapes(kv_heads: int, group: int, head_dim: int, device: str, num_threads: int) -> Shapes:
    """Test once per shape; `num_threads` is the number in force: libraries share work among threads differently."""
    case = (kv_heads, group, head_dim, device, num_threads)
    rows, keys, is_stackable = remembered(f"attention shapes {case}", _is_answer, lambda: _find(*case[:4]))
    return Shapes(tuple(rows), tuple(keys), is_stackable, kv_heads, group, head_dim)


def _is_answer(answer: Any) -> bool:
    """[row counts, key counts, is_stackable], as _find says them: a file is no more than a claim."""
    match answer:
        case [[int(), *_] as rows, [*keys, last], bool()]:
            return set(rows) <= set(_ROWS) and set(keys) <= set(KEY_COUNTS) and last == KV_BLOCK
    return False


def _find(kv_heads: int, group: int, head_dim: int, device: str) -> list[Any]:
    sizes = [size for size in _ROWS if size == 1 or size * group <= QUERY_ROWS]
    draw = torch.Generator().manual_seed(0)
    q_PW = torch.randn(5, group * head_dim, generator=draw).to(device)
    k_KBD, v_KBD = torch.randn(2, kv_heads, KV_BLOCK, head_dim, generator=draw).to(device)

    def both(q_RW: Tensor) -> Tensor:
        q = q_RW.reshape(1, -1, head_dim).repeat(kv_heads, 1, 1)
        scores = torch.bmm(q, k_KBD.transpose(1, 2))
        rows = torch.cat((scores, torch.bmm(scores, v_KBD)), -1)
        return rows.transpose(0, 1).reshape(q_RW.shape[0], -1)

    with torch.no_grad():
        rows = agreeing_sizes(both, q_PW, sizes)
        tests = [_Trial(kv_heads, group, head_dim, size, device) for size in rows]
        keys = [size for size in KEY_COUNTS if all(test.agrees(size, 1) for test in tests)]
        is_stackable = all(
            test.agrees(size, count)
            for number, test in zip(rows, tests, strict=True)
            for size in (*keys, KV_BLOCK)
            for most in (stacked_pieces(kv_heads, head_dim, size, number * group),)
            for count in {min(most, _FEW), most if test is tests[0] else 1}
        )
    return [list(rows), [*keys, KV_BLOCK], is_stackable]


class _Trial:
    """A few sequences, one by one over a whole block: what every other shape must reproduce."""

    def __init__(self, kv_heads: int, group: int, head_dim: int, rows: int, device: str) -> None:
        draw = torch.Generator().manual_seed(1)
        self.q = torch.randn(_FEW, kv_heads, rows * group, head_dim, generator=draw).to(device)
        self.k, self.v = torch.randn(2, _FEW, kv_heads, KV_BLOCK, head_dim, generator=draw).to(device)
        back = torch.tensor([[1 + i + row % 3 for row in range(rows)] for i in range(_FEW)])
        self.back_SR1 = back[..., None].to(device)  # how many of the last keys a row does not see

    def agrees(self, keys: int, sequences: int) -> bool:
        """Whether `sequences` stacked over `keys` keys, of which the last few are hidden, give the same bits."""
        which = [i % _FEW for i in range(sequences)]
        alone = [self._run([i], KV_BLOCK, keys) for i in range(min(sequences, _FEW))]
        together = self._run(which, keys, keys)
        wanted = [torch.cat([alone[i][part] for i in which]) for part in range(3)]
        return all(map(torch.equal, together, wanted))

    def _run(self, which: Sequence[int], size: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
        hidden = torch.arange(size, device=self.q.device) >= keys - self.back_SR1[which]
        k, v = (x[which, :, :size].flatten(0, 1) for x in (self.k, self.v))
        found = partial(self.q[which].flatten(0, 1), k, v, hidden)
        return found.total, found.weight, found.top
