"""Quantised products on a device.  In: a few rows and a QuantWeight.  Out: rows; or the weight in a slot.

The layout is the store's own: nothing is repacked.  The twins are `zinfer.kernels.panels.dequantise` and the slot of
`zinfer.kernels.quant`.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from zinfer.kernels.panels import QuantWeight
from zinfer.kernels.served import launching, num_cores, operand, power
from zinfer.spec.quant import GROUP

MOST_ROWS = 16  # of one tile; more rows go through the slot
_MIN_GROUPS = 4  # that a split multiplies
_BLOCK = 1024
# A program waits for some 2 KiB at a time.  With 224 of them on 132 cores an H200 read int4 at 0.4 TB/s, int8 at 0.65:
# memory of 4 TB/s and a microsecond's distance wants 4 MB on the way.
_PROGRAMS_PER_CORE = 16


def fused(x_TI: Tensor, weight: QuantWeight, *, splits: int | None = None) -> Tensor:
    """x [T, I], T at most MOST_ROWS, times the packed weight: [T, O] in x's dtype (bf16 or fp16).

    A row's bits depend on the row and the shapes alone.
    """
    from zinfer.kernels.jit.quant import add_splits, multiply_panels

    panels, inputs, half = weight.nibbles.shape
    num_rows, groups, width = x_TI.shape[0], inputs // GROUP, panels * 2 * half
    assert num_rows <= MOST_ROWS, "more rows are multiplied from the slot"
    share = -(-groups // (splits or num_splits(panels, groups, x_TI.device)))
    count = -(-groups // share)
    sums = torch.empty((count, num_rows, width), dtype=torch.float32, device=x_TI.device)
    with launching(x_TI):
        multiply_panels[(panels, count)](
            x_TI,
            weight.nibbles,
            _low(weight),
            weight.scales,
            sums,
            num_rows,
            groups,
            width,
            share,
            GROUP=GROUP,
            HALF=half,
            BLOCK_M=MOST_ROWS,
            OPERAND=operand(x_TI.dtype),
            IS_INT8=weight.low is not None,
        )
    y_TO = x_TI.new_empty(num_rows, weight.outputs)
    block = min(power(weight.outputs), _BLOCK)
    with launching(x_TI):
        add_splits[(num_rows, -(-weight.outputs // block))](
            sums, y_TO, count, weight.outputs, width, num_rows, BLOCK=block
        )
    return y_TO


def fill_slot(weight: QuantWeight, slot: Tensor) -> None:
    """Unpack into `slot` [I + I / GROUP, P * panel], bit for bit as the torch code in `zinfer.kernels.quant` does."""
    from zinfer.kernels.jit.quant import unpack_panels

    panels, inputs, half = weight.nibbles.shape
    with launching(slot):
        unpack_panels[(panels, inputs // GROUP)](
            weight.nibbles,
            _low(weight),
            weight.scales,
            slot,
            inputs // GROUP,
            panels * 2 * half,
            GROUP=GROUP,
            HALF=half,
            IS_INT8=weight.low is not None,
        )


@cache
def num_splits(panels: int, groups: int, device: torch.device) -> int:
    """Programs that share a panel's inputs: enough to keep the memory busy, none with too little to do."""
    return max(min(_PROGRAMS_PER_CORE * num_cores(device) // panels, groups // _MIN_GROUPS), 1)


def _low(weight: QuantWeight) -> Tensor:
    """An int4 weight has no low nibbles, and its kernel reads none."""
    return weight.nibbles if weight.low is None else weight.low
