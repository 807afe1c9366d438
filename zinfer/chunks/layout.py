"""How a store lies on disk.  In: a Source of published files.  Out: shards, their headers, where each unit goes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from zinfer.chunks.source import Place, Source, Unit, settle, stored_unit
from zinfer.chunks.table import PAGE, RowTable
from zinfer.spec.records import Op
from zinfer.units import GIB, round_up

LAYOUT_ID = "rows-v1"  # slices of rows, as the program cuts them, one page-aligned extent per op
SHARD_BYTES = 2 * GIB  # a shard that has reached this ends with its layer
MAX_SHARD_BYTES = 4 * GIB


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One file: its name, the padded header with its length in front, its size, which units it holds."""

    name: str
    header: bytes
    nbytes: int
    units: range


@dataclass(frozen=True, slots=True)
class Layout:
    """`settled[i]` is where `published[i]` goes; both in execution order, row tables that no op reads first."""

    shards: tuple[ShardPlan, ...]
    published: tuple[Unit, ...]
    settled: tuple[Unit, ...]
    row_tables: dict[str, RowTable]


def lay_out(
    source: Source,
    shard_bytes: int = SHARD_BYTES,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    program: Sequence[Op] = (),
) -> Layout:
    """Decide every byte's place in the store; depends on the published shapes, and on what `program` stores, alone.

    A tied table is read both by rows and as the head's blocks.  Its rows lie end to end across the blocks where a
    block fills its pages; where not, the table is stored once more, whole.
    """
    units = source.units
    shards, settled = _fill_shards(_stored(units, program), source, shard_bytes, max_shard_bytes)
    if scattered := [name for name in source.row_tables if _settled_table(name, source, settled) is None]:
        units = (*(_whole(source.row_tables[name]) for name in scattered), *units)
        shards, settled = _fill_shards(_stored(units, program), source, shard_bytes, max_shard_bytes)
    tables = {name: _settled_table(name, source, settled) for name in source.row_tables}
    return Layout(shards, units, settled, {name: table for name, table in tables.items() if table})


def _stored(units: Sequence[Unit], program: Sequence[Op]) -> tuple[Unit, ...]:
    return tuple(stored_unit(unit, program) if program else unit for unit in units)


def _fill_shards(
    units: Sequence[Unit], source: Source, shard_bytes: int, max_shard_bytes: int
) -> tuple[tuple[ShardPlan, ...], tuple[Unit, ...]]:
    """Cut into shards at layer borders beyond `shard_bytes`, at any op before `max_shard_bytes`."""
    num_rows = {name: table.num_rows for name, table in source.row_tables.items()}
    firsts, used = [0], 0
    for number, unit in enumerate(units):
        nbytes = extent_bytes(settle(unit, 0, 0, num_rows))
        starts_layer = number == 0 or unit.layer != units[number - 1].layer
        # Rows of a table that is also looked up must not be torn apart.
        is_torn = any(place.name in num_rows and place.start for place in unit.places)
        is_full = (starts_layer and used >= shard_bytes) or used + nbytes > max_shard_bytes
        if is_full and used and not is_torn:
            firsts.append(number)
            used = 0
        used += nbytes
    rows = {place.name: place.stop for unit in units for place in unit.places}
    shards, settled = [], []
    for file, (first, last) in enumerate(pairwise([*firsts, len(units)])):
        at, placed = 0, []
        for unit in units[first:last]:
            placed.append(settle(unit, file, at, num_rows))
            at += extent_bytes(placed[-1])
        header = _header(placed, rows)
        name = f"weights-{file + 1:05}-of-{len(firsts):05}.safetensors"
        shards.append(ShardPlan(name, header, len(header) + at, range(first, last)))
        settled += [_shifted(unit, len(header)) for unit in placed]
    return tuple(shards), tuple(settled)


def extent_start(unit: Unit) -> int:
    """File offset at which a settled unit's extent begins."""
    return min(place.offset for place in unit.places)


def extent_bytes(unit: Unit) -> int:
    """Size of a settled unit's extent, a multiple of PAGE."""
    return round_up(unit.places[-1].end, PAGE) - extent_start(unit)


def _shifted(unit: Unit, by: int) -> Unit:
    return replace(unit, places=tuple(place._replace(offset=place.offset + by) for place in unit.places))


def _header(units: Sequence[Unit], rows: dict[str, int]) -> bytes:
    """Ordinary safetensors: gaps are U8 tensors `__pad__.N`, spaces behind the JSON let the data start at a PAGE.

    A slice that is not the whole tensor is called name[start:stop].
    """
    fields: dict[str, Any] = {"__metadata__": {"format": "pt", "layout": LAYOUT_ID}}
    at = num_pads = 0
    for unit in units:
        end = extent_start(unit) + extent_bytes(unit)
        for place in (*unit.places, None):
            begin = place.offset if place else end
            if begin > at:
                fields[f"__pad__.{num_pads}"] = _field("U8", (begin - at,), at, begin)
                num_pads += 1
            if place:
                is_whole = place.start == 0 and place.stop == rows[place.name]
                name = place.name if is_whole else f"{place.name}[{place.start}:{place.stop}]"
                assert name not in fields, f"two ops read {name}"
                fields[name] = _field(place.dtype, place.shape, begin, place.end)
                at = place.end
        at = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % PAGE)
    return len(text).to_bytes(8, "little") + text


def _field(dtype: str, shape: tuple[int, ...], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def _settled_table(name: str, source: Source, units: Sequence[Unit]) -> RowTable | None:
    """The table's rows where they lie whole or end to end in one file, else None."""
    table = source.row_tables[name]
    places = [place for unit in units for place in unit.places if place.name == name]
    whole = [place for place in places if (place.start, place.stop) == (0, table.num_rows)]
    for one, two in pairwise([] if whole else places):
        if (two.file, two.offset, two.start) != (one.file, one.end, one.stop):
            return None
    first = (whole or places)[0]
    return replace(table, file=first.file, offset=first.offset)


def _whole(table: RowTable) -> Unit:
    nbytes = table.num_rows * table.row_bytes
    shape = (table.num_rows, *table.row_shape)
    place = Place(table.name, 0, table.num_rows, shape, table.dtype, table.file, table.offset, nbytes)
    return Unit(None, -1, (place,))
