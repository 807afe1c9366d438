"""Write down when chunks move.  In: a chunk table and a placement.  Out: the steps of the first and later passes."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from zinfer.chunks.table import PIECE_BYTES, ChunkId, ChunkTable
from zinfer.plan.records import Compute, Evict, Fetch, FetchRows, Placement, Schedule, Step

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
    slots = min(placement.slots, len(streamed))
    successor = {chunk: streamed[(at + slots) % len(streamed)] for at, chunk in enumerate(streamed)}
    steady = _rows(table)
    for chunk in order:
        steady.append(Compute(chunk))
        if chunk in successor:
            steady += [Evict(chunk), Fetch(successor[chunk])]
    return Schedule(tuple(_first(table, placement)), tuple(steady), parks)


def serial_schedule(table: ChunkTable, placement: Placement) -> Schedule:
    """The slow twin: nothing moves while something computes.  Uses one slot."""
    order, streamed = _orders(table, placement)
    is_streamed = set(streamed)
    first, steady = _rows(table), _rows(table)
    for chunk in order:
        first += [Fetch(chunk), Compute(chunk)]
        steady += [Fetch(chunk), Compute(chunk)] if chunk in is_streamed else [Compute(chunk)]
        if chunk in is_streamed:
            first.append(Evict(chunk))
            steady.append(Evict(chunk))
    return Schedule(tuple(first + _tables(table, placement)), tuple(steady))


def _first(table: ChunkTable, placement: Placement) -> list[Step]:
    """The pass that also loads.  Fetches run ahead of the computation by a window of bytes, in order of use; a
    streamed chunk that finds no free slot waits for one while resident ones pass it, so the disk never idles."""
    order, streamed = _orders(table, placement)
    is_streamed = set(streamed)
    free = slots = min(placement.slots, len(streamed))
    window = max(_AHEAD_BYTES, (slots + 2) * table.slot_bytes)
    steps = _rows(table)
    waiting: deque[ChunkId] = deque()
    next_pass = iter(streamed[:slots])
    fetched = ahead = 0
    for chunk in order:
        while fetched < len(order) and (ahead < window or order[fetched] == chunk):
            ahead += table.chunks[order[fetched]].nbytes
            if order[fetched] not in is_streamed:
                steps.append(Fetch(order[fetched]))
            elif free:
                free -= 1
                steps.append(Fetch(order[fetched]))
            else:
                waiting.append(order[fetched])
            fetched += 1
        steps.append(Compute(chunk))
        ahead -= table.chunks[chunk].nbytes
        if chunk in is_streamed:
            steps.append(Evict(chunk))
            if waiting:
                steps.append(Fetch(waiting.popleft()))
            elif fetched == len(order):
                steps.append(Fetch(next(next_pass)))
            else:
                free += 1
    return [*steps, *(Fetch(chunk) for chunk in next_pass), *_tables(table, placement)]


def _orders(table: ChunkTable, placement: Placement) -> tuple[list[ChunkId], list[ChunkId]]:
    """All chunks with ops in order of use, and those of them that stream."""
    order = [chunk.id for chunk in table.streamable]
    return order, [chunk for chunk in order if not placement.resident(chunk)]


def _rows(table: ChunkTable) -> list[Step]:
    return [FetchRows()] if table.row_tables else []


def _tables(table: ChunkTable, placement: Placement) -> list[Step]:
    """Row tables that stay are loaded last: the first pass reads its few rows by themselves."""
    return [Fetch(chunk.id) for chunk in table.chunks if not chunk.ops and placement.home[chunk.id] == "host"]
