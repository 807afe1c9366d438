"""Keep more of what stays by packing it.  In: a planned batch, a machine.  Out: the same, perhaps with packed homes.

Weights that are published in bfloat16 lie in three quarters of their bytes without loss (`zinfer.spec.lossless`), and
a host's kernels multiply with them as they lie, to the same bits.  So the same budget keeps a third more of them and
passes read less; each is packed once, behind its first use, while the disk brings the next.  A product with packed
weights takes longer: where computation binds, or a job is short, they stay as published.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import compress

from zinfer.chunks.at_home import packed_forms
from zinfer.chunks.table import ChunkTable
from zinfer.config.machine import Machine
from zinfer.plan.curve import compute_curve
from zinfer.plan.forecast import SteadyPasses, decode_load, engine_of
from zinfer.plan.guests import with_guests
from zinfer.plan.optimise import Candidate, cost_of, forecast_of, judge
from zinfer.plan.place import fewest, size_steps
from zinfer.plan.records import Placement, Tier
from zinfer.spec.records import ModelSpec

_WORTH = 0.98  # of the cost without: less is not worth another form


def with_packing(
    spec: ModelSpec,
    candidate: Candidate,
    machine: Machine,
    *,
    spare: int,
    objective: str,
    exact: bool,
    always: bool,
) -> Candidate:
    """The candidate with what stays packed, where that costs less; `spare` bytes of the budget hold nothing yet.

    Pure.  `candidate` has its guests already, and so has what is returned.  Where nothing streams, nothing is read
    ahead or nothing can be packed it is as it was; with `always` it is packed whatever that costs.
    """
    choice = candidate.choice
    if choice.placement.compute_tier is not Tier.HOST or not choice.placement.lookahead:
        return candidate
    table = replace(choice.table, packed=packed_forms(spec, choice.table))
    placement = packed_placement(table, choice.placement, spare)
    if not placement.packed:
        return candidate
    other = replace(choice, table=table, placement=placement)
    inside = other.spec_of(spec)
    passes = SteadyPasses(inside, table, machine, decode_load(candidate.workload), exact=exact)
    other = replace(other, steady=passes.under(placement))
    engine = engine_of(machine, Tier.HOST)
    curve = compute_curve(inside, engine, candidate.workload, exact=exact, machine=machine)
    found = judge(candidate.workload, other, curve, machine=machine, objective=objective)
    found = with_guests(spec, found, machine, exact=exact)
    if always:
        return found

    def cost(planned: Candidate) -> float:
        if planned.workload.num_requests is None or objective != "throughput":
            return cost_of(planned, objective)
        return forecast_of(spec, planned, machine, exact=exact).job_s  # which counts packing

    return found if cost(found) < _WORTH * cost(candidate) else candidate


def packed_placement(table: ChunkTable, placement: Placement, spare: int = 0) -> Placement:
    """As many slots, perhaps larger, and homes for as many chunks as fit packed where published ones lay, and into
    `spare` bytes; of equals with the fewest packed.  None is packed that has no such form or fits no slot.
    """
    total = spare + placement.slots * placement.slot_bytes
    total += sum(chunk.nbytes for chunk in table.streamable if placement.resident(chunk.id))
    caps = {placement.slot_bytes, *size_steps([chunk.nbytes for chunk in table.streamable])}
    found = [_packed(table, placement, total, cap) for cap in sorted(caps, reverse=True)]
    return min(filter(None, found), key=lambda each: _cost(table, each), default=placement)


def _packed(table: ChunkTable, placement: Placement, total: int, slot_bytes: int) -> Placement | None:
    """With slots of that size and all else of `total` bytes for homes; None where that does not do."""
    chunks, room = table.streamable, total - placement.slots * slot_bytes
    may_move = [chunk for chunk in chunks if chunk.nbytes <= slot_bytes]
    may_pack = [chunk for chunk in may_move if chunk.id in table.packed]
    published = {chunk.id: chunk.nbytes for chunk in chunks}
    at_home = published | {chunk.id: table.packed[chunk.id].nbytes for chunk in may_pack}
    excess = sum(at_home.values()) - room
    if excess > sum(at_home[chunk.id] for chunk in may_move):
        return None
    leaving = compress(may_move, fewest([at_home[chunk.id] for chunk in may_move], excess))
    streamed = {chunk.id for chunk in leaving}
    packed = {chunk.id for chunk in may_pack} - streamed
    if excess <= 0:  # all stay, and only so many need be packed
        saved = [chunk.nbytes - at_home[chunk.id] for chunk in may_pack]
        packed = {chunk.id for chunk in compress(may_pack, fewest(saved, sum(published.values()) - room))}
    home = list(placement.home)
    for chunk in chunks:
        home[chunk.id] = Tier.DISK if chunk.id in streamed else placement.compute_tier
    return replace(placement, home=tuple(home), slot_bytes=slot_bytes, packed=frozenset(packed), guests=())


def _cost(table: ChunkTable, placement: Placement) -> tuple[int, int]:
    """Bytes that stream, and bytes that are packed."""
    streamed = sum(chunk.nbytes for chunk in table.streamable if not placement.resident(chunk.id))
    return streamed, sum(table.chunks[chunk].nbytes for chunk in placement.packed)
