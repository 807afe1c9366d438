"""Pack ops into chunks.  In: a Source and the largest chunk wanted.  Out: a ChunkTable.  Touches no bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise

from zinfer.checkpoint.index import CheckpointIndex
from zinfer.chunks.source import Place, Source, Unit, checkpoint_source
from zinfer.chunks.table import PAGE, Chunk, ChunkId, ChunkTable, Move, Read, TensorSlice
from zinfer.spec.records import Op, RowLookup
from zinfer.units import round_up

_MOST_TABLES = 64  # that a source remembers


def pack(
    program: Sequence[Op], lookups: Sequence[RowLookup], index: CheckpointIndex, limit: int
) -> ChunkTable:
    """Chunks of at most `limit` bytes over the published files, in place; see `assemble`."""
    return assemble(checkpoint_source(program, lookups, index), limit)


def assemble(source: Source, limit: int) -> ChunkTable:
    """Group consecutive units into chunks of at most `limit` bytes, at least one unit each.

    A chunk holds whole layers, or a part of one layer.  Row tables that no op reads are chunks of their own,
    whatever their size, and come first.
    """
    counts = tuple(group(layer_sizes(source), limit))
    if counts not in source.packed:
        if len(source.packed) > _MOST_TABLES:
            source.packed.clear()
        source.packed[counts] = _assembled(source, counts)
    found: ChunkTable = source.packed[counts]
    return found


def _assembled(source: Source, counts: Sequence[int]) -> ChunkTable:
    """Row tables, then chunks of so many units each."""
    tables = [unit for unit in source.units if unit.op is None]
    ops = [unit for unit in source.units if unit.op is not None]
    groups = [[table] for table in tables]
    begin = 0
    for count in counts:
        groups.append(ops[begin : begin + count])
        begin += count
    chunks = tuple(chunk_of(ChunkId(number), units, source) for number, units in enumerate(groups))
    return ChunkTable(source.files, chunks, source.row_tables)


def layer_sizes(source: Source) -> list[tuple[int, ...]]:
    """Buffer bytes of every unit that an op reads, each as a chunk of its own, layer by layer in order.

    A chunk of several units takes at most their sum: neighbours share pages.
    """
    if None not in source.packed:
        ops = (unit for unit in source.units if unit.op is not None)
        source.packed[None] = [
            tuple(chunk_of(ChunkId(0), [unit], source).nbytes for unit in units)
            for _, units in groupby(ops, key=lambda unit: unit.layer)
        ]
    return list(source.packed[None])


def group(layers: Sequence[tuple[int, ...]], limit: int) -> list[int]:
    """How many consecutive units each chunk holds: whole layers while they fit, else parts of one."""
    return [num_units for run in _grouped(layers, limit) for num_units, _ in run]


def chunk_sizes(layers: Sequence[tuple[int, ...]], limit: int) -> Counter[int]:
    """Bytes of the chunks that `group` makes, and how many there are of each."""
    sizes: Counter[int] = Counter()
    for run, times in Counter(_grouped(layers, limit)).items():
        for _, nbytes in run:
            sizes[nbytes] += times
    return sizes


_Run = tuple[tuple[int, int], ...]  # units and bytes of chunks in a row


def _grouped(layers: Sequence[tuple[int, ...]], limit: int) -> Iterator[_Run]:
    """One chunk of whole layers, or the chunks of one layer, at a time."""
    open_units = open_bytes = 0
    parts: dict[tuple[int, ...], _Run] = {}  # most layers are alike
    for sizes in layers:
        layer_bytes = sum(sizes)
        if open_units and open_bytes + layer_bytes > limit:
            yield ((open_units, open_bytes),)
            open_units = open_bytes = 0
        if layer_bytes <= limit:
            open_units += len(sizes)
            open_bytes += layer_bytes
        else:
            if sizes not in parts:
                parts[sizes] = tuple(_fill(sizes, limit))
            yield parts[sizes]
    if open_units:
        yield ((open_units, open_bytes),)


def _fill(sizes: tuple[int, ...], limit: int) -> Iterator[tuple[int, int]]:
    num_units = used = 0
    for size in sizes:
        if num_units and used + size > limit:
            yield num_units, used
            num_units = used = 0
        num_units += 1
        used += size
    yield num_units, used


def chunk_of(number: ChunkId, units: Sequence[Unit], source: Source) -> Chunk:
    """Lay the units' weights out in one buffer, so that direct reads land as close to their place as can be.

    Slices that are neighbours in a file are read together, as the PAGE-aligned superset of their range.
    Where a file offset is a multiple of `source.align` the view lies inside the read; else one move brings it there.
    """
    places = {place.key: place for unit in units for place in unit.places}
    tensors: list[TensorSlice] = []
    reads: list[Read] = []
    moves: list[Move] = []
    at = 0
    for run in _runs(places.values()):
        low = run[0].offset // PAGE * PAGE
        high = round_up(run[-1].end, PAGE)
        reads += source.reads(run[0].file, low, high, at)
        slices = _slices(run, at, at - low, source.align)
        tensors += slices
        moves += _moves([(place.offset + at - low, piece) for place, piece in zip(run, slices, strict=True)])
        at = round_up(max(at + high - low, slices[-1].offset + slices[-1].nbytes), PAGE)
    ops = tuple(unit.op for unit in units if unit.op is not None)
    weight_bytes = sum(place.nbytes for place in places.values())
    return Chunk(number, ops, tuple(tensors), tuple(reads), tuple(moves), at, weight_bytes)


def _runs(places: Iterable[Place]) -> Iterator[list[Place]]:
    """Places in file order, cut wherever a gap of a page or more, another file or an overlap follows."""
    ordered = sorted(places, key=lambda place: (place.file, place.offset, place.end))
    run = ordered[:1]
    for last, place in pairwise(ordered):
        if place.file != last.file or not 0 <= place.offset - last.end < PAGE:
            yield run
            run = []
        run.append(place)
    if run:
        yield run


def _slices(run: list[Place], at: int, shift: int, align: int) -> list[TensorSlice]:
    """Where each place of a run belongs: at or just before where it lands, or behind its predecessor."""
    slices = []
    for place in run:
        offset = max(round_up(at, align), (place.offset + shift) // align * align)
        slices.append(
            TensorSlice(place.name, place.start, place.stop, place.shape, place.dtype, offset, place.nbytes)
        )
        at = offset + place.nbytes
    return slices


def _moves(landed: list[tuple[int, TensorSlice]]) -> list[Move]:
    """What must be shifted, in an order in which no move overwrites bytes that a later one still needs.

    Sources and targets are both in ascending order and disjoint, so: those that go down from the front, then
    those that go up from the back.
    """
    moves = [Move(source, piece.offset, piece.nbytes) for source, piece in landed if source != piece.offset]
    down = [move for move in moves if move.target < move.source]
    return down + [move for move in reversed(moves) if move.target > move.source]
