"""Pack matrices without loss while a store is written.  In: published bytes.  Out: the bytes that a store holds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from zinfer.chunks.encode import Encoded, Misfit
from zinfer.kernels.exponents import LosslessWeight, lossless_weight
from zinfer.kernels.lossless import packed, unpacked
from zinfer.spec.lossless import LAYOUT, LOSSLESS, SHARED

_PIECE_NUMEL = 2**21  # of the matrix at once: packing holds some thirty bytes of each beside the result


class Packer:
    """The `Encoder` of the format LOSSLESS."""

    weights = LOSSLESS
    layout = LAYOUT

    def encode(
        self, raw: bytearray, dtype: str, shape: tuple[int, ...], *, is_transposed: bool = False
    ) -> Encoded:
        """Parts by role; infinities and what is no number are kept like any weight.

        Raises TooManyExponentsError where outputs need more exceptions than there is room for, ValueError where the
        matrix is of another dtype than the model.
        """
        if dtype != "BF16":
            raise ValueError(f"it is published in {dtype}, the format takes BF16")
        matrix_OI = _matrix(raw, shape)
        pieces = [packed(matrix_OI[rows]) for rows in _pieces(matrix_OI)]
        parts = {
            "rest": torch.cat([piece.rest for piece in pieces]),
            "codes": torch.cat([piece.codes for piece in pieces]),
            "exponents": torch.cat([piece.exponents for piece in pieces]),
        }
        misfit = _misfit(lossless_weight(parts, len(matrix_OI)), matrix_OI)
        return Encoded({role: part.numpy().tobytes() for role, part in parts.items()}, misfit)

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
        """How many weights are not the published ones, bit for bit; none, unless the store is damaged."""
        views = {
            role: torch.frombuffer(part, dtype=torch.uint8).view(shapes[role]) for role, part in parts.items()
        }
        matrix_OI = _matrix(raw, shape)
        return _misfit(lossless_weight(views, len(matrix_OI)), matrix_OI)

    def repack(
        self, parts: Mapping[str, bytearray], shapes: Mapping[str, tuple[int, ...]], outputs: int
    ) -> dict[str, bytes]:
        """There is one layout: the same bytes."""
        return {role: bytes(part) for role, part in parts.items()}


def _matrix(raw: bytearray, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(raw, dtype=torch.bfloat16).view(shape)


def _pieces(matrix_OI: Tensor) -> list[slice]:
    outputs, inputs = matrix_OI.shape
    step = max(_PIECE_NUMEL // inputs // SHARED, 1) * SHARED
    return [slice(start, min(start + step, outputs)) for start in range(0, outputs, step)]


def _misfit(weight: LosslessWeight, matrix_OI: Tensor) -> Misfit:
    """A weight that differs counts one, whatever the two are; so does the whole where it is the worst group."""
    differing = sum(
        _differing(weight.rows(rows.start, rows.stop), matrix_OI[rows]) for rows in _pieces(matrix_OI)
    )
    return Misfit(float(differing), float(matrix_OI.numel()), float(differing > 0))


def _differing(weight: LosslessWeight, rows_OI: Tensor) -> int:
    found, wanted = unpacked(weight).view(torch.int16), rows_OI.view(torch.int16)
    return 0 if torch.equal(found, wanted) else int((found != wanted).sum())
