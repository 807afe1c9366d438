"""What a pass does to its rows between products, one launch each.  In: rows.  Out: rows, in the same dtype.

In decode every launch costs about as much as the work in it, so these replace what torch does in two to eight.  The
twins are `layers.norm.rms_norm`, `layers.rotary.rotate` and `layers.mlp.activate` times up; a row's bits depend on the
row alone.  Forward only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zinfer.kernels.served import launching, power

_BLOCK = 1024
_BLOCK_HEADS = 8
_BLOCK_OUTPUTS = 8
_BLOCK_INPUTS = 512


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension."""
    from zinfer.kernels.jit.rows import norm_rows

    x = x.contiguous()
    y, width = torch.empty_like(x), x.shape[-1]
    with launching(x):
        norm_rows[(x.numel() // width,)](x, weight, y, eps, width, BLOCK=power(width))
    return y


def rotate(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, cos and sin [T, rotary_dim / 2]; heads and rows may be views with strides."""
    from zinfer.kernels.jit.rows import rotate_rows

    if x_THD.stride(2) != 1:
        x_THD = x_THD.contiguous()
    num_rows, num_heads, dim = x_THD.shape
    y_THD = torch.empty(x_THD.shape, dtype=x_THD.dtype, device=x_THD.device)
    block = min(power(num_heads), _BLOCK_HEADS)
    with launching(x_THD):
        rotate_rows[(num_rows, -(-num_heads // block))](
            x_THD,
            cos.contiguous(),
            sin.contiguous(),
            y_THD,
            x_THD.stride(0),
            x_THD.stride(1),
            num_heads,
            DIM=dim,
            HALF=cos.shape[1],
            BLOCK_H=block,
            BLOCK_D=power(dim),
        )
    return y_THD


def gated(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """silu(gate) * up; both may be columns of a wider matrix."""
    from zinfer.kernels.jit.rows import gate_rows

    num_rows, width = gate_TF.shape
    y_TF = torch.empty(gate_TF.shape, dtype=gate_TF.dtype, device=gate_TF.device)
    block = min(power(width), _BLOCK)
    with launching(gate_TF):
        gate_rows[(num_rows, -(-width // block))](
            gate_TF, up_TF, y_TF, gate_TF.stride(0), up_TF.stride(0), width, BLOCK=block
        )
    return y_TF


def one_row(x_1I: Tensor, weight_OI: Tensor, bias: Tensor | None) -> Tensor:
    """A product of one row, [1, O]: a candidate beside torch's own, for weights that are not transposed."""
    from zinfer.kernels.jit.rows import multiply_row

    outputs, inputs = weight_OI.shape
    y_1O = x_1I.new_empty(1, outputs)
    with launching(x_1I):
        multiply_row[(-(-outputs // _BLOCK_OUTPUTS),)](
            x_1I.contiguous(),
            weight_OI,
            y_1O,
            outputs,
            inputs,
            BLOCK_O=_BLOCK_OUTPUTS,
            BLOCK_I=min(power(inputs), _BLOCK_INPUTS),
        )
    return y_1O if bias is None else y_1O + bias
