"""Predict a run before any weight is read.  In: a model, a placement, a machine, a workload.  Out: seconds, and why."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from zinfer.chunks.table import ChunkTable
from zinfer.config.machine import Compute, Machine
from zinfer.plan.cost import ChunkSeconds, PassLoad, chunk_seconds
from zinfer.plan.records import Forecast, Placement, Schedule, Tier, Workload
from zinfer.plan.schedule import steady_steps
from zinfer.plan.shares import COMPUTE, ROWS
from zinfer.plan.simulate import PassRun, least_seconds, simulate, simulate_passes, simulate_steady
from zinfer.spec.records import ModelSpec

_ROW_READS_IN_FLIGHT = 4


def forecast(
    spec: ModelSpec,
    table: ChunkTable,
    placement: Placement,
    schedule: Schedule,
    machine: Machine,
    workload: Workload,
    steady: PassRun,
    *,
    queue_s: float,
    token_rows: int,
    full_rows: int,
    exact: bool,
) -> Forecast:
    """Simulate the first passes, which load and prefill, and a later prefill.

    `steady` is a decode pass, simulated; `queue_s` what all requests take once everything is loaded, in passes of
    about `full_rows` rows.  Uses the machine's rates only, no timing of a run.
    """
    prefill = prefill_load(workload, full_rows)
    first, later = simulate_load(spec, table, placement, schedule, machine, prefill, exact=exact)
    more_s = 0.0  # that the second pass takes for its guests
    if schedule.second:
        then, usual_s = second_load(workload, prefill, steady.seconds, later.seconds)
        loading = simulate_loading(spec, table, placement, schedule, machine, [prefill, then], exact=exact)
        more_s = max(loading[1].seconds - usual_s, 0.0)
    num_feeds = ceil(workload.prompt_len / prefill.rows)
    decode = pass_costs(spec, table, placement, machine, decode_load(workload), exact=exact)
    return Forecast(
        first_token_s=first.seconds + (num_feeds - 1) * later.seconds + (more_s if num_feeds > 1 else 0.0),
        pass_s=steady.seconds,
        prefill_s=later.seconds,
        tokens_per_s=decode_load(workload).sequences / steady.seconds,
        job_s=max(first.seconds - later.seconds, 0.0) + more_s + queue_s,
        token_rows=token_rows,
        full_rows=full_rows,
        binding=_binding(steady, decode),
        bytes_per_pass=steady.bytes,
        busy_s=steady.busy_s,
    )


def decode_load(workload: Workload) -> PassLoad:
    """A decode pass half-way through the generation; of whole texts a full pass of the longest."""
    if workload.is_whole:
        texts = min(max(workload.prefill_rows // workload.context, 1), workload.batch)
        return PassLoad(texts * workload.context, texts, workload.context)
    return PassLoad(
        workload.batch, workload.batch, workload.prompt_len + ceil(workload.gen_len / 2), workload.kv
    )


def prefill_load(workload: Workload, full_rows: int) -> PassLoad:
    """The first pass: as many of the prompts' tokens as it may carry."""
    rows = min(workload.batch * workload.prompt_len, full_rows)
    sequences, logits = max(rows // workload.prompt_len, 1), workload.logits_of(rows)
    return PassLoad(rows, sequences, workload.prompt_len, workload.kv, logits)


def second_load(
    workload: Workload, prefill: PassLoad, decode_s: float, prefill_s: float
) -> tuple[PassLoad, float]:
    """What the second pass carries, and what it would take with everything loaded: more prompts, or one token each."""
    if workload.batch * workload.prompt_len > prefill.rows:
        return prefill, prefill_s
    return decode_load(workload), decode_s


def simulate_load(
    spec: ModelSpec,
    table: ChunkTable,
    placement: Placement,
    schedule: Schedule,
    machine: Machine,
    load: PassLoad,
    *,
    exact: bool,
) -> tuple[PassRun, PassRun]:
    """The first and a steady pass under one load."""
    costs = pass_costs(spec, table, placement, machine, load, exact=exact)
    rows_s = row_seconds(table, placement, machine, load.rows)
    return simulate(table, placement, schedule, machine, [cost.total for cost in costs], rows_s=rows_s)


class SteadyPasses:
    """Steady passes of one table's chunks under one load, for placement after placement."""

    def __init__(
        self, spec: ModelSpec, table: ChunkTable, machine: Machine, load: PassLoad, *, exact: bool
    ) -> None:
        self._spec, self._table, self._machine, self._load, self._exact = spec, table, machine, load, exact
        self._compute_s: dict[tuple[Tier, bool], list[float]] = {}

    def under(self, placement: Placement) -> PassRun:
        """The pass on the virtual clock."""
        table, machine, compute_s = self._table, self._machine, self._computing(placement)
        rows_s = row_seconds(table, placement, machine, self._load.rows)
        steps = steady_steps(table, placement)
        return simulate_steady(table, placement, steps, machine, compute_s, rows_s=rows_s)

    def least_s(self, placement: Placement) -> float:
        """Less than that it cannot take, as a look at the sums says."""
        return least_seconds(self._table, placement, self._machine, self._computing(placement))

    def _computing(self, placement: Placement) -> Sequence[float]:
        kind = (placement.compute_tier, placement.slots == 0)
        if kind not in self._compute_s:
            costs = pass_costs(
                self._spec, self._table, placement, self._machine, self._load, exact=self._exact
            )
            self._compute_s[kind] = [cost.total for cost in costs]
        return self._compute_s[kind]


def simulate_loading(
    spec: ModelSpec,
    table: ChunkTable,
    placement: Placement,
    schedule: Schedule,
    machine: Machine,
    loads: Sequence[PassLoad],
    *,
    exact: bool,
) -> list[PassRun]:
    """The passes that load, under one load each."""
    costs = [pass_costs(spec, table, placement, machine, load, exact=exact) for load in loads]
    return simulate_passes(
        table,
        placement,
        schedule,
        machine,
        [[cost.total for cost in each] for each in costs],
        rows_s=[row_seconds(table, placement, machine, load.rows) for load in loads],
    )


def pass_costs(
    spec: ModelSpec,
    table: ChunkTable,
    placement: Placement,
    machine: Machine,
    load: PassLoad,
    *,
    exact: bool,
) -> list[ChunkSeconds]:
    """Compute seconds of every chunk on the engine of the compute tier; the last one also samples."""
    engine = engine_of(machine, placement.compute_tier)
    all_stay = not placement.slots  # else room for recordings is scarce, and each chunk needs a lease
    costs = chunk_seconds(spec, table, engine, load, exact=exact, machine=machine, all_stay=all_stay)
    last = table.streamable[-1].id
    sampling_s = engine.token_overhead_s * load.sequences
    costs[last] = ChunkSeconds(costs[last].work, costs[last].overhead + sampling_s)
    return costs


def row_seconds(table: ChunkTable, placement: Placement, machine: Machine, rows: int) -> float:
    """What the embedding rows of a pass take: single reads for the tables that no tier holds."""
    held = {
        chunk.tensors[0].name
        for chunk in table.chunks
        if not chunk.ops and placement.home[chunk.id] is not Tier.DISK
    }
    num_reads = rows * sum(name not in held for name in table.row_tables)
    return ceil(num_reads / _ROW_READS_IN_FLIGHT) * machine.disk_row_latency_s


def engine_of(machine: Machine, compute_tier: Tier) -> Compute:
    """The rates of what multiplies in that tier."""
    if compute_tier is Tier.HOST:
        return machine.host
    assert machine.device is not None, "a machine without a device was given device chunks"
    return machine.device


def _binding(steady: PassRun, costs: list[ChunkSeconds]) -> str:
    """The engine or link that works longest in a steady pass; fixed costs count apart from computation."""
    work, overhead = sum(cost.work for cost in costs), sum(cost.overhead for cost in costs)
    busy_s = {lane: seconds for lane, seconds in steady.busy_s.items() if lane != ROWS} | {
        COMPUTE: work + overhead
    }
    longest = max(busy_s, key=lambda lane: busy_s[lane])
    return "overhead" if longest == COMPUTE and overhead > work else longest
