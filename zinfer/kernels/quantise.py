"""Round a matrix to int8 or int4.  In: published bytes of one op's matrix.  Out: the bytes that a store holds, and how
far they are from the published ones.

Round to nearest, each group of GROUP weights with the scale and zero of least squared error among a few narrower
ranges (what lies beyond is clipped) and a least-squares fit to the numbers that were then chosen; no data is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from zinfer.chunks.encode import Encoded, Misfit
from zinfer.kernels.panels import QuantWeight, dequantise, pack_nibbles, unpack_nibbles
from zinfer.spec.quant import GROUP, PANELS

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "U8": torch.uint8}
_PIECE_NUMEL = 2**21  # of the matrix at once: what a search holds beside the result is a few times its fp32
_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class _Steps:
    """Of a format: the largest integer, the one that stands for the zero, how often the zero counts, ranges tried."""

    top: int
    middle: int
    zeros: int
    ranges: tuple[float, ...]


_STEPS = {
    "int8": _Steps(255, 136, 17, (1.0,)),
    "int4": _Steps(15, 8, 1, (1.0, 0.95, 0.9, 0.85, 0.8)),
}


class Quantiser:
    """The `Encoder` of one format and layout."""

    def __init__(self, weights: str, layout: str) -> None:
        self.weights = weights
        self.layout = layout
        self._panel = PANELS[layout]

    def encode(
        self, raw: bytearray, dtype: str, shape: tuple[int, ...], *, is_transposed: bool = False
    ) -> Encoded:
        """Parts by role.  Not a number and infinities in `raw` make the misfit's error not finite."""
        matrix = torch.frombuffer(raw, dtype=_DTYPES[dtype]).view(shape)
        matrix_OI = matrix.t() if is_transposed else matrix
        outputs, inputs = matrix_OI.shape
        step = max(_PIECE_NUMEL // inputs // self._panel, 1) * self._panel
        pieces, error, norm, worst = [], 0.0, 0.0, 0.0
        for start in range(0, outputs, step):
            rows = matrix_OI[start : start + step].float()
            piece = quantise(rows, self.weights, self._panel)
            misfit = misfit_of(piece, rows)
            pieces.append(piece)
            error, norm, worst = error + misfit.error, norm + misfit.norm, max(worst, misfit.worst)
        return Encoded(_bytes(_joined(pieces)), Misfit(error, norm, worst))

    def compare(
        self,
        parts: Mapping[str, bytearray],
        shapes: Mapping[str, tuple[int, ...]],
        raw: bytearray,
        dtype: str,
        shape: tuple[int, ...],
        *,
        is_transposed: bool = False,
    ) -> Misfit:
        """How far stored parts are from the published matrix, group by group as `encode` adds them up."""
        matrix = torch.frombuffer(raw, dtype=_DTYPES[dtype]).view(shape)
        matrix_OI = matrix.t() if is_transposed else matrix
        outputs, inputs = matrix_OI.shape
        views = {
            role: torch.frombuffer(part, dtype=_DTYPES["BF16" if role == "scales" else "U8"]).view(
                shapes[role]
            )
            for role, part in parts.items()
        }
        whole = QuantWeight(views["nibbles"], views["scales"], views.get("low"), outputs)
        step = max(_PIECE_NUMEL // inputs // self._panel, 1) * self._panel
        error, norm, worst = 0.0, 0.0, 0.0
        for start in range(0, outputs, step):
            stop = min(start + step, outputs)
            misfit = misfit_of(whole.rows(start, stop), matrix_OI[start:stop].float())
            error, norm, worst = error + misfit.error, norm + misfit.norm, max(worst, misfit.worst)
        return Misfit(error, norm, worst)

    def repack(
        self, parts: Mapping[str, bytearray], shapes: Mapping[str, tuple[int, ...]], outputs: int
    ) -> dict[str, bytes]:
        """The same numbers, bit for bit, in this layout's panels."""
        width = -(-outputs // self._panel) * self._panel
        made = {}
        for role, part in parts.items():
            if role == "scales":
                scales = torch.frombuffer(part, dtype=torch.int16).view(shapes[role])[:, :outputs]
                made[role] = torch.nn.functional.pad(scales, (0, 0, 0, width - outputs))
            else:
                values_OI = unpack_nibbles(torch.frombuffer(part, dtype=torch.uint8).view(shapes[role]))
                padded_OI = torch.nn.functional.pad(values_OI[:outputs], (0, 0, 0, width - outputs), value=8)
                made[role] = pack_nibbles(padded_OI, self._panel)
        return {role: _octets(part) for role, part in made.items()}


def quantise(rows_OI: Tensor, weights: str, panel: int) -> QuantWeight:
    """fp32 rows [O, I], I a multiple of GROUP, as one QuantWeight of ceil(O / panel) panels."""
    outputs, inputs = rows_OI.shape
    steps = _STEPS[weights]
    padded_OI = torch.nn.functional.pad(rows_OI, (0, 0, 0, -outputs % panel))
    chosen, scale, zero = _search(padded_OI.reshape(-1, GROUP), steps)
    values_OI = chosen.to(torch.uint8).view(-1, inputs)
    scales = torch.stack([part.view(-1, inputs // GROUP).t() for part in (scale, zero)], 2)
    scales[:, outputs:] = 0
    if weights == "int4":
        return QuantWeight(pack_nibbles(values_OI, panel), scales.bfloat16(), None, outputs)
    low = pack_nibbles(values_OI & 15, panel)
    return QuantWeight(pack_nibbles(values_OI >> 4, panel), scales.bfloat16(), low, outputs)


def misfit_of(weight: QuantWeight, rows_OI: Tensor) -> Misfit:
    """Squared error and norm, and the largest error of a group relative to the matrix's typical weight."""
    groups = rows_OI.reshape(-1, GROUP).double()
    errors = (dequantise(weight).reshape(-1, GROUP).double() - groups).square().sum(1)
    norm = groups.square().sum(1)
    typical = norm.mean().clamp_min(_TINY)
    # A group of zeros has no relative error; a share of the typical group's norm keeps it from counting too much.
    worst = (errors / norm.clamp_min(0.05 * typical)).max().sqrt()
    return Misfit(float(errors.sum()), float(norm.sum()), float(worst))


def _search(groups: Tensor, steps: _Steps) -> tuple[Tensor, Tensor, Tensor]:
    """Integers [groups, GROUP], scales and zeros [groups, 1], rounded to bf16 before the integers are chosen."""
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    middle, half = (low + high) / 2, (high - low) / 2
    best: list[Tensor] = []
    for share in steps.ranges:
        scale = half * (2 * share / steps.top)
        zero = (middle - half * share + steps.middle * scale) / steps.zeros
        best = _better(best, _rounded(groups, scale, zero, steps))
    # Least squares for the integers that were chosen: groups ~ scale * integers + zero.
    integers = best[0] - steps.middle
    mean, target = integers.mean(1, keepdim=True), groups.mean(1, keepdim=True)
    spread = (integers - mean).square().sum(1, keepdim=True).clamp_min(_TINY)
    scale = ((integers - mean) * (groups - target)).sum(1, keepdim=True) / spread
    fitted = _rounded(groups, scale, (target - scale * mean) / steps.zeros, steps)
    chosen, scale, zero, _ = _better(best, fitted)
    return chosen, scale, zero


def _rounded(groups: Tensor, scale: Tensor, zero: Tensor, steps: _Steps) -> list[Tensor]:
    """Integers, scale and zero in bf16's precision, squared error."""
    scale = scale.clamp_min(_TINY).bfloat16().float()
    zero = zero.bfloat16().float()
    base = steps.zeros * zero
    integers = ((groups - base) / scale + steps.middle).round_().clamp_(0, steps.top)
    error = ((integers - steps.middle) * scale + base - groups).square().sum(1, keepdim=True)
    return [integers, scale, zero, error]


def _better(best: list[Tensor], other: list[Tensor]) -> list[Tensor]:
    if not best:
        return other
    is_better = other[3] < best[3]
    return [torch.where(is_better, new, old) for new, old in zip(other, best, strict=True)]


def _joined(pieces: list[QuantWeight]) -> QuantWeight:
    low = [piece.low for piece in pieces if piece.low is not None]
    return QuantWeight(
        torch.cat([piece.nibbles for piece in pieces]),
        torch.cat([piece.scales for piece in pieces], 1),
        torch.cat(low) if low else None,
        sum(piece.outputs for piece in pieces),
    )


def _bytes(weight: QuantWeight) -> dict[str, bytes]:
    parts = {"nibbles": weight.nibbles, "low": weight.low, "scales": weight.scales}
    return {role: _octets(part) for role, part in parts.items() if part is not None}


def _octets(part: Tensor) -> bytes:
    return part.contiguous().view(torch.uint8).numpy().tobytes()
