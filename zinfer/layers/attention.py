"""Attention over packed rows.  In: q, k, v of new rows and the KV cache.  Out: [T, H, D] in q's dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from zinfer.kernels.choice import agreeing_sizes, cover, pad_rows
from zinfer.layers.packed import KvView, Packed
from zinfer.spec.attention_cost import KV_BLOCK, QUERY_ROWS
from zinfer.spec.records import ModelSpec

_LOWEST = -1e30  # "nothing seen yet" in the running maximum; finite, so that differences are numbers
# Exponents stop here: their exponentials are nothing beside 1, and below it the library's exp is 40 times slower.
_FLOOR = -87.0


def attend(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    layer: int,
    batch: Packed,
    kv: KvView,
    *,
    scale: float,
    window: int | None,
    exact: bool,
) -> Tensor:
    """Causal attention of each sequence's new rows over its past and its new rows; H heads share K key heads.

    Stages the new rows in `kv`.  With a `window` w a row at position p sees positions above p - w.  Where
    `batch.ancestors` holds a table it replaces the causal rule among new rows.  With `exact` a row's bits depend
    on the row and on the keys it sees (at their places in the sequence), not on the batch or on where the
    sequence was cut into passes.
    """
    kv.stage(layer, k_TKD, v_TKD)
    out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
    for s in range(batch.num_sequences):
        rows = slice(batch.bounds[s], batch.bounds[s + 1])
        q, k, v = q_THD[rows], k_TKD[rows], v_TKD[rows]
        ancestors = None if batch.ancestors is None else batch.ancestors[s]
        past, num_new = batch.past[s], q.shape[0]
        sees_all = num_new == 1 or (past == 0 and (window is None or window >= num_new))
        if not exact and ancestors is None and sees_all:
            out_THD[rows] = _fused(q, k, v, kv, layer, s, past, scale, window)
        else:
            seen = _Visibility(past, num_new, window, ancestors, batch.positions_T[rows])
            _blockwise(q, _Blocks(kv.past(layer, s), past, k, v), seen, scale, out_THD[rows])
    return out_THD


@dataclass(frozen=True, slots=True)
class _Visibility:
    """Which keys the new rows of one sequence see.  Keys are counted from the sequence's first token.

    Committed tokens have positions 0 .. past - 1; without a table of ancestors new row i has position past + i.
    """

    past: int
    num_new: int
    window: int | None
    ancestors: Tensor | None
    positions_N: Tensor

    def blocks(self, first_row: int, last_row: int) -> range:
        """The blocks that hold all keys which rows first_row .. last_row can see."""
        oldest, newest = self.past + first_row, self.past + last_row
        if self.ancestors is not None:
            oldest, newest = self.past, self.past + self.num_new - 1
        start = 0 if self.window is None else max(0, oldest - self.window + 1)
        return range(start // KV_BLOCK, newest // KV_BLOCK + 1)

    def mask(self, first_row: int, last_row: int, block: int) -> Tensor | None:
        """Bool [rows, KV_BLOCK], True where a row sees a key of the block; None when all see all."""
        start, stop = block * KV_BLOCK, (block + 1) * KV_BLOCK
        if self.ancestors is None:
            reaches = self.window is None or start > self.past + last_row - self.window
            if stop <= self.past + first_row + 1 and reaches:
                return None
        device = self.positions_N.device
        keys = torch.arange(start, stop, device=device)
        rows = torch.arange(first_row, last_row + 1, device=device)[:, None]
        new = keys - self.past
        new_or_edge = new.clamp(0, self.num_new - 1)
        if self.ancestors is None:
            seen = new <= rows
        else:
            table = self.ancestors[first_row : last_row + 1][:, new_or_edge]
            seen = (new < 0) | ((new < self.num_new) & table)
        if self.window is not None:
            key_positions = torch.where(new < 0, keys, self.positions_N[new_or_edge])
            seen = seen & (key_positions > self.positions_N[rows] - self.window)
        return seen


def _blockwise(q_NHD: Tensor, blocks: _Blocks, seen: _Visibility, scale: float, out_NHD: Tensor) -> None:
    """Online softmax over blocks of keys, in fp32 (Milakov & Gimelshein 2018; Dao et al. 2022, algorithm 1).

    The shape of every product is fixed (KV_BLOCK keys, a row count of one agreeing group) and blocks that a row
    does not see change none of its bits: that is what makes rows independent of how they are fed.  Writes each
    piece of the output to its place in `out_NHD`; what is alive here is what `attention_workspace_bytes` counts.
    """
    num_new, num_heads, head_dim = q_NHD.shape
    kv_heads = blocks.kv_heads
    group = num_heads // kv_heads
    sizes = query_sizes(kv_heads, group, head_dim, q_NHD.device.type, torch.get_num_threads())
    for start, stop, size in cover(num_new, sizes):
        out_NHD[start:stop] = _piece(q_NHD, blocks, seen, scale, start, stop, size)


def _piece(
    q_NHD: Tensor, blocks: _Blocks, seen: _Visibility, scale: float, start: int, stop: int, size: int
) -> Tensor:
    """Rows start:stop of the output, fp32 [n, H, D], computed as `size` rows."""
    num_heads, head_dim = q_NHD.shape[1:]
    kv_heads, group = blocks.kv_heads, num_heads // blocks.kv_heads
    q = _grouped(q_NHD[start:stop], kv_heads, size, scale)
    top = q.new_full((kv_heads, size * group, 1), _LOWEST)
    weight, total = torch.zeros_like(top), torch.zeros_like(q)
    for block in seen.blocks(start, stop - 1):
        k, v = blocks[block]
        scores = torch.bmm(q, k.transpose(1, 2))
        del k
        mask = seen.mask(start, stop - 1, block)
        hidden = None if mask is None else pad_rows(~mask, size).repeat_interleave(group, 0)
        if hidden is not None:
            scores.masked_fill_(hidden, -torch.inf)
        # The shift cancels in total / weight, so no gradient need pass through it.
        new_top = torch.maximum(top, scores.detach().amax(-1, keepdim=True))
        fade = (top - new_top).clamp_(min=_FLOOR).exp_()
        scores.sub_(new_top).clamp_(min=_FLOOR).exp_()
        if hidden is not None and scores.requires_grad:
            scores = scores.masked_fill(hidden, 0)  # the gradient needs what exp_ gave
        elif hidden is not None:
            scores.masked_fill_(hidden, 0)
        weight.mul_(fade).add_(scores.sum(-1, keepdim=True))
        total.mul_(fade).add_(torch.bmm(scores, v))
        del v, scores, mask, hidden
        top = new_top
    out_RKGD = (total / weight).view(kv_heads, size, group, head_dim).transpose(0, 1)
    return out_RKGD[: stop - start].reshape(-1, num_heads, head_dim)


def _grouped(q_nHD: Tensor, kv_heads: int, size: int, scale: float) -> Tensor:
    """Scaled fp32 queries [K, size * G, D]: a group's heads stand as rows of their key head, zeros behind the last."""
    num_heads, head_dim = q_nHD.shape[1:]
    q_RKGD = pad_rows(q_nHD.flatten(1), size).view(size, kv_heads, num_heads // kv_heads, head_dim)
    return (q_RKGD.transpose(0, 1).float() * scale).reshape(kv_heads, -1, head_dim)


class _Blocks:
    """Past and new keys and values of a sequence, cut at multiples of KV_BLOCK counted from its first token.

    One block at a time is gathered, joined where past and new rows meet in it, padded and widened.
    """

    def __init__(self, past: Sequence[tuple[Tensor, Tensor]], num_past: int, k: Tensor, v: Tensor) -> None:
        self.kv_heads = k.shape[1]
        self._past, self._num_past, self._new = past, num_past, (k, v)

    def __getitem__(self, block: int) -> tuple[Tensor, Tensor]:
        """fp32 keys and values [K, KV_BLOCK, D]."""
        start = block * KV_BLOCK
        new = slice(max(start - self._num_past, 0), max(start + KV_BLOCK - self._num_past, 0))
        old = self._past[block] if start < self._num_past else None
        k_nKD, v_nKD = (rows_NKD[new] for rows_NKD in self._new)
        if old is None:
            return _padded(k_nKD), _padded(v_nKD)
        if not k_nKD.shape[0]:
            return _padded(old[0]), _padded(old[1])
        return _padded(torch.cat((old[0], k_nKD))), _padded(torch.cat((old[1], v_nKD)))


def _padded(rows_nKD: Tensor) -> Tensor:
    """[n, K, D] -> fp32 [K, KV_BLOCK, D], zeros behind the last row: masked keys must be finite."""
    padded = pad_rows(rows_nKD.transpose(0, 1), KV_BLOCK)
    return padded.to(torch.float32, memory_format=torch.contiguous_format).contiguous()


def _fused(
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    kv: KvView,
    layer: int,
    sequence: int,
    past: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """torch's own attention, where no mask is needed: a whole prompt at once, or one row over its past."""
    num_new, num_heads, head_dim = q_NHD.shape
    kv_heads = k_NKD.shape[1]
    if num_new > 1 or past == 0:
        q, k, v = (x.transpose(0, 1)[None] for x in (q_NHD, k_NKD, v_NKD))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=num_new > 1, scale=scale, enable_gqa=num_heads != kv_heads
        )
        return out[0].transpose(0, 1)
    start = 0 if window is None else max(0, past + 1 - window)
    k, v = (x.transpose(0, 1)[None] for x in kv.span(layer, sequence, start))
    # The heads of a group stand as query rows of their key head, so that nothing is repeated.
    q = q_NHD.reshape(1, kv_heads, num_heads // kv_heads, head_dim)
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.reshape(1, num_heads, head_dim)


def prepare_attention(spec: ModelSpec, device: str) -> None:
    """Choose how many rows share a product now, before the weights take the memory that the test needs."""
    kv_heads = spec.num_kv_heads
    query_sizes(kv_heads, spec.num_heads // kv_heads, spec.head_dim, device, torch.get_num_threads())


@cache
def query_sizes(kv_heads: int, group: int, head_dim: int, device: str, num_threads: int) -> tuple[int, ...]:
    """How many new rows may share a product: a self-test of both products of a block, once per shape.

    `num_threads` is the number in force: libraries share the work among threads in ways that differ.
    """
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128) if size == 1 or size * group <= QUERY_ROWS]
    draw = torch.Generator().manual_seed(0)
    q_PW = torch.randn(5, group * head_dim, generator=draw).to(device)
    k_KBD, v_KBD = torch.randn(2, kv_heads, KV_BLOCK, head_dim, generator=draw).to(device)

    def both(q_RW: Tensor) -> Tensor:
        q = q_RW.reshape(1, -1, head_dim).repeat(kv_heads, 1, 1)
        scores = torch.bmm(q, k_KBD.transpose(1, 2))
        rows = torch.cat((scores, torch.bmm(scores, v_KBD)), -1)
        return rows.transpose(0, 1).reshape(q_RW.shape[0], -1)

    with torch.no_grad():
        return agreeing_sizes(both, q_PW, sizes)
