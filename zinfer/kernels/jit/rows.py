"""Triton: what a decode pass does to its rows between products, one launch each.  Launched by `zinfer.kernels.rows`.

Each rounds where its twin in `zinfer.layers` rounds: after every step that torch would write to memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_rows(
    x: tl.tensor, weight: tl.tensor, y: tl.tensor, eps: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Program (row): x / rms(x) * weight over rows of `width` elements."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    is_in = at < width
    wide = tl.load(x + row * width + at, mask=is_in, other=0.0).to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    rounded = wide.to(y.dtype.element_ty).to(tl.float32)
    found = rounded * tl.load(weight + at, mask=is_in, other=0.0).to(tl.float32)
    tl.store(y + row * width + at, found.to(y.dtype.element_ty), mask=is_in)


@triton.jit
def rotate_rows(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    y: tl.tensor,
    row_stride: tl.tensor,
    head_stride: tl.tensor,
    num_heads: tl.tensor,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Program (row, block of heads): pairs (i, i + HALF) by angles, cos and sin [T, HALF]; the rest passes."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    is_head, is_dim = (head < num_heads)[:, None], (d < DIM)[None, :]
    is_left, is_turned = d < HALF, d < 2 * HALF
    angle = row * HALF + tl.where(is_left, d, d - HALF)
    other = tl.where(is_left, d + HALF, d - HALF)
    source = x + row * row_stride + head[:, None] * head_stride
    own_HD = tl.load(source + d[None, :], mask=is_head & is_dim, other=0.0).to(tl.float32)
    other_HD = tl.load(source + other[None, :], mask=is_head & is_turned[None, :], other=0.0).to(tl.float32)
    cos_D = tl.load(cos + angle, mask=is_turned, other=1.0).to(tl.float32)
    sin_D = tl.load(sin + angle, mask=is_turned, other=0.0).to(tl.float32)
    dtype = y.dtype.element_ty
    along = (own_HD * cos_D[None, :]).to(dtype).to(tl.float32)
    across = (other_HD * sin_D[None, :]).to(dtype).to(tl.float32)
    turned = tl.where(is_left[None, :], along - across, along + across)
    target = y + (row * num_heads + head[:, None]) * DIM + d[None, :]
    tl.store(target, tl.where(is_turned[None, :], turned, own_HD).to(dtype), mask=is_head & is_dim)


@triton.jit
def gate_rows(
    gate: tl.tensor,
    up: tl.tensor,
    y: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Program (row, block of columns): silu(gate) * up."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in = at < width
    gate_N = tl.load(gate + row * gate_stride + at, mask=is_in, other=0.0).to(tl.float32)
    up_N = tl.load(up + row * up_stride + at, mask=is_in, other=0.0).to(tl.float32)
    active = (gate_N / (1 + tl.exp(-gate_N))).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * width + at, (active * up_N).to(y.dtype.element_ty), mask=is_in)


@triton.jit
def multiply_row(
    x: tl.tensor,
    weight: tl.tensor,
    y: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
) -> None:
    """Program (block of outputs): one row of x [1, I] times weight [O, I]."""
    o, i = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_I)
    is_out = o < outputs
    sums = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for start in range(0, inputs, BLOCK_I):
        is_in = start + i < inputs
        x_I = tl.load(x + start + i, mask=is_in, other=0.0).to(tl.float32)
        place = o.to(tl.int64)[:, None] * inputs + start + i[None, :]
        part = tl.load(weight + place, mask=is_out[:, None] & is_in[None, :], other=0.0)
        sums += part.to(tl.float32) * x_I[None, :]
    tl.store(y + o, tl.sum(sums, 1).to(y.dtype.element_ty), mask=is_out)
