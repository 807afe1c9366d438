"""Another plan for the same chunks, between passes.  In: a plan that runs.  Out: one for other budgets or rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from zinfer.chunks.at_home import with_packed
from zinfer.chunks.table import ChunkId
from zinfer.config.machine import Machine
from zinfer.errors import BudgetError
from zinfer.plan.choose import Choice
from zinfer.plan.curve import compute_curve
from zinfer.plan.forecast import SteadyPasses, decode_load, engine_of
from zinfer.plan.make import Plan
from zinfer.plan.optimise import Candidate, batch_sizes, cost_of, forecast_of, judge
from zinfer.plan.packing import packed_placement
from zinfer.plan.place import place
from zinfer.plan.profile import reserve_for, turns_of
from zinfer.plan.records import Budget, Placement, Workload
from zinfer.spec.records import ModelSpec

_WORTH = 0.95  # a revision is made when the rest takes less than this share, the move included


def rebudget(spec: ModelSpec, plan: Plan, budget: Budget) -> Plan:
    """The same cache under another budget, looking less far ahead where that fits and as far does not.

    Raises BudgetError ZI-2001 with the smallest budget that would do.
    """
    lookahead = plan.placement.lookahead or 1
    try:
        again = _again(spec, plan, plan.workload, budget, plan.machine, {})
    except BudgetError:
        if lookahead == 1:
            raise
        fewer = replace(plan.placement, lookahead=lookahead - 1)  # fewer slots leave more to what must stay
        return rebudget(spec, replace(plan, placement=fewer), budget)
    return _plan_of(spec, replace(plan, budget=budget), again, plan.machine)


def revised(
    spec: ModelSpec,
    plan: Plan,
    asked: Workload,
    *,
    scale: Mapping[str, float],
    stream_scale: float,
    is_begun: bool = True,
) -> Plan | None:
    """The batch size that suits what is asked for and what passes really took; None while the present one is as good.

    `asked` is the plan's workload with the lengths and the number of the requests that have not ended (None: a queue
    without end); `scale` and `stream_scale` are measured over predicted, by group of ops and for the links.  What a
    change costs counts: chunks to be read that were not resident, and, where a cache `is_begun`, its tokens, which
    are computed again.
    """
    machine = _corrected(plan.machine, stream_scale)
    workload, remaining = asked, asked.num_requests
    objective = "throughput"
    now = _again(spec, plan, workload, plan.budget, machine, scale)
    best, best_cost = now, cost_of(now, objective)
    limit = _WORTH * best_cost
    for batch in batch_sizes(remaining):
        if batch == workload.batch or batch > workload.prefill_rows:
            continue
        try:
            other = _again(spec, plan, replace(workload, batch=batch), plan.budget, machine, scale)
        except BudgetError:
            continue
        cost = cost_of(other, objective)
        if remaining is not None:
            cost += _move_s(plan, other, machine, is_begun=is_begun)
        if cost < min(limit, best_cost):
            best, best_cost = other, cost
    if best is now:
        return None
    found = _plan_of(spec, plan, best, machine)  # which goes on to serve as many requests as the plan did
    return replace(found, workload=replace(found.workload, num_requests=plan.workload.num_requests))


def moved_chunks(plan: Plan, placement: Placement) -> list[ChunkId]:
    """Chunks that another placement keeps in the compute tier and this plan's does not, or in another form."""
    ids, now = [chunk.id for chunk in plan.table.streamable], plan.placement
    other_form = placement.packed ^ now.packed
    return [
        chunk
        for chunk in ids
        if placement.resident(chunk) and (not now.resident(chunk) or chunk in other_form)
    ]


def _again(
    spec: ModelSpec,
    plan: Plan,
    workload: Workload,
    budget: Budget,
    machine: Machine,
    scale: Mapping[str, float],
) -> Candidate:
    """Place the plan's chunks anew and simulate."""
    tier = plan.placement.compute_tier
    turns = turns_of(spec, plan.table)
    reserve = reserve_for(spec, workload, exact=plan.exact, device=plan.device, turns=turns)
    lookahead = plan.placement.lookahead or 1
    placement = place(plan.table, budget, compute_tier=tier, reserve=reserve, lookahead=lookahead)
    if plan.table.packed and placement.slots:
        placement = packed_placement(plan.table, placement)
    spec = with_packed(spec, plan.table, placement.packed)
    passes = SteadyPasses(spec, plan.table, machine, decode_load(workload), exact=plan.exact)
    steady = passes.under(placement)
    engine = engine_of(machine, tier)
    curve = compute_curve(spec, engine, workload, exact=plan.exact, machine=machine).scaled(scale)
    choice = Choice(plan.limit, plan.table, reserve, placement, steady, workload.parks)
    return judge(workload, choice, curve, machine=machine)


def _plan_of(spec: ModelSpec, plan: Plan, candidate: Candidate, machine: Machine) -> Plan:
    choice = candidate.choice
    return replace(
        plan,
        workload=candidate.workload,
        reserve=choice.reserve_with_recorded(spec, plan.budget, device=plan.device),
        placement=choice.placement,
        schedule=choice.schedule,
        curve=candidate.curve,
        forecast=forecast_of(spec, candidate, machine, exact=plan.exact),
    )


def _corrected(machine: Machine, stream_scale: float) -> Machine:
    disk = machine.disk_read.model_copy(update={"bytes_per_s": machine.disk_read.bytes_per_s / stream_scale})
    h2d = machine.h2d and machine.h2d.model_copy(
        update={"bytes_per_s": machine.h2d.bytes_per_s / stream_scale}
    )
    links = tuple(
        link.model_copy(update={"together_bytes_per_s": link.together_bytes_per_s / stream_scale})
        for link in machine.links
    )
    return machine.model_copy(update={"disk_read": disk, "h2d": h2d, "links": links})


def _move_s(plan: Plan, other: Candidate, machine: Machine, *, is_begun: bool) -> float:
    """Seconds until the other placement stands and the cache is as full as it was."""
    chunks = plan.table.chunks
    nbytes = sum(chunks[chunk].nbytes for chunk in moved_chunks(plan, other.choice.placement))
    refed = plan.workload.batch * (plan.workload.prompt_len + plan.workload.gen_len // 2)
    return machine.disk_read.seconds(nbytes) + (other.curve.at(refed) if is_begun else 0.0)
