"""Say a plan in words.  In: a Plan.  Out: lines for people, and what other budgets or stores would buy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from zinfer.chunks.at_home import with_packed
from zinfer.chunks.table import PAGE, Chunk, ChunkTable, Read
from zinfer.errors import BudgetError
from zinfer.plan.cost import kind_of
from zinfer.plan.forecast import SteadyPasses, decode_load
from zinfer.plan.make import Plan
from zinfer.plan.optimise import PLANNING
from zinfer.plan.packing import packed_placement
from zinfer.plan.place import place, size_flag
from zinfer.plan.records import Budget, Forecast, KvPlan, Tier
from zinfer.plan.shares import COMPUTE, ROWS, largest_share, link_seconds, num_share_slots, ways_up
from zinfer.spec.lossless import LOSSLESS
from zinfer.spec.records import ModelSpec
from zinfer.spec.stored import PUBLISHED, as_stored, layouts, op_bytes, workspace_bytes
from zinfer.units import Bytes, rate_text, round_up, seconds_text
from zinfer.watch import Watch, unwatched

_MAP_WIDTH = 72
_OFFERED = (LOSSLESS, "int4")  # the most exact format and the smallest
_LETTERS = {Tier.DEVICE: "D", Tier.HOST: "H", Tier.DISK: "."}


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another budget, or another format of the weights, as flags, and the decode pass it would buy; None: no fit."""

    flags: str
    pass_s: float | None
    tokens_per_s: float | None
    kind: Literal["budgets", "stores"] = "budgets"


def alternatives(spec: ModelSpec, plan: Plan, watch: Watch = unwatched) -> list[Alternative]:
    """Half and twice the compute tier's budget, twice the host's, and all weights in the compute tier; of published
    weights that stream also two formats in which a store would hold them, at the plan's budget.

    Same chunks, cache and lookahead as the plan; for an exact answer plan again with the flags, or for the store.
    """
    tier = plan.placement.compute_tier
    have, host = (plan.budget.host, 0) if tier is Tier.HOST else (plan.budget.device, plan.budget.host)
    everything = plan.reserve.total + sum(chunk.nbytes for chunk in plan.table.streamable)
    sizes = sorted({have // 2, min(have * 2, everything), everything})
    budgets = [Budget(host=size) if tier is Tier.HOST else Budget(host, size) for size in sizes]
    if host:
        budgets.append(Budget(host * 2, have))
    stores = _OFFERED if plan.placement.slots > 0 and spec.weights == PUBLISHED else ()
    others = (*budgets, *stores)
    found: list[Alternative | None] = []
    for at, other in enumerate(others):
        watch(len(others) + at, 2 * len(others), PLANNING)  # the plan took about as long as all of them
        is_budget = isinstance(other, Budget)
        found.append(_alternative(spec, plan, other) if is_budget else with_store(spec, plan, other))
    return [other for other in found if other is not None]


def explain(plan: Plan, others: Sequence[Alternative] = ()) -> list[str]:
    """Lines of at most about 110 characters: what lives where, what a pass takes and why, what would be better."""
    forecast, workload = plan.forecast, plan.workload
    weights = sum(chunk.weight_bytes for chunk in plan.table.chunks)
    origin = "measured" if plan.machine.measured else "declared, not measured"
    exact = "exact" if plan.exact else "not exact"
    busy = sorted(forecast.busy_s.items(), key=lambda item: -item[1])
    unit, kind = ("text", "full") if workload.is_whole else ("token", "decode")
    return [
        f"model      {plan.architecture} · {_parameters(plan.num_parameters)} parameters · {Bytes(weights)} in "
        f"{len(plan.table.chunks)} chunks of up to {Bytes(plan.table.slot_bytes)}",
        f"machine    {plan.machine.name} ({origin}) · device {plan.device} · {exact}",
        f"workload   {workload.num_requests or 'endless'} requests, {workload.batch} at once · prompt "
        f"{workload.prompt_len} · generate {workload.gen_len} · at most {workload.prefill_rows} rows a pass",
        f"cache      {plan.kv_tokens} tokens in {workload.kv.tier} memory · {_kv_words(workload.kv)}",
        "",
        *_tier_lines(plan),
        f"chunks     {_map(plan)}",
        "           in order of use: " + " · ".join(_legend(plan)),
        *_packed_lines(plan),
        *_guest_lines(plan),
        "",
        *_link_lines(plan),
        f"pass       {seconds_text(forecast.pass_s)} per {kind} pass, bound by {forecast.binding}: "
        + " · ".join(f"{lane} {seconds_text(seconds)}" for lane, seconds in busy),
        f"           a pass carries up to {forecast.token_rows} rows before computation binds{_fuller(forecast)}",
        f"speed      {forecast.tokens_per_s:.3g} {unit}s/s · first {unit} after "
        f"{seconds_text(forecast.first_token_s)} · all after {seconds_text(forecast.job_s)}",
        *_alternative_lines(others),
        *(
            f"{'why' if at == 0 else '':<11}{key}: {why}"
            for at, (key, why) in enumerate(plan.reasons.items())
        ),
    ]


def explained_dict(plan: Plan, others: Sequence[Alternative] = ()) -> dict[str, Any]:
    """`Plan.to_dict` and the alternatives, for --json."""
    return plan.to_dict() | {"alternatives": [asdict(other) for other in others]}


def _packed_lines(plan: Plan) -> list[str]:
    published, taken = map(Bytes, plan.packed_bytes)
    return (
        [f"           {published} of what stays are packed into {taken}: the same bits"] if published else []
    )


def _guest_lines(plan: Plan) -> list[str]:
    guests = plan.placement.guests
    nbytes = Bytes(sum(plan.placement.at_home(plan.table, guest).nbytes for guest in guests))
    why = "memory comes slower than bytes from the disk"
    return [f"           {nbytes} of what stays comes with the second pass: {why}"] if guests else []


def _fuller(forecast: Forecast) -> str:
    """Where this job takes less time with fuller passes than those."""
    return f", up to {forecast.full_rows} for this job" if forecast.fill > 1 else ""


def _kv_words(kv: KvPlan) -> str:
    dtype = "int8 pages" if kv.dtype == "INT8" else "pages in the model's dtype"
    how = {
        "resident": "attended in place",
        "host": "attended by the host",
        "device": "brought up for every use",
    }
    return f"{dtype} · {how[kv.attend]}"


def _parameters(count: int) -> str:
    """70.55 B, 5.44 M."""
    return f"{count / 1e9:.2f} B" if count >= 1e8 else f"{count / 1e6:.2f} M"


def _alternative(spec: ModelSpec, plan: Plan, budget: Budget) -> Alternative:
    tier = plan.placement.compute_tier
    flags = size_flag(Tier.HOST, budget.host)
    if tier is Tier.DEVICE:
        flags = f"{size_flag(tier, budget.device)} {flags}"
    pass_s = _pass_s(spec, plan, plan.table, budget)
    return Alternative(flags, pass_s, plan.workload.batch / pass_s if pass_s else None)


def with_store(spec: ModelSpec, plan: Plan, weights: str) -> Alternative | None:
    """What `zinfer shard` would buy, wherever the layout is that of this machine's kernel; None for a model of which
    the format takes nothing."""
    stored = stand_in(spec, weights)
    if not any(op.stored for op in stored.program):
        return None
    table = replace(plan.table, chunks=tuple(_rewritten(spec, stored, plan.table.chunks)), packed={})
    unpacking = workspace_bytes(stored, plan.device)
    reserve = replace(plan.reserve, activations=plan.reserve.activations + unpacking)
    pass_s = _pass_s(stored, replace(plan, reserve=reserve), table, plan.budget)
    speed = plan.workload.batch / pass_s if pass_s else None
    return Alternative(f"zinfer shard --weights {weights}", pass_s, speed, "stores")


def stand_in(spec: ModelSpec, weights: str) -> ModelSpec:
    """What costs as much as the stored model: ops of one kind stand for each other, whatever their tensors' names."""
    kinds = [kind_of(spec, op) for op in spec.program]
    examples = dict(zip(kinds, spec.program, strict=True))
    stored = as_stored(replace(spec, program=tuple(examples.values())), weights, next(iter(layouts(weights))))
    standing = dict(zip(examples, stored.program, strict=True))
    return replace(stored, program=tuple([standing[kind] for kind in kinds]))


def _rewritten(spec: ModelSpec, stored: ModelSpec, chunks: Sequence[Chunk]) -> Iterator[Chunk]:
    """The same ops in one read of as many bytes as a store would hold of them."""
    standing = {id(op): op for op in stored.program}
    after = {number: op_bytes(stored, op) for number, op in standing.items()}
    for chunk in chunks:
        if not chunk.ops:
            yield chunk
            continue
        weight_bytes = sum([after[id(stored.program[op])] for op in chunk.ops])
        nbytes = round_up(chunk.nbytes - chunk.weight_bytes + weight_bytes, PAGE)
        reads = (Read(0, 0, nbytes, 0, nbytes),)
        yield replace(chunk, nbytes=nbytes, weight_bytes=weight_bytes, reads=reads, moves=())


def _pass_s(spec: ModelSpec, plan: Plan, table: ChunkTable, budget: Budget) -> float | None:
    """A decode pass of these chunks under this budget, packed where the plan packs; None where they do not fit."""
    tier, lookahead = plan.placement.compute_tier, plan.placement.lookahead or 1
    try:
        placement = place(table, budget, compute_tier=tier, reserve=plan.reserve, lookahead=lookahead)
    except BudgetError:
        return None
    if table.packed and placement.slots:
        placement = packed_placement(table, placement)
    spec = with_packed(spec, table, placement.packed)
    load = decode_load(plan.workload)
    return SteadyPasses(spec, table, plan.machine, load, exact=plan.exact).under(placement).seconds


def _tier_lines(plan: Plan) -> list[str]:
    names = ("weights", "slots", "staging", "KV", "activations")
    lines = [f"{'':<11}" + "".join(f"{name:>12}" for name in names) + f"{'used':>12}   of budget"]
    for use in plan.uses:
        parts = (use.resident, use.slots, use.staging, use.kv, use.activations, use.total)
        cells = "".join(f"{str(Bytes(part)) if part else '-':>12}" for part in parts)
        lines.append(f"{use.tier:<11}{cells}   of {Bytes(use.budget)}")
    on_disk = [chunk for chunk in plan.table.streamable if plan.placement.home[chunk.id] is Tier.DISK]
    if on_disk:
        lines.append(
            f"{'disk':<11}{Bytes(sum(chunk.nbytes for chunk in on_disk))!s:>12}   read in every pass"
        )
    return lines


def _link_lines(plan: Plan) -> list[str]:
    """Of several devices: what each link carries while all do, which of them bind, and what they cost in memory."""
    ways = ways_up(plan.machine)
    if len(ways) < 2:
        return []
    rates = [way.bytes_per_s for way in ways]
    busy_s = plan.forecast.busy_s
    bind_s = link_seconds(busy_s)
    shares = [
        f"{way.hops[0][0]} {rate_text(way.bytes_per_s)} ({way.bytes_per_s / sum(rates):.0%})" for way in ways
    ]
    binding = [
        lane for lane, seconds in busy_s.items() if seconds >= 0.95 * bind_s and lane not in (COMPUTE, ROWS)
    ]
    staging = [
        f"{Bytes(num_share_slots(plan.placement) * largest_share(plan.placement.slot_bytes, rates, at))} on device {at}"
        for at in range(1, len(ways))
    ]
    return [
        f"links      {' + '.join(shares)} = {rate_text(sum(rates))} · gathered on the first device",
        f"           bound by {' and '.join(binding) or 'none'} · staging for shares: {', '.join(staging)}",
    ]


def _map(plan: Plan) -> str:
    """One letter per chunk in order of use; of long models a sample."""
    homes = [plan.placement.home[chunk.id] for chunk in plan.table.streamable]
    step = max(len(homes) / _MAP_WIDTH, 1)
    picked = [homes[int(at * step)] for at in range(min(len(homes), _MAP_WIDTH))]
    return "".join(_LETTERS[tier] for tier in picked)


def _legend(plan: Plan) -> list[str]:
    homes = [plan.placement.home[chunk.id] for chunk in plan.table.streamable]
    return [f"{letter} {tier} ({homes.count(tier)})" for tier, letter in _LETTERS.items() if tier in homes]


def _alternative_lines(others: Sequence[Alternative]) -> list[str]:
    if not others:
        return []
    width = max(len(other.flags) for other in others)
    lines, said = [""], ""
    for other in others:
        bought = "does not fit"
        if other.pass_s is not None:
            bought = f"{seconds_text(other.pass_s):>8} per pass · {other.tokens_per_s:.3g} tokens/s"
        lines.append(
            f"{other.kind if other.kind != said else '':<11}{other.flags:<{width}}  {bought}{_price(other)}"
        )
        said = other.kind
    return [*lines, ""]


def _price(other: Alternative) -> str:
    """What a store's format costs beside the disk."""
    if other.kind == "budgets" or other.pass_s is None:
        return ""
    return " · the same bits" if other.flags.endswith(LOSSLESS) else " · weights are rounded"
