"""Triton: attention of one row per sequence over pages in place.  Launched by `zinfer.kernels.paged`.

Online softmax over blocks of keys (Dao et al. 2022), the keys of a sequence shared out among splits that are merged
afterwards (flash decoding, Dao et al. 2023).  The query heads of one key-value head stand as the rows of one tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A score that nobody sees: finite, so that differences are numbers.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def attend_pages(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    k_scales: tl.tensor,
    v_scales: tl.tensor,
    table: tl.tensor,
    lengths: tl.tensor,
    total: tl.tensor,
    weight: tl.tensor,
    top: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    window: tl.tensor,
    table_stride: tl.tensor,
    num_splits: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OPERAND: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_WHOLE: tl.constexpr,
) -> None:
    """Program (s, kv head, split); planes [slots, K, D].  Sums [S, H, splits(, D)] are fp32, relative to exp(top);
    with IS_WHOLE `total` is the result.  Operands of products are rounded to q's dtype and taken as OPERAND."""
    s, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group: tl.constexpr = HEADS // KV_HEADS
    g, d, n = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    is_row, is_dim = g < group, d < DIM
    heads = s * HEADS + head * group + g
    q_GD = tl.load(q + heads[:, None] * DIM + d[None, :], mask=is_row[:, None] & is_dim[None, :], other=0.0)
    dtype = q_GD.dtype
    q_GD = q_GD.to(OPERAND)
    length = tl.load(lengths + s)
    first = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    first_block = first // BLOCK_N
    num_blocks = tl.cdiv(length, BLOCK_N) - first_block
    share = tl.cdiv(num_blocks, num_splits)
    begin = first_block + split * share
    end = tl.minimum(begin + share, first_block + num_blocks)
    top_G = tl.full((BLOCK_G,), LOWEST, tl.float32)
    weight_G = tl.zeros((BLOCK_G,), tl.float32)
    total_GD = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for block in range(begin, end):
        at = block * BLOCK_N + n
        is_key = (at < length) & (at >= first)
        page = tl.load(table + s * table_stride + at // PAGE, mask=is_key, other=0)
        row = (page.to(tl.int64) * PAGE + at % PAGE) * KV_HEADS + head
        place = row[:, None] * DIM + d[None, :]
        is_read = is_key[:, None] & is_dim[None, :]
        k_nD = tl.load(k + place, mask=is_read, other=0.0).to(OPERAND)
        scores = tl.dot(q_GD, tl.trans(k_nD), input_precision="ieee") * scale
        if HAS_SCALES:
            scores *= tl.load(k_scales + row, mask=is_key, other=0.0)[None, :]
        if HAS_CAP:
            scores = cap * (2 * tl.sigmoid(2 * scores / cap) - 1)
        scores = tl.where(is_key[None, :], scores, LOWEST)
        new_top = tl.maximum(top_G, tl.max(scores, 1))
        fade = tl.exp(top_G - new_top)
        p_Gn = tl.where(is_key[None, :], tl.exp(scores - new_top[:, None]), 0.0)
        weight_G = weight_G * fade + tl.sum(p_Gn, 1)
        if HAS_SCALES:
            p_Gn *= tl.load(v_scales + row, mask=is_key, other=0.0)[None, :]
        v_nD = tl.load(v + place, mask=is_read, other=0.0).to(OPERAND)
        total_GD = total_GD * fade[:, None] + tl.dot(p_Gn.to(dtype).to(OPERAND), v_nD, input_precision="ieee")
        top_G = new_top
    is_out = is_row[:, None] & is_dim[None, :]
    if IS_WHOLE:
        whole_GD = (total_GD / weight_G[:, None]).to(total.dtype.element_ty)
        tl.store(total + heads[:, None] * DIM + d[None, :], whole_GD, mask=is_out)
    else:
        part = heads * num_splits + split
        tl.store(total + part[:, None] * DIM + d[None, :], total_GD, mask=is_out)
        tl.store(weight + part, weight_G, mask=is_row)
        tl.store(top + part, top_G, mask=is_row)


@triton.jit
def merge_splits(
    total: tl.tensor,
    weight: tl.tensor,
    top: tl.tensor,
    out: tl.tensor,
    num_splits: tl.tensor,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    """Program (s * H + head): the splits of one row, put together; `out` [S, H, D]."""
    row = tl.program_id(0).to(tl.int64)
    split, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    is_split, is_dim = split < num_splits, d < DIM
    part = row * num_splits + split
    top_s = tl.load(top + part, mask=is_split, other=LOWEST)
    rise_s = tl.where(is_split, tl.exp(top_s - tl.max(top_s, 0)), 0.0)
    weight_s = tl.load(weight + part, mask=is_split, other=0.0)
    is_read = is_split[:, None] & is_dim[None, :]
    total_sD = tl.load(total + part[:, None] * DIM + d[None, :], mask=is_read, other=0.0)
    whole_D = tl.sum(total_sD * rise_s[:, None], 0) / tl.sum(weight_s * rise_s, 0)
    tl.store(out + row * DIM + d, whole_D.to(out.dtype.element_ty), mask=is_dim)
