"""The non-linear part of an MLP.  In: projected rows [T, F].  Out: rows [T, F] in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from zinfer.kernels.native.calls import NUMBERS
from zinfer.kernels.row_kernels import device_kernels, host_kernels
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

    With `exact` an element's bits do not depend on where it lies among the others.  Where torch computes on a CPU,
    it gets pieces that are cut into whole shares, so that every element is computed by the same code.
    """
    if compiled := host_kernels(x):
        return compiled.activated(x, table(kind))
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
    return gate if _fused(kind, gate) else activate(gate, kind, exact=exact)


def close_gate(opened: Tensor, up: Tensor, kind: str) -> Tensor:
    """activation(gate) * up."""
    fused = _fused(kind, opened)
    return fused(opened, up) if fused else opened * up


def _fused(kind: str, gate: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Both steps in one: compiled kernels know every gate, a device's know silu."""
    if kind == "silu" and (fused := device_kernels(gate)):
        return fused.gated
    compiled = host_kernels(gate)
    return partial(compiled.gated, table=table(kind)) if compiled else None


@cache
def table(kind: str) -> Tensor | None:
    """What becomes of each bfloat16 number, by its bits, [65536]; None for ReLU, which is faster without.

    Made by torch's code once per process, whoever watches or records what a pass does.
    """
    if kind == "relu":
        return None
    with _disable_current_modes(), torch.no_grad():
        numbers = torch.arange(NUMBERS, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        return ACTIVATIONS[kind](numbers)


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
