"""The non-linear part of an MLP.  In: projected rows [T, F].  Out: rows [T, F] in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from zinfer.kernels.row_kernels import RowKernels, row_kernels
from zinfer.spec.cost import ACTIVATION_PIECE

# On the CPU torch cuts elementwise work evenly among its threads, at least SHARE elements to each, and computes what
# is left at the end of a share, less than LANES elements, by other code that rounds differently.
SHARE = 32_768
LANES = 128


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
}


def activate(x: Tensor, kind: str, *, exact: bool) -> Tensor:
    """Apply the activation that ModelSpec names.

    With `exact` an element's bits do not depend on where it lies among the others: the CPU gets pieces that are
    cut into whole shares, so that every element is computed by the same code.
    """
    function = ACTIVATIONS[kind]
    if not exact or kind == "relu" or x.device.type != "cpu":
        return function(x)
    flat = x.reshape(-1)
    pieces = list(whole_pieces(flat.numel(), torch.get_num_threads()))
    if len(pieces) == 1 and flat.numel() % LANES == 0:
        return function(flat).view(x.shape)
    result = torch.empty_like(flat)
    for start, stop in pieces:
        piece = flat[start:stop]
        missing = (start - stop) % LANES
        padded = F.pad(piece, (0, missing)) if missing else piece
        result[start:stop] = function(padded)[: stop - start]
    return result.view(x.shape)


def open_gate(gate: Tensor, kind: str, *, exact: bool) -> Tensor:
    """What `close_gate` wants kept of a gate [T, F] until its rows `up` are there: activated, or as it is."""
    return gate if _fused(gate, kind) else activate(gate, kind, exact=exact)


def close_gate(opened: Tensor, up: Tensor, kind: str) -> Tensor:
    """activation(gate) * up."""
    fused = _fused(opened, kind)
    return fused.gated(opened, up) if fused else opened * up


def _fused(gate: Tensor, kind: str) -> RowKernels | None:
    return row_kernels(gate) if kind == "silu" else None


def whole_pieces(count: int, num_threads: int) -> Iterator[tuple[int, int]]:
    """Cut [0, count) so that each piece is a multiple of LANES per thread, or at most one share: one thread's work."""
    grain = num_threads * LANES
    most = max(ACTIVATION_PIECE, num_threads * SHARE) // grain * grain
    start = 0
    while start < count:
        left = count - start
        size = min(most, left // grain * grain) if left >= num_threads * SHARE else min(SHARE, left)
        yield start, start + size
        start += size
