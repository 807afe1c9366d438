"""Choose who comes to stay with the second pass.  In: a planned batch, a machine.  Out: the same, perhaps with guests.

Where memory that nobody has used yet comes slower than bytes from the disk, a first pass that loads all that stays
waits for memory.  Chunks that go through a slot in the first pass and come to stay in the second, which waits for the
disk and leaves the processor idle, cost their bytes once more and spare the first token that wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import compress

from zinfer.chunks.table import ChunkId, ChunkTable
from zinfer.config.machine import Machine
from zinfer.plan.choose import Choice
from zinfer.plan.forecast import prefill_load, second_load, simulate_load, simulate_loading
from zinfer.plan.optimise import Candidate
from zinfer.plan.place import spread
from zinfer.plan.records import Placement, Tier
from zinfer.plan.schedule import build_schedule
from zinfer.spec.records import ModelSpec

_PARTS = 4  # what may wait does so in quarters
_WORTH = 0.98  # of the first pass: less is not worth reading anything twice
_BOTH = 1.1  # of the first two passes: what the second may take longer than the first is spared


def with_guests(spec: ModelSpec, candidate: Candidate, machine: Machine, *, exact: bool) -> Candidate:
    """The candidate with those guests that make its first pass shortest and the first two together hardly longer.

    Pure: from rates alone, as everything in a plan.  Where nothing streams, memory is no slower than the disk as far as
    is known, or the compute tier is a device's, there are none.
    """
    choice, workload = candidate.choice, candidate.workload
    placement = choice.placement
    may_wait = placement.compute_tier is Tier.HOST and placement.lookahead > 0 and not workload.is_whole
    if not may_wait or machine.fresh_bytes_per_s is None:
        return candidate
    spec = choice.spec_of(spec)
    prefill = prefill_load(workload, candidate.full_rows)
    first, later = simulate_load(
        spec, choice.table, placement, choice.schedule, machine, prefill, exact=exact
    )
    then, usual_s = second_load(workload, prefill, choice.steady.seconds, later.seconds)
    best, best_s, both_s = choice, first.seconds * _WORTH, _BOTH * (first.seconds + usual_s)
    for guests in _shares(choice.table, placement):
        invited = replace(placement, guests=guests)
        schedule = build_schedule(choice.table, invited, parks=workload.parks)
        loading = simulate_loading(
            spec, choice.table, invited, schedule, machine, [prefill, then], exact=exact
        )
        first_s, second_s = (run.seconds for run in loading)
        if first_s < best_s and first_s + second_s <= both_s:
            best, best_s = replace(choice, placement=invited), first_s
    return replace(candidate, choice=best)


def without_guests(choice: Choice) -> Choice:
    """The same choice, all that stays coming with the first pass."""
    return replace(choice, placement=replace(choice.placement, guests=()))


def _shares(table: ChunkTable, placement: Placement) -> Iterator[tuple[ChunkId, ...]]:
    """Parts of the chunks that stay and would fit a slot, evenly spread, the smallest part first."""
    stay = [
        chunk
        for chunk in table.streamable
        if placement.resident(chunk.id) and chunk.nbytes <= placement.slot_bytes
    ]
    sizes, ids = [chunk.nbytes for chunk in stay], [chunk.id for chunk in stay]
    counts = {len(stay) * part // _PARTS for part in range(1, _PARTS + 1)}
    for count in sorted(counts - {0}):
        yield tuple(compress(ids, spread(sizes, count)))
