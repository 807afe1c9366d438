"""Attention over packed rows.  In: q, k, v of new rows and the KV cache.  Out: [T, H, D] in q's dtype."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from zinfer.kernels.choice import cover, pad_rows
from zinfer.layers.on_device import DeviceWork, device_work, on_device
from zinfer.layers.packed import KvView, Packed
from zinfer.layers.partial import Partial, partial
from zinfer.layers.shapes import Shapes, agreeing_shapes
from zinfer.layers.stacks import Stack, Visibility, decode_stacks, exact_stacks, visibility
from zinfer.layers.tiles import Tiles, attend_tiles, tiles_of
from zinfer.spec.attention_cost import FP32, KV_BLOCK, PROMPT_ROWS, fused_sequences


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
    shapes = _shapes(q_THD, k_TKD.shape[1])
    if torch.is_grad_enabled() and (q_THD.requires_grad or k_TKD.requires_grad or v_TKD.requires_grad):
        return _one_by_one(q_THD, k_TKD, v_TKD, layer, batch, kv, shapes, scale, window, exact)
    work = _worked_out(batch, kv, shapes, window, exact, q_THD)
    if work.tiles is not None:
        near_THD = kv.bring(q_THD)
        return kv.take_back(attend_tiles(near_THD, layer, kv, work.tiles, scale=scale, window=window))
    out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
    for run in work.prompts:
        rows = slice(batch.bounds[run.start], batch.bounds[run.stop])
        out_THD[rows] = _fused(q_THD[rows], k_TKD[rows], v_TKD[rows], scale, len(run))
    on_device(out_THD, q_THD, k_TKD, v_TKD, layer, kv, work.device, scale, window)
    if not (work.decodes or work.blockwise):
        return out_THD
    near_THD = kv.bring(q_THD)
    found_THD = out_THD if near_THD is q_THD else torch.empty_like(near_THD)
    for stack in work.decodes:
        _fused_stack(found_THD, near_THD, layer, kv, stack, scale)
    for stack in work.blockwise:
        _blockwise(found_THD, near_THD, layer, kv, stack, shapes.kv_heads, scale)
    if found_THD is out_THD:
        return out_THD
    found_THD = kv.take_back(found_THD)
    for s in (*chain(*work.prompts), *work.device.prompts):
        rows = slice(batch.bounds[s], batch.bounds[s + 1])
        found_THD[rows] = out_THD[rows]
    return found_THD


@dataclass(frozen=True, slots=True)
class _Work:
    """How the sequences of a batch are attended: whole prompts, neighbours of one length together, single rows over
    their past, what a device has kernels for, all else; or all of them by the host's compiled code."""

    prompts: list[range]
    decodes: list[Stack]
    device: DeviceWork
    blockwise: list[Stack]
    tiles: list[Tiles] | None = None


def prepare(
    batch: Packed, kv: KvView, kv_heads: int, like_THD: Tensor, *, windows: Sequence[int | None], exact: bool
) -> None:
    """Work out now what `attend` would at its first call with each of the windows, for queries like these."""
    for window in windows:
        _worked_out(batch, kv, _shapes(like_THD, kv_heads), window, exact, like_THD)


def _worked_out(
    batch: Packed, kv: KvView, shapes: Shapes, window: int | None, exact: bool, like_THD: Tensor
) -> _Work:
    """Once per pass and window."""
    key = ("attention", kv, window, exact)
    if key not in batch.memo:
        batch.memo[key] = _arrange(batch, kv, shapes, window, exact, like_THD)
    work: _Work = batch.memo[key]
    return work


def _arrange(
    batch: Packed, kv: KvView, shapes: Shapes, window: int | None, exact: bool, like_THD: Tensor
) -> _Work:
    if tiles := tiles_of(batch, kv, like_THD, shapes.kv_heads):
        return _Work([], [], DeviceWork(), [], tiles)
    by_kind: dict[str | None, list[int]] = defaultdict(list)
    device = DeviceWork() if exact else device_work(batch, kv, like_THD, shapes.kv_heads, window)
    for s in range(batch.num_sequences):
        if s not in device.sequences:
            by_kind[None if exact else _fusable(batch, s, window)].append(s)

    def at_most(num_keys: int) -> int:
        return fused_sequences(shapes.kv_heads, shapes.head_dim, num_keys, like_THD.element_size())

    pages = [] if exact or not by_kind[None] else kv.planes(0)
    gathered = pages[0].element_size() + FP32 * (len(pages) > 1) if pages else 0  # int8 is decoded to fp32
    return _Work(
        _runs(batch, by_kind["prompt"]),
        decode_stacks(batch, kv, by_kind["decode"], window, at_most),
        device,
        exact_stacks(batch, kv, by_kind[None], window, shapes, gathered),
    )


def _fusable(batch: Packed, sequence: int, window: int | None) -> str | None:
    """What torch's own attention can do without a mask of ours: a whole prompt, or one row over its past."""
    num_new = batch.bounds[sequence + 1] - batch.bounds[sequence]
    if batch.ancestors is not None and batch.ancestors[sequence] is not None:
        return None
    if batch.past[sequence] == 0 and (window is None or window >= num_new):
        return "prompt"
    return "decode" if num_new == 1 else None


def _runs(batch: Packed, prompts: Sequence[int]) -> list[range]:
    """Neighbours of one length, at most PROMPT_ROWS rows of them: many small calls cost more than their rows."""
    runs: list[range] = []
    for s in prompts:
        num_new = batch.bounds[s + 1] - batch.bounds[s]
        last = runs[-1] if runs else range(0)
        is_alike = last.stop == s and num_new * len(last) == batch.bounds[s] - batch.bounds[last.start]
        if last and is_alike and num_new * (len(last) + 1) <= PROMPT_ROWS:
            runs[-1] = range(last.start, s + 1)
        else:
            runs.append(range(s, s + 1))
    return runs


def _shapes(q_THD: Tensor, kv_heads: int) -> Shapes:
    _, num_heads, head_dim = q_THD.shape
    return agreeing_shapes(
        kv_heads, num_heads // kv_heads, head_dim, q_THD.device.type, torch.get_num_threads()
    )


def _fused(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, scale: float, num_prompts: int = 1) -> Tensor:
    """torch's own attention of whole prompts, all of one length."""
    q, k, v = (x.view(num_prompts, -1, *x.shape[1:]).transpose(1, 2) for x in (q_NHD, k_NKD, v_NKD))
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=q.shape[2] > 1, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).reshape(q_NHD.shape)


def _fused_stack(out_THD: Tensor, q_THD: Tensor, layer: int, kv: KvView, stack: Stack, scale: float) -> None:
    """torch's own attention of one row each of several sequences over their past."""
    (block,) = stack.blocks
    k, v = (x_SnKD.to(q_THD.dtype).transpose(1, 2) for x_SnKD in kv.read(layer, block.place))
    # The heads of a group stand as query rows of their key head, so that nothing is repeated.
    q = q_THD.index_select(0, stack.rows_N).view(stack.num_pieces, k.shape[1], -1, q_THD.shape[2])
    seen = None if block.hidden_SRn is None else ~block.hidden_SRn[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    out_THD.index_copy_(0, stack.target, out.reshape(-1, *q_THD.shape[1:]))


def _blockwise(
    out_THD: Tensor, q_THD: Tensor, layer: int, kv: KvView, stack: Stack, kv_heads: int, scale: float
) -> None:
    """Online softmax over blocks of keys, in fp32, for a stack of pieces.

    The shape of every product is one of an agreeing group and blocks that a row does not see change none of its
    bits: that is what makes rows independent of how they are fed.
    """
    found: Partial | None = None
    q_BQD = _queries(q_THD.index_select(0, stack.rows_N), stack.num_pieces, kv_heads, scale)
    for block in stack.blocks:
        k_BnD, v_BnD = map(_by_head, kv.read(layer, block.place))  # what was gathered is free again
        part = partial(q_BQD, k_BnD, v_BnD, block.hidden_SRn)
        found = part if found is None else found.merge(part)
        del k_BnD, v_BnD, part  # before the next block comes
    assert found is not None, "a row sees at least itself"
    rows_NHD = _rows(found.result(), stack.num_pieces, q_THD)
    out_THD.index_copy_(0, stack.target, rows_NHD if stack.kept is None else rows_NHD[stack.kept])


def _queries(q_NHD: Tensor, num_pieces: int, kv_heads: int, scale: float) -> Tensor:
    """[S * R, H, D] as scaled fp32 [S * K, R * G, D]."""
    head_dim = q_NHD.shape[2]
    q_SRKGD = q_NHD.view(num_pieces, -1, kv_heads, q_NHD.shape[1] // kv_heads, head_dim)
    q_SKRGD = q_SRKGD.transpose(1, 2).float() * scale
    return q_SKRGD.reshape(num_pieces * kv_heads, -1, head_dim)


def _rows(x_BQD: Tensor, num_pieces: int, like_THD: Tensor) -> Tensor:
    """The way back from `_queries`, in the dtype of `like_THD`: [S * R, H, D]."""
    num_heads, head_dim = like_THD.shape[1:]
    kv_heads = x_BQD.shape[0] // num_pieces
    x_SKRGD = x_BQD.view(num_pieces, kv_heads, -1, num_heads // kv_heads, head_dim)
    return x_SKRGD.transpose(1, 2).to(like_THD.dtype).reshape(-1, num_heads, head_dim)


def _by_head(x_SnKD: Tensor) -> Tensor:
    """[S, n, K, D] as contiguous fp32 [S * K, n, D]."""
    x_SKnD = x_SnKD.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return x_SKnD.contiguous().flatten(0, 1)


def _one_by_one(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    layer: int,
    batch: Packed,
    kv: KvView,
    shapes: Shapes,
    scale: float,
    window: int | None,
    exact: bool,
) -> Tensor:
    """The plain form: sequence by sequence, over whole blocks; gradients flow through the new keys and values."""
    outputs = []
    for s in range(batch.num_sequences):
        rows = slice(batch.bounds[s], batch.bounds[s + 1])
        q, k, v = q_THD[rows], k_TKD[rows], v_TKD[rows]
        if not exact and _fusable(batch, s, window) == "prompt":
            outputs.append(_fused(q, k, v, scale))
        else:
            blocks = _blocks(kv.past(layer, s), k, v)
            outputs += _pieces(q, blocks, visibility(batch, s, window), shapes, scale)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _pieces(
    q_NHD: Tensor, blocks: Sequence[tuple[Tensor, Tensor]], seen: Visibility, shapes: Shapes, scale: float
) -> list[Tensor]:
    """One sequence's output in pieces [n, H, D]."""
    pieces = []
    for start, stop, size in cover(seen.num_new, shapes.rows):
        q_RHD = pad_rows(q_NHD[start:stop].flatten(1), size).view(size, *q_NHD.shape[1:])
        q_KQD = _queries(q_RHD, 1, shapes.kv_heads, scale)
        rows_R = torch.arange(start, start + size, device=q_NHD.device).clamp(max=stop - 1)
        found: Partial | None = None
        for block in seen.blocks(start, stop - 1):
            k, v = (
                _by_head(pad_rows(x.transpose(0, 1), KV_BLOCK).transpose(0, 1)[None]) for x in blocks[block]
            )
            keys = range(block * KV_BLOCK, (block + 1) * KV_BLOCK)
            hidden = None if seen.sees_all(start, stop - 1, keys) else seen.hidden(rows_R, keys)[None]
            part = partial(q_KQD, k, v, hidden)
            found = part if found is None else found.merge(part)
        assert found is not None, "a row sees at least itself"
        pieces.append(_rows(found.result(), 1, q_NHD)[: stop - start])
    return pieces


def _blocks(past: Sequence[tuple[Tensor, Tensor]], k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Past and new keys and values, cut at multiples of KV_BLOCK counted from the sequence's first token."""
    blocks, used = list(past), 0
    if blocks and blocks[-1][0].shape[0] < KV_BLOCK:
        last_k, last_v = blocks[-1]
        used = KV_BLOCK - last_k.shape[0]
        blocks[-1] = (torch.cat((last_k, k[:used])), torch.cat((last_v, v[:used])))
    starts = range(used, k.shape[0], KV_BLOCK)
    return blocks + [(k[at : at + KV_BLOCK], v[at : at + KV_BLOCK]) for at in starts]
