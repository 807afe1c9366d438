"""Triton: int8 and int4 weights in the panels that a store holds.  Launched by `zinfer.kernels.fused_quant`.

A panel's rows (one input each) lie one after the other, so a tile of inputs is one contiguous run of bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _steps(
    nibbles: tl.tensor, low: tl.tensor, place: tl.tensor, is_upper: tl.constexpr, IS_INT8: tl.constexpr
) -> tl.tensor:
    """Integers of a panel's lower or upper half, less what stands for zero, fp32."""
    shift: tl.constexpr = 4 if is_upper else 0
    steps = ((tl.load(nibbles + place) >> shift) & 15).to(tl.float32) - 8
    if IS_INT8:
        steps = 16 * steps + ((tl.load(low + place) >> shift) & 15).to(tl.float32) - 8
    return steps


@triton.jit
def multiply_panels(
    x: tl.tensor,
    nibbles: tl.tensor,
    low: tl.tensor,
    scales: tl.tensor,
    sums: tl.tensor,
    num_rows: tl.tensor,
    num_groups: tl.tensor,
    width: tl.tensor,
    share: tl.tensor,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    OPERAND: tl.constexpr,
    IS_INT8: tl.constexpr,
) -> None:
    """Program (panel, split): rows of x [T, I] times `share` groups of inputs of one panel; `sums` [splits, T, width].

    The integers are multiplied as they are, exactly; scales and zeros meet the fp32 sums of each group.
    """
    panel, split = tl.program_id(0), tl.program_id(1)
    m, i, j = tl.arange(0, BLOCK_M), tl.arange(0, GROUP), tl.arange(0, HALF)
    is_row = m < num_rows
    inputs = num_groups * GROUP
    zeros: tl.constexpr = 17 if IS_INT8 else 1
    lower_MJ = tl.zeros((BLOCK_M, HALF), tl.float32)
    upper_MJ = tl.zeros((BLOCK_M, HALF), tl.float32)
    for group in range(split * share, tl.minimum((split + 1) * share, num_groups)):
        at = group * GROUP + i
        x_MI = tl.load(x + m[:, None] * inputs + at[None, :], mask=is_row[:, None], other=0.0).to(OPERAND)
        sum_M = tl.sum(x_MI.to(tl.float32), 1)
        place = (panel.to(tl.int64) * inputs + at)[:, None] * HALF + j[None, :]
        pair = (group * width + panel * 2 * HALF + j) * 2
        lower = tl.dot(x_MI, _steps(nibbles, low, place, False, IS_INT8).to(OPERAND), input_precision="ieee")
        lower_MJ += lower * tl.load(scales + pair).to(tl.float32)[None, :]
        lower_MJ += sum_M[:, None] * (zeros * tl.load(scales + pair + 1).to(tl.float32))[None, :]
        pair += 2 * HALF
        upper = tl.dot(x_MI, _steps(nibbles, low, place, True, IS_INT8).to(OPERAND), input_precision="ieee")
        upper_MJ += upper * tl.load(scales + pair).to(tl.float32)[None, :]
        upper_MJ += sum_M[:, None] * (zeros * tl.load(scales + pair + 1).to(tl.float32))[None, :]
    out = (split * num_rows + m)[:, None] * width + panel * 2 * HALF + j[None, :]
    tl.store(sums + out, lower_MJ, mask=is_row[:, None])
    tl.store(sums + out + HALF, upper_MJ, mask=is_row[:, None])


@triton.jit
def add_splits(
    sums: tl.tensor,
    y: tl.tensor,
    num_splits: tl.tensor,
    outputs: tl.tensor,
    width: tl.tensor,
    num_rows: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Program (row, block of outputs): add up the splits, always in the same order; y [T, O]."""
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_out = at < outputs
    found = tl.zeros((BLOCK,), tl.float32)
    for split in range(num_splits):
        found += tl.load(sums + (split * num_rows + row) * width + at, mask=is_out, other=0.0)
    tl.store(y + row * outputs + at, found.to(y.dtype.element_ty), mask=is_out)


@triton.jit
def unpack_panels(
    nibbles: tl.tensor,
    low: tl.tensor,
    scales: tl.tensor,
    slot: tl.tensor,
    num_groups: tl.tensor,
    width: tl.tensor,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    IS_INT8: tl.constexpr,
) -> None:
    """Program (panel, group): weights less their group's zero, [I, width], and below them the zeros [groups, width].

    As `zinfer.kernels.quant` lays its slot out; rounded once, as there.
    """
    panel, group = tl.program_id(0), tl.program_id(1)
    i, j = tl.arange(0, GROUP), tl.arange(0, HALF)
    inputs = num_groups * GROUP
    at = group * GROUP + i
    place = (panel.to(tl.int64) * inputs + at)[:, None] * HALF + j[None, :]
    for upper in tl.static_range(2):
        column = panel * 2 * HALF + upper * HALF + j
        scale = tl.load(scales + (group * width + column) * 2).to(tl.float32)
        zero = tl.load(scales + (group * width + column) * 2 + 1).to(tl.float32)
        steps = _steps(nibbles, low, place, upper == 1, IS_INT8)
        if IS_INT8:  # the slot's integers are less 128, so that they are eight bits
            steps += 8
            zero = 17 * zero - 8 * scale
        target = at.to(tl.int64)[:, None] * width + column[None, :]
        tl.store(slot + target, (steps * scale[None, :]).to(slot.dtype.element_ty))
        tl.store(slot + (inputs + group) * width + column, zero.to(slot.dtype.element_ty))
