"""Write down when chunks move.  In: a chunk table and a placement.  Out: the steps of the first and later passes."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice

from zinfer.chunks.table import PIECE_BYTES, ChunkId, ChunkTable
from zinfer.plan.records import Compute, Evict, Fetch, FetchRows, Placement, Schedule, Settle, Step

# Plans try the same steps again and again; one record of each will do.
_compute, _evict, _fetch = cache(Compute), cache(Evict), cache(Fetch)

_AHEAD_BYTES = 8 * PIECE_BYTES  # what the first pass keeps on its way, at least: the disk's queue twice over


def build_schedule(table: ChunkTable, placement: Placement, *, parks: bool = False) -> Schedule:
    """The overlapped schedule, or the serial one for lookahead 0.

    Steady pass: the slots already hold, or await, the first streamed chunks; each streamed chunk that has computed
    hands its slot to the next one in the cycle, so the pass ends with the first streamed chunks of the next pass on
    their way.  Every streamed chunk is fetched once per pass.
    """
    if not placement.lookahead and placement.slots:
        return replace(serial_schedule(table, placement), parks=parks)
    order, streamed = _orders(table, placement)
    guests, packed = frozenset(placement.guests), placement.packed
    if not guests:
        first = [*_loading(table, placement, settling=packed, then=streamed)]
        return Schedule((*first, *_tables(table, placement)), steady_steps(table, placement), parks)
    then = [chunk for chunk in order if not placement.resident(chunk) or chunk in packed & guests]
    on_their_way = then[: placement.slots]
    there = {*order} - {*then, *guests} | {*on_their_way}
    first = [*_loading(table, placement, guests=guests, settling=packed - guests, then=then)]
    second = _loading(table, placement, there=there, settling=packed & guests, then=streamed)
    first += _tables(table, placement)
    return Schedule(tuple(first), steady_steps(table, placement), parks, tuple(second))


def steady_steps(table: ChunkTable, placement: Placement) -> tuple[Step, ...]:
    """The steady pass of `build_schedule` alone: plans that are only tried need no other."""
    if not placement.lookahead and placement.slots:
        return serial_schedule(table, placement).steady
    order, streamed = _orders(table, placement)
    slots = min(placement.slots, len(streamed))
    successor = {chunk: streamed[(at + slots) % len(streamed)] for at, chunk in enumerate(streamed)}
    steady = _rows(table)
    for chunk in order:
        steady.append(_compute(chunk))
        if chunk in successor:
            steady += (_evict(chunk), _fetch(successor[chunk]))
    return tuple(steady)


def serial_schedule(table: ChunkTable, placement: Placement) -> Schedule:
    """The slow twin: nothing moves while something computes.  Uses one slot."""
    order, streamed = _orders(table, placement)
    is_streamed = set(streamed)
    first, steady = _rows(table), _rows(table)
    for chunk in order:
        first += [Fetch(chunk, chunk in placement.packed), Compute(chunk)]
        if chunk in placement.packed:
            first.append(Settle(chunk))
        steady += [Fetch(chunk), Compute(chunk)] if chunk in is_streamed else [Compute(chunk)]
        if chunk in is_streamed:
            first.append(Evict(chunk))
            steady.append(Evict(chunk))
    return Schedule(tuple(first + _tables(table, placement)), tuple(steady))


def _loading(
    table: ChunkTable,
    placement: Placement,
    *,
    guests: Collection[ChunkId] = (),
    settling: Collection[ChunkId] = (),
    there: Collection[ChunkId] = (),
    then: Sequence[ChunkId],
) -> Iterator[Step]:
    """A pass that also loads: all but `guests`, which stream, and what is `there` or on its way at the beginning.
    `settling` come through a slot and go home packed; `then` go through one in the next pass, the first ones begin now.

    Fetches run ahead of the computation by a window of bytes, in order of use; a chunk that finds no free slot waits
    for one while others pass it, so the disk never idles.
    """
    order, streamed = _orders(table, placement)
    through = {*streamed, *guests, *settling}
    as_guests = {*guests, *placement.packed}
    slots = min(placement.slots, len(through))
    free = slots - sum(chunk in through for chunk in there)
    window = max(_AHEAD_BYTES, (slots + 2) * table.slot_bytes)
    waiting: deque[ChunkId] = deque()
    next_pass = iter(then[: placement.slots])
    fetched = ahead = 0
    yield from _rows(table)
    for chunk in order:
        while fetched < len(order) and (ahead < window or order[fetched] == chunk):
            coming = order[fetched]
            fetched += 1
            ahead += table.chunks[coming].nbytes
            if coming in there:
                continue
            if coming not in through or free:
                free -= coming in through
                yield Fetch(coming, coming in as_guests)
            else:
                waiting.append(coming)
        yield Compute(chunk)
        ahead -= table.chunks[chunk].nbytes
        if chunk in through:
            yield Settle(chunk) if chunk in settling else Evict(chunk)
            free += 1
            if waiting:
                free -= 1
                yield Fetch(waiting[0], waiting.popleft() in as_guests)
            elif fetched == len(order):
                for following in islice(next_pass, free):
                    free -= 1
                    yield Fetch(following, following in as_guests)
    for following in next_pass:
        yield Fetch(following, following in as_guests)


def _orders(table: ChunkTable, placement: Placement) -> tuple[list[ChunkId], list[ChunkId]]:
    """All chunks with ops in order of use, and those of them that stream."""
    order = [chunk.id for chunk in table.streamable]
    return order, [chunk for chunk in order if not placement.resident(chunk)]


def _rows(table: ChunkTable) -> list[Step]:
    return [FetchRows()] if table.row_tables else []


def _tables(table: ChunkTable, placement: Placement) -> list[Step]:
    """Row tables that stay are loaded last: the first pass reads its few rows by themselves."""
    return [Fetch(chunk.id) for chunk in table.chunks if not chunk.ops and placement.home[chunk.id] == "host"]
