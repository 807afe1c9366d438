"""Make the plan of a run.  In: a ModelSpec, where its weights lie, settings, a machine.  Out: a Plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby, product
from pathlib import Path
from typing import Any

from zinfer.chunks.pack import assemble
from zinfer.chunks.source import Source
from zinfer.chunks.table import ALIGN, LOOSE_ALIGN, ChunkTable
from zinfer.config.machine import Machine
from zinfer.config.resolve import Resolved
from zinfer.errors import BudgetError, UsageError
from zinfer.plan.choose import choose
from zinfer.plan.curve import Curve, compute_curve
from zinfer.plan.forecast import engine_of
from zinfer.plan.kv import kv_plans, kv_reasons
from zinfer.plan.optimise import Candidate, Cheapest, cost_of, forecast_of, judge, least_cost
from zinfer.plan.place import Reserve, tier_uses
from zinfer.plan.profile import KV_PAGE_TOKENS, cache_tokens, graph_bytes, reserve_for, turns_of
from zinfer.plan.records import Budget, Forecast, KvPlan, Placement, Schedule, Tier, TierUse, Workload
from zinfer.plan.schedule import build_schedule
from zinfer.plan.settle import asked_workload, shrunk_workload
from zinfer.plan.shares import link_seconds
from zinfer.spec.quant import op_bytes
from zinfer.spec.records import ModelSpec, Op
from zinfer.units import round_up
from zinfer.whole import written_whole

_FORMAT = 1
_WAITING_SHARE = 0.02  # of a device: less than that is not worth the links' time
_SPARE_ROWS = 2  # rows of a pass are planned for twice T*: the first passes may show that it lies higher


@dataclass(frozen=True)
class Plan:
    """What will happen and how fast, before any weight is read.

    `workload` holds the batch and rows per pass that were settled on; `reasons` says why each setting is what it
    is.  The chunk table and schedule follow from the model, `limit` and `placement`.
    """

    architecture: str
    num_parameters: int
    device: str
    exact: bool
    machine: Machine
    budget: Budget
    workload: Workload
    reserve: Reserve
    limit: int
    align: int
    placement: Placement
    forecast: Forecast
    curve: Curve
    table: ChunkTable = field(repr=False)
    schedule: Schedule = field(repr=False)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def uses(self) -> tuple[TierUse, ...]:
        """What each memory tier holds at its peak, compute tier first."""
        return tier_uses(self.table, self.placement, self.budget, self.reserve, self.device)

    @property
    def kv_tokens(self) -> int:
        """Tokens that the planned KV cache holds, all sequences together."""
        return cache_tokens(self.workload)

    @property
    def stream_s(self) -> float:
        """The busiest link's seconds in a steady pass."""
        return link_seconds(self.forecast.busy_s)

    def covers(self, workload: Workload) -> bool:
        """Whether this plan also serves `workload`, so that no new plan is needed: no more and no longer requests."""
        mine, theirs = self.workload, workload
        if mine.num_requests and (theirs.num_requests or theirs.batch) > mine.num_requests:
            return False
        alike = replace(theirs, batch=min(theirs.batch, mine.batch))
        longest = round_up(mine.context, KV_PAGE_TOKENS)
        return theirs.context <= longest and cache_tokens(alike) <= self.kv_tokens

    def to_dict(self) -> dict[str, Any]:
        """The documented JSON form."""
        placement = asdict(self.placement)
        placement["home"] = [
            {"tier": str(tier), "chunks": len(list(run))} for tier, run in groupby(self.placement.home)
        ]
        return {
            "format": _FORMAT,
            "model": {
                "architecture": self.architecture,
                "num_parameters": self.num_parameters,
                "num_chunks": len(self.table.chunks),
                "weight_bytes": sum(chunk.weight_bytes for chunk in self.table.chunks),
            },
            "device": self.device,
            "exact": self.exact,
            "budget": asdict(self.budget),
            "workload": asdict(self.workload) | {"lengths": list(self.workload.lengths)},
            "reserve": asdict(self.reserve),
            "chunk_limit": self.limit,
            "align": self.align,
            "placement": placement,
            "tiers": [asdict(use) | {"total": use.total} for use in self.uses],
            "forecast": asdict(self.forecast),
            "curve": self.curve.to_dict(),
            "reasons": self.reasons,
            "machine": self.machine.model_dump(mode="json"),
        }

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON; the file appears whole or not at all.  Raises MachineError ZI-5931."""
        with written_whole(Path(path)) as file:
            file.write(json.dumps(self.to_dict(), indent=1).encode() + b"\n")

    @classmethod
    def load(cls, path: str | Path, source: Source) -> Plan:
        """Read what `save` wrote, for the model whose weights `source` describes.

        Raises UsageError ZI-1010 when the file is no plan, ZI-1011 when it was made for another model.
        """
        try:
            tree = json.loads(Path(path).read_text(encoding="utf-8"))
            homes = [Tier(run["tier"]) for run in tree["placement"]["home"] for _ in range(run["chunks"])]
            placement = Placement(
                **tree["placement"]
                | {"home": tuple(homes), "compute_tier": Tier(tree["placement"]["compute_tier"])}
            )
            model = tree["model"]
            table = assemble(_aligned(source, tree["align"]), tree["chunk_limit"])
            plan = cls(
                architecture=model["architecture"],
                num_parameters=model["num_parameters"],
                device=tree["device"],
                exact=tree["exact"],
                machine=Machine.model_validate(tree["machine"]),
                budget=Budget(**tree["budget"]),
                workload=Workload(
                    **tree["workload"]
                    | {"lengths": tuple(tree["workload"]["lengths"]), "kv": KvPlan(**tree["workload"]["kv"])}
                ),
                reserve=Reserve(**tree["reserve"]),
                limit=tree["chunk_limit"],
                align=tree["align"],
                placement=placement,
                forecast=Forecast(**tree["forecast"]),
                curve=Curve.from_dict(tree["curve"]),
                table=table,
                schedule=Schedule((), ()),
                reasons=tree["reasons"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                "ZI-1010", f"{path} holds no plan: {error!r}", remedy="zinfer plan MODEL --save plan.json"
            ) from error
        if len(homes) != len(table.chunks) or model["weight_bytes"] != sum(
            c.weight_bytes for c in table.chunks
        ):
            raise UsageError(
                "ZI-1011", f"{path} was made for another model", remedy="zinfer plan MODEL --save plan.json"
            )
        return replace(plan, schedule=build_schedule(table, placement, parks=plan.workload.parks))


def make_plan(
    spec: ModelSpec,
    source: Source,
    resolved: Resolved,
    machine: Machine,
    workload: Workload | None = None,
    *,
    batches: Sequence[int] = (),
) -> Plan:
    """Settle batch, rows per pass, chunk size, placement and lookahead, and predict the run.

    `batches` are batch sizes to choose from by the objective; none: the workload's own.  What the settings leave to
    "auto" shrinks until the plan fits: first the rows of a pass, then the batch.
    Raises BudgetError ZI-2001 with the smallest change that works, UsageError ZI-1012 for a context beyond the
    model's.
    """
    source = as_read(source, spec, device=resolved.device, exact=resolved.settings.exact)
    maker = _Maker(spec, source, resolved, machine.using(resolved.devices))
    workload = workload or Workload()
    if batches:
        candidate, reasons = maker.cheapest(workload, batches)
    else:
        candidate, reasons = maker.fitting(workload)
    return maker.plan(candidate, reasons)


def as_read(source: Source, spec: ModelSpec, *, device: str, exact: bool) -> Source:
    """The weights as a run of this kind wants them in memory.

    Published files seldom lie at multiples of ALIGN: moving what was read costs a core as much as reading it, every
    pass.  A processor reads a weight as fast from any address, only a library's bits may then be other than a store's.
    """
    sizes = dict(spec.product_sizes)
    is_library_free = all(sizes.get(op.kind) == () for op in spec.program if op.matrix and not op.stored)
    align = LOOSE_ALIGN if device == "cpu" and (is_library_free or not exact) else ALIGN
    return _aligned(source, align)


def _aligned(source: Source, align: int) -> Source:
    if align not in (ALIGN, LOOSE_ALIGN):
        raise ValueError(f"weights at multiples of {align} bytes")
    return source if source.align == align else replace(source, align=align)


@dataclass(frozen=True, slots=True)
class _Maker:
    """What stays the same while batch sizes are tried."""

    spec: ModelSpec
    source: Source
    resolved: Resolved
    machine: Machine

    @property
    def tier(self) -> Tier:
        return Tier.HOST if self.resolved.device == "cpu" else Tier.DEVICE

    @property
    def budget(self) -> Budget:
        return Budget(host=self.resolved.host_bytes, device=self.resolved.device_bytes)

    def cheapest(self, workload: Workload, batches: Sequence[int]) -> tuple[Candidate, dict[str, str]]:
        """The batch size that the objective likes best."""
        objective = self.resolved.settings.runtime.objective
        reasons: dict[int, dict[str, str]] = {}

        def sized(batch: int) -> Workload:
            return replace(workload, batch=batch)

        def planned(batch: int) -> Candidate:
            settled, reasons[batch] = self._asked(sized(batch))
            return self._judged(settled)

        def bound(batch: int) -> float:
            settled, _ = self._asked(sized(batch))
            kv, *others = kv_plans(self.spec, self.resolved, self.machine, settled)
            settled = replace(settled, kv=replace(kv, attend="resident"))
            reserve = self._reserve(settled, turns=())
            if others or kv.attend != "resident":  # the cache need not lie where the weights do
                reserve = replace(reserve, kv=0)
            weight_bytes = sum(op_bytes(self.spec, op) for op in self.spec.program)
            return least_cost(
                settled,
                reserve,
                self._curve(settled),
                self.budget,
                self.machine,
                weight_bytes,
                self.tier,
                objective,
            )

        search = Cheapest(planned, lambda candidate: cost_of(candidate, objective), bound)
        try:
            best = search.find(batches)
        except BudgetError:
            return self.fitting(replace(workload, batch=max(batches)))
        chosen = (
            f"auto: {best.workload.batch} sequences at once, best for {objective} of {len(batches)} sizes"
        )
        return best, reasons[best.workload.batch] | {"runtime.max_batch": chosen}

    def fitting(self, workload: Workload) -> tuple[Candidate, dict[str, str]]:
        """The workload as it was asked for, or the largest part of it that fits."""
        workload = replace(workload, num_requests=workload.num_requests or workload.batch)
        settled, reasons = self._asked(workload)
        try:
            return self._judged(settled), reasons
        except BudgetError:
            return self._shrunk(settled, reasons)

    def _shrunk(self, settled: Workload, reasons: dict[str, str]) -> tuple[Candidate, dict[str, str]]:
        """The largest part of a workload that fits, wherever the cache has to go for that."""
        least, refused = assemble(self.source, 1), None
        for kv in kv_plans(self.spec, self.resolved, self.machine, settled):
            try:
                smaller, cuts = shrunk_workload(
                    self.spec, self.resolved, replace(settled, kv=kv), least, self.budget, self.tier
                )
            except BudgetError as error:
                refused = refused or error
                continue
            return self._judged(smaller), reasons | cuts
        assert refused is not None, "there is at least one place for a cache"
        raise refused

    def plan(self, candidate: Candidate, reasons: dict[str, str]) -> Plan:
        """Predict the run of what was chosen."""
        choice, exact = candidate.choice, self.resolved.settings.exact
        if self.resolved.settings.runtime.lookahead == "auto":
            reasons["runtime.lookahead"] = (
                f"auto: {choice.placement.lookahead}, the fastest on the virtual clock"
            )
        reasons |= kv_reasons(self.resolved, candidate.workload.kv)
        return Plan(
            architecture=self.spec.architecture,
            num_parameters=self.spec.num_parameters,
            device=self.resolved.device,
            exact=exact,
            machine=self.machine,
            budget=self.budget,
            workload=candidate.workload,
            reserve=choice.reserve
            if self.resolved.settings.runtime.graphs == "off"
            else choice.reserve_with_recorded(self.spec, self.budget, device=self.resolved.device),
            limit=choice.limit,
            align=self.source.align,
            placement=choice.placement,
            forecast=forecast_of(self.spec, candidate, self.machine, exact=exact),
            curve=candidate.curve,
            table=choice.table,
            schedule=choice.schedule,
            reasons=self.resolved.reasons | reasons,
        )

    def _asked(self, workload: Workload) -> tuple[Workload, dict[str, str]]:
        compute_bytes = self.budget.host if self.tier is Tier.HOST else self.budget.device
        return asked_workload(self.spec, self.resolved, workload, compute_bytes)

    def _reserve(self, settled: Workload, *, turns: Sequence[Op] | None = None) -> Reserve:
        device, settings = self.resolved.device, self.resolved.settings
        reserve = reserve_for(self.spec, settled, exact=settings.exact, device=device, turns=turns)
        if not device.startswith("cuda") or settings.runtime.graphs == "off":
            return reserve
        return replace(reserve, activations=reserve.activations + graph_bytes(self.budget.device))

    def _curve(self, settled: Workload) -> Curve:
        engine = engine_of(self.machine, self.tier)
        return compute_curve(
            self.spec, engine, settled, exact=self.resolved.settings.exact, machine=self.machine
        )

    def _judged(self, settled: Workload) -> Candidate:
        """The best of the places where the cache may live; the next one is only tried while weights have to stream."""
        objective = self.resolved.settings.runtime.objective
        found: list[Candidate] = []
        refused: BudgetError | None = None
        for kv, parks in product(
            kv_plans(self.spec, self.resolved, self.machine, settled), self._parks(settled)
        ):
            try:
                found.append(self._with_rows(replace(settled, kv=kv, parks=parks)))
            except BudgetError as error:
                refused = refused or error
            if found and not found[-1].choice.placement.slots:
                break
        if not found:
            assert refused is not None, "there is at least one place for a cache"
            raise refused
        return min(found, key=lambda candidate: cost_of(candidate, objective))

    def _parks(self, settled: Workload) -> Sequence[bool]:
        """Whether waiting micro-batches may go below the device: no, and also yes where they take much of it."""
        park = self.resolved.settings.runtime.park
        if self.tier is Tier.HOST or settled.num_micros == 1 or park == "never":
            return (False,)
        if park == "always":
            return (True,)
        waiting = self._reserve(settled).activations - self._reserve(replace(settled, parks=True)).activations
        return (False, True) if waiting > self.budget.device * _WAITING_SHARE else (False,)

    def _with_rows(self, settled: Workload) -> Candidate:
        """Plan the workload; where fewer rows suit it than were asked for, the weights get their memory."""
        asked, runtime = self._placed(settled), self.resolved.settings.runtime
        if runtime.max_rows != "auto":
            return asked
        wanted = sorted(
            {max(_SPARE_ROWS * rows, settled.batch) for rows in (asked.token_rows, asked.full_rows)}
        )
        fewer = [
            self._placed(replace(settled, prefill_rows=rows))
            for rows in wanted
            if rows < settled.prefill_rows
        ]
        found = [*fewer, asked] if len(fewer) < len(wanted) else fewer
        return min(found, key=lambda candidate: cost_of(candidate, runtime.objective))

    def _placed(self, settled: Workload) -> Candidate:
        lookahead = self.resolved.settings.runtime.lookahead

        def reserve_of(table: ChunkTable | None) -> Reserve:
            return self._reserve(settled, turns=None if table is None else turns_of(self.spec, table))

        choice = choose(
            self.spec,
            self.source,
            self.budget,
            self.machine,
            settled,
            compute_tier=self.tier,
            reserve_of=reserve_of,
            exact=self.resolved.settings.exact,
            lookahead=None if lookahead == "auto" else lookahead,
        )
        objective = self.resolved.settings.runtime.objective
        curve = self._curve(settled)
        return judge(settled, choice, curve, machine=self.machine, objective=objective)
