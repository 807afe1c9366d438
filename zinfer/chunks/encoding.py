"""Quantise while a store is written.  In: published units and an Encoder.  Out: their parts, what the manifest says.

Where the source is a quantised store itself its parts are laid out anew for another kernel; no number changes.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from zinfer.checkpoint.read import opened, read_into
from zinfer.chunks.encode import Encoded, Encoder, Misfit
from zinfer.chunks.manifest import QualityRecord, QuantRecord
from zinfer.chunks.source import Place, Unit
from zinfer.errors import CheckpointError
from zinfer.spec.records import Op
from zinfer.spec.stored import part_of, shared_weights


class Encoding:
    """One run's quantisation: which units, by whom."""

    def __init__(
        self, encoder: Encoder, program: Sequence[Op], quality: tuple[QualityRecord, ...] = ()
    ) -> None:
        self.encoder = encoder
        self.program = program
        self.quality = quality  # what was written down when the source, itself quantised, was made

    def encode(self, published: Unit, settled: Unit, files: Sequence[Path]) -> Encoded | None:
        """The parts of a unit, None where all of it is copied.  Raises CheckpointError ZI-4155: not a finite number."""
        if not any(part_of(place.name) for place in settled.places):
            return None
        assert published.op is not None, "a row table is never quantised"
        op = self.program[published.op]
        if any(part_of(place.name) for place in published.places):
            return self._laid_out_anew(op, published, files)
        kept = {place.key for place in settled.places}
        (matrix,) = (place for place in published.places if place.key not in kept)
        try:
            encoded = self.encoder.encode(
                read_place(matrix, files), matrix.dtype, matrix.shape, is_transposed=op.transposed
            )
        except ValueError as error:
            raise CheckpointError(
                "ZI-4156",
                f"{matrix.name!r} does not fit the format {self.encoder.weights!r}: {error}",
                remedy=f"zinfer shard {shlex.quote(str(files[matrix.file].parent))} --out DIR   # as published",
            ) from None
        if encoded.misfit is None or not math.isfinite(encoded.misfit.error):
            folder = files[matrix.file].parent
            raise CheckpointError(
                "ZI-4155",
                f"{matrix.name!r} holds infinities or no numbers at all: it cannot be quantised",
                remedy=f"zinfer shard {shlex.quote(str(folder))} --out DIR   # as published",
            )
        return encoded

    def _laid_out_anew(self, op: Op, stored: Unit, files: Sequence[Path]) -> Encoded:
        assert op.matrix is not None, "parts without a matrix"
        parts, shapes = stored_parts(stored, files)
        return Encoded(self.encoder.repack(parts, shapes, op.matrix.shape[1 if op.transposed else 0]), None)

    def record(self, quality: Mapping[str, Misfit]) -> QuantRecord:
        """What the manifest says of the format and of what it cost."""
        rows = self.quality or tuple(
            QualityRecord(name=name, rms=misfit.rms, worst=misfit.worst) for name, misfit in quality.items()
        )
        return QuantRecord(
            group=shared_weights(self.encoder.weights), layout=self.encoder.layout, quality=rows
        )


def quantised_name(unit: Unit) -> str:
    """The published name of the unit's quantised matrix."""
    names = (place.name for place in unit.places if part_of(place.name))
    return next(names).rpartition(".")[0]


def stored_parts(
    unit: Unit, files: Sequence[Path]
) -> tuple[dict[str, bytearray], Mapping[str, tuple[int, ...]]]:
    """The parts of a unit's quantised matrix by role, and their shapes."""
    places = {part_of(place.name): place for place in unit.places if part_of(place.name)}
    parts = {role: read_place(place, files) for role, place in places.items()}
    return parts, {role: place.shape for role, place in places.items()}


def read_place(place: Place, files: Sequence[Path]) -> bytearray:
    """A place's bytes: one op's matrix at most."""
    raw = bytearray(place.nbytes)
    with opened(files[place.file]) as fd:
        read_into(fd, memoryview(raw), place.offset, files[place.file])
    return raw
