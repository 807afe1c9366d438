"""Who does what lies between products.  In: tensors.  Out: the kernels that serve them, or none.

On a device they are Triton's (`zinfer.kernels.rows`), on the host compiled C (`zinfer.kernels.native`), with one
interface; where neither serves, layers have torch code, which is the twin of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from zinfer.kernels import rows, served
from zinfer.kernels.native.calls import Kernels, kernels


class RowKernels(Protocol):
    """Each replaces what torch does in two to eight launches; a row's bits depend on the row alone."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm over the last dimension."""

    def rotate(self, x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary positions, cos and sin [T, rotary_dim / 2]."""


class DeviceKernels(RowKernels, Protocol):
    """What a device's know besides."""

    def gated(self, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        """silu(gate) * up."""


def row_kernels(*tensors: Tensor) -> RowKernels | None:
    """The kernels for these tensors; None where there are none, or a gradient is wanted."""
    return device_kernels(*tensors) or host_kernels(*tensors)


def device_kernels(*tensors: Tensor) -> DeviceKernels | None:
    """Triton's; None as above."""
    return rows if served.serves(tensors[0].device.type) and not wants_gradient(tensors) else None


def host_kernels(*tensors: Tensor | None) -> Kernels | None:
    """The compiled ones, which know more: layer norms, and whatever activation a family has; None as above."""
    given = [x for x in tensors if x is not None]
    if any(x.dtype != torch.bfloat16 or x.device.type != "cpu" for x in given) or wants_gradient(given):
        return None
    return kernels()


def wants_gradient(tensors: Sequence[Tensor | None]) -> bool:
    """Whether torch must see what is done with these: no kernel of ours has a way back."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
