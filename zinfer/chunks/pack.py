"""Pack ops into chunks.  In: a Source and the largest chunk wanted.  Out: a ChunkTable.  Touches no bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

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
        layers = (
            tuple([_laid(unit.places, source.align)[-1].end for unit in units])
            for _, units in groupby(ops, key=lambda unit: unit.layer)
        )
        one: dict[tuple[int, ...], tuple[int, ...]] = {}  # of those that are alike
        source.packed[None] = [one.setdefault(sizes, sizes) for sizes in layers]
    return list(source.packed[None])


def group(layers: Sequence[tuple[int, ...]], limit: int) -> list[int]:
    """How many consecutive units each chunk holds: whole layers while they fit, else parts of one."""
    counts: list[int] = []
    for chunks, times in _grouped(layers, limit):
        counts += [num_units for num_units, _ in chunks] * times
    return counts


def chunk_sizes(layers: Sequence[tuple[int, ...]], limit: int) -> Counter[int]:
    """Bytes of the chunks that `group` makes, and how many there are of each."""
    sizes: Counter[int] = Counter()
    for chunks, times in _grouped(layers, limit):
        for _, nbytes in chunks:
            sizes[nbytes] += times
    return sizes


def _grouped(
    layers: Sequence[tuple[int, ...]], limit: int
) -> Iterator[tuple[Sequence[tuple[int, int]], int]]:
    """Units and bytes of chunks in a row, and how often that row follows: most layers are alike."""
    open_units = open_bytes = 0
    for sizes, alike in groupby(layers):
        layer_bytes, times = sum(sizes), len(list(alike))
        if layer_bytes > limit:
            if open_units:
                yield [(open_units, open_bytes)], 1
            open_units = open_bytes = 0
            yield list(_fill(sizes, limit)), times
            continue
        for _ in range(times):
            if open_units and open_bytes + layer_bytes > limit:
                yield [(open_units, open_bytes)], 1
                open_units = open_bytes = 0
            open_units += len(sizes)
            open_bytes += layer_bytes
    if open_units:
        yield [(open_units, open_bytes)], 1


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
    nbytes = 0
    for run in _laid(places.values(), source.align):
        reads += source.reads(run.places[0].file, run.low, run.high, run.at)
        for place, offset in zip(run.places, run.offsets, strict=True):
            tensors.append(
                TensorSlice(
                    place.name, place.start, place.stop, place.shape, place.dtype, offset, place.nbytes
                )
            )
        moves += _moves(run)
        nbytes = run.end
    ops = tuple(unit.op for unit in units if unit.op is not None)
    weight_bytes = sum(place.nbytes for place in places.values())
    return Chunk(number, ops, tuple(tensors), tuple(reads), tuple(moves), nbytes, weight_bytes)


class _Run(NamedTuple):
    """Neighbours in a file, read together: [low, high) of it lands at `at` of the buffer, `end` lies behind it."""

    places: list[Place]
    low: int
    high: int
    at: int
    offsets: list[int]  # where in the buffer each place belongs
    end: int


def _laid(places: Iterable[Place], align: int) -> list[_Run]:
    """One run behind the other, from multiples of PAGE on."""
    laid: list[_Run] = []
    at = 0
    for run in _runs(places):
        low, high = run[0].offset // PAGE * PAGE, round_up(run[-1].end, PAGE)
        offsets = _offsets(run, at, at - low, align)
        end = round_up(max(at + high - low, offsets[-1] + run[-1].nbytes), PAGE)
        laid.append(_Run(run, low, high, at, offsets, end))
        at = end
    return laid


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


def _offsets(run: list[Place], at: int, shift: int, align: int) -> list[int]:
    """Where each place of a run belongs: at or just before where it lands, or behind its predecessor."""
    offsets = []
    for place in run:
        offsets.append(max(round_up(at, align), (place.offset + shift) // align * align))
        at = offsets[-1] + place.nbytes
    return offsets


def _moves(run: _Run) -> list[Move]:
    """What must be shifted, in an order in which no move overwrites bytes that a later one still needs.

    Sources and targets are both in ascending order and disjoint, so: those that go down from the front, then
    those that go up from the back.
    """
    moves = [
        Move(place.offset + run.at - run.low, offset, place.nbytes)
        for place, offset in zip(run.places, run.offsets, strict=True)
        if place.offset + run.at - run.low != offset
    ]
    down = [move for move in moves if move.target < move.source]
    return down + [move for move in reversed(moves) if move.target > move.source]
