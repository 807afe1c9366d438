"""What a store in another format asks of whoever knows it.  In: published bytes.  Out: stored parts, and their error.

The numbers are torch's business, which begins two layers up; the store only says what it needs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Misfit:
    """How far stored weights are from the published ones: sums of squares, and the worst group's relative error."""

    error: float
    norm: float
    worst: float

    @property
    def rms(self) -> float:
        """Relative RMS error: sqrt(sum (stored - published)^2 / sum published^2)."""
        return math.sqrt(self.error / self.norm) if self.norm else 0.0

    def __add__(self, other: Misfit) -> Misfit:
        """Of two blocks of one matrix."""
        return Misfit(self.error + other.error, self.norm + other.norm, max(self.worst, other.worst))


@dataclass(frozen=True, slots=True)
class Encoded:
    """The stored parts of one op's matrix by role, and how far they are from it; None: only laid out anew."""

    parts: Mapping[str, bytes]
    misfit: Misfit | None


class Encoder(Protocol):
    """Stores one op's matrix at a time: `zinfer.kernels.quantise.Quantiser` or `zinfer.kernels.packer.Packer`."""

    @property
    def weights(self) -> str:
        """The format, one of `zinfer.spec.stored.FORMATS`."""
        ...

    @property
    def layout(self) -> str:
        """The layout id, one of the format's (`zinfer.spec.stored.layouts`)."""
        ...

    def encode(
        self, raw: bytearray, dtype: str, shape: tuple[int, ...], *, is_transposed: bool = False
    ) -> Encoded:
        """Published bytes of a matrix (or of a block of its rows) in the stored form; the same bytes every time.

        Raises ValueError where the format cannot hold them.
        """
        ...

    def repack(
        self, parts: Mapping[str, bytearray], shapes: Mapping[str, tuple[int, ...]], outputs: int
    ) -> Mapping[str, bytes]:
        """Parts that were stored in another layout, in this one; the numbers stay the same, bit for bit."""
        ...

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
        """How far stored parts are from the published matrix; equals what `encode` said of them."""
        ...
