"""Where the weights of each op lie.  In: program, lookups and an index (or none).  Out: a Source to pack."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from zinfer.checkpoint.header import DTYPE_BITS
from zinfer.checkpoint.index import CheckpointIndex
from zinfer.chunks.table import ALIGN, PAGE, PIECE_BYTES, Read, RowTable
from zinfer.errors import CheckpointError
from zinfer.spec.records import Op, RowLookup, WeightRef
from zinfer.units import round_up


class Place(NamedTuple):
    """Rows [start, stop) of a published tensor and the file range that holds them."""

    name: str
    start: int
    stop: int
    shape: tuple[int, ...]  # of the rows
    dtype: str
    file: int
    offset: int
    nbytes: int

    @property
    def key(self) -> tuple[str, int, int]:
        """What an op asks for: (published name, first row, end row)."""
        return (self.name, self.start, self.stop)

    @property
    def end(self) -> int:
        """The file offset behind the last byte."""
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True)
class Unit:
    """What one op reads, the grain that chunks are made of; op None: a row table that no op reads."""

    op: int | None
    layer: int
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Source:
    """All units in execution order (row tables first) over the files that hold them.

    `blocks` maps (file, offset) to (bytes, XXH3-64) where the files are a zinfer store; reads are then cut
    exactly there, so that each can be checked alone.  `align` is that of weight views in a chunk's buffer.  `packed`
    keeps what units of this source were packed into: plans try the same groups again and again.
    """

    files: tuple[Path, ...]
    file_sizes: tuple[int, ...]
    units: tuple[Unit, ...]
    row_tables: dict[str, RowTable]
    blocks: Mapping[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    align: int = ALIGN
    packed: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def reads(self, file: int, begin: int, end: int, at: int) -> Iterator[Read]:
        """Cut the PAGE-aligned range [begin, end) of a file into reads; it begins at `at` of the buffer."""
        offset = begin
        while offset < end:
            nbytes, digest = self.blocks.get((file, offset), (min(end - offset, PIECE_BYTES), None))
            valid = min(nbytes, self.file_sizes[file] - offset)
            yield Read(file, offset, nbytes, at + offset - begin, valid, digest)
            offset += nbytes


def checkpoint_source(program: Sequence[Op], lookups: Sequence[RowLookup], index: CheckpointIndex) -> Source:
    """The published files as they are.  Raises CheckpointError ZI-4151 or ZI-4153 where one does not fit."""

    def locate(weight: WeightRef) -> Place:
        entry = index.weights.get(weight.name)
        if entry is None:
            raise _misfit("ZI-4151", index, f"has no tensor {weight.name!r}")
        if not entry.shape or entry.shape[1:] != weight.shape[1:] or weight.stop > entry.shape[0]:
            wanted = f"rows {weight.start} to {weight.stop} of shape {weight.shape}"
            raise _misfit("ZI-4153", index, f"has {weight.name!r} as {entry.shape}; {wanted} were wanted")
        begin, end = (row * entry.row_bytes for row in (weight.start, weight.stop))
        return Place(*weight.key, weight.shape, entry.dtype, entry.file, entry.offset + begin, end - begin)

    units = _units(program, lookups, locate)
    tables = {lookup.name: row_table(locate(_whole(lookup))) for lookup in lookups}
    return Source(index.files, index.file_sizes, units, tables)


def imagined_source(program: Sequence[Op], lookups: Sequence[RowLookup], dtype: str) -> Source:
    """One file as a store would have it, to plan from a lone config.json; nothing can be read from it."""

    def nowhere(weight: WeightRef) -> Place:
        return _unwritten(weight, dtype)

    units, end, num_rows = [], 0, {lookup.name: lookup.num_rows for lookup in lookups}
    for unit in _units(program, lookups, nowhere):
        units.append(settle(stored_unit(unit, program), 0, end, num_rows))
        end = round_up(units[-1].places[-1].end, PAGE)
    first = {place.name: place.offset for unit in reversed(units) for place in reversed(unit.places)}
    whole = [nowhere(_whole(lookup)) for lookup in lookups]
    tables = {place.name: row_table(place._replace(offset=first[place.name])) for place in whole}
    return Source((Path("model.safetensors"),), (end,), tuple(units), tables)


def stored_unit(unit: Unit, program: Sequence[Op]) -> Unit:
    """What a store holds for a published unit: parts of quantised matrices have no file yet."""
    if unit.op is None or not program[unit.op].stored:
        return unit
    published = {(place.key, place.shape): place for place in unit.places}
    parts = (
        published.get((part.key, part.shape)) or _unwritten(part, "") for part in program[unit.op].stored
    )
    return replace(unit, places=tuple(parts))


def settle(unit: Unit, file: int, at: int, num_rows: Mapping[str, int]) -> Unit:
    """The unit's places in `file` from `at` on, a multiple of PAGE: the matrix, then vectors at multiples of ALIGN.

    `num_rows` are the row counts of tables that are also read by rows.  Of such a table's block, unless it is the
    last, the vectors come first and the matrix starts at the next PAGE, so that the next block can touch its end.
    """
    *vectors, matrix = sorted(unit.places, key=lambda place: place.nbytes)
    is_continued = matrix.stop < num_rows.get(matrix.name, 0)
    places = []
    for place in (*vectors, matrix) if is_continued else (matrix, *vectors):
        at = round_up(at, PAGE if place is matrix else ALIGN)
        places.append(place._replace(file=file, offset=at))
        at += place.nbytes
    return replace(unit, places=tuple(places))


def row_table(place: Place) -> RowTable:
    """A whole table as rows: row r lies r * row_bytes behind the table's first byte."""
    rows, *row_shape = place.shape
    return RowTable(
        place.name, place.file, place.offset, place.nbytes // rows, rows, tuple(row_shape), place.dtype
    )


def _unwritten(weight: WeightRef, dtype: str) -> Place:
    dtype = weight.dtype or dtype
    return Place(*weight.key, weight.shape, dtype, 0, 0, weight.numel * DTYPE_BITS[dtype] // 8)


def _units(
    program: Sequence[Op], lookups: Sequence[RowLookup], locate: Callable[[WeightRef], Place]
) -> tuple[Unit, ...]:
    """Row tables that no op reads, then every op that has weights."""
    read_by_ops = {weight.name for op in program for weight in op.weights}
    tables = [_whole(lookup) for lookup in lookups if lookup.name not in read_by_ops]
    units = [Unit(None, -1, (locate(table),)) for table in tables]
    units += [Unit(op.index, op.layer, tuple(map(locate, op.weights))) for op in program if op.weights]
    return tuple(units)


def _whole(lookup: RowLookup) -> WeightRef:
    return WeightRef("table", lookup.name, 0, lookup.num_rows, (lookup.num_rows, lookup.width))


def _misfit(code: str, index: CheckpointIndex, what: str) -> CheckpointError:
    remedy = f"zinfer inspect {shlex.quote(str(index.folder))}   # lists the tensors that are there"
    return CheckpointError(code, f"{index.folder} {what}", remedy=remedy)
