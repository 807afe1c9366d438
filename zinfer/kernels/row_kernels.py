"""Who does what lies between products.  In: tensors.  Out: the kernels that serve them, or none.

On a device they are Triton's (`zinfer.kernels.rows`), on the host compiled C (`zinfer.kernels.native`), with one
interface; where neither serves, layers have torch code, which is the twin of both.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from zinfer.kernels import rows, served
from zinfer.kernels.native.calls import kernels


class RowKernels(Protocol):
    """Each replaces what torch does in two to eight launches; a row's bits depend on the row alone."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm over the last dimension."""

    def rotate(self, x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary positions, cos and sin [T, rotary_dim / 2]."""

    def gated(self, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        """silu(gate) * up."""


def row_kernels(*tensors: Tensor) -> RowKernels | None:
    """The kernels for these tensors; None where there are none, or a gradient is wanted."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return None
    device = tensors[0].device.type
    if served.serves(device):
        return rows
    if device == "cpu" and all(x.dtype == torch.bfloat16 for x in tensors):
        return kernels()
    return None
