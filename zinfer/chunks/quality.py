"""Is a quantised store still as close to its model as it was?  In: store, published folder, encoder.  Out: a report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from zinfer.checkpoint.index import CheckpointIndex
from zinfer.chunks.encode import Encoder, Misfit
from zinfer.chunks.encoding import quantised_name, read_place, stored_parts
from zinfer.chunks.manifest import read_manifest, source_of
from zinfer.chunks.source import Source, Unit, checkpoint_source
from zinfer.chunks.writer import Progress
from zinfer.spec.read import read_spec
from zinfer.spec.records import Op
from zinfer.spec.stored import RMS_LIMITS, part_of

_SAME = 1e-6  # sums in another order


@dataclass(frozen=True, slots=True)
class Quality:
    """One matrix: the error that was written down when it was quantised, and that of the store's bytes now."""

    name: str
    written: float
    found: Misfit
    limit: float

    @property
    def is_same(self) -> bool:
        """Whether the bytes are those that were written; one group's changed scale is seen among millions."""
        return math.isclose(self.found.rms, self.written, rel_tol=_SAME)

    @property
    def is_close(self) -> bool:
        """Whether the error is what the format promises for weights that look trained."""
        return self.found.rms <= self.limit


def check_quality(
    folder: str | Path, published: str | Path, encoder: Encoder, progress: Progress
) -> tuple[Quality, ...]:
    """Compare every quantised matrix of a store with the published one; a few ops' memory, whatever the size.

    Raises IntegrityError as `read_manifest`, CheckpointError as `CheckpointIndex.open`.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    index = CheckpointIndex.open(published)
    spec = read_spec(index.config, index.generation_config, index.dtypes)
    origin = checkpoint_source(spec.program, spec.lookups, index)
    by_op = {unit.op: unit for unit in origin.units}
    store = source_of(manifest, folder)
    units = [unit for unit in store.units if any(part_of(place.name) for place in unit.places)]
    found: dict[str, Misfit] = {}
    total = sum(place.nbytes for unit in units for place in unit.places)
    done = 0
    for unit in units:
        assert unit.op is not None, "row tables are never quantised"
        misfit = _misfit(unit, store, by_op[unit.op], origin, spec.program[unit.op], encoder)
        name = quantised_name(unit)
        found[name] = found[name] + misfit if name in found else misfit
        done += sum(place.nbytes for place in unit.places)
        progress(done, total, f"comparing {name}")
    written = {row.name: row.rms for row in manifest.quantised.quality} if manifest.quantised else {}
    limit = RMS_LIMITS.get(manifest.weights, 0.0)
    return tuple(Quality(name, written.get(name, math.nan), misfit, limit) for name, misfit in found.items())


def _misfit(unit: Unit, store: Source, published: Unit, origin: Source, op: Op, encoder: Encoder) -> Misfit:
    parts, shapes = stored_parts(unit, store.files)
    kept = {place.key for place in unit.places}
    (matrix,) = (place for place in published.places if place.key not in kept)
    raw = read_place(matrix, origin.files)
    return encoder.compare(parts, shapes, raw, matrix.dtype, matrix.shape, is_transposed=op.transposed)
