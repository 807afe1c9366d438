"""Normalisation of rows.  In: [T, M] and the norm's weights.  Out: [T, M] in the same dtype, computed in fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zinfer.kernels.row_kernels import host_kernels, row_kernels


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467).

    Rounds to x's dtype before the weight is applied, as the published Llama does.
    """
    if fused := row_kernels(x, weight):
        return fused.norm(x, weight, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean(x)) / std(x) * weight + bias over the last dimension (Ba et al. 2016, arXiv 1607.06450)."""
    if compiled := host_kernels(x, weight, bias):
        return compiled.layer_norm(x, weight, bias, eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
