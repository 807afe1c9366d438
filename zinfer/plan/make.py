"""Make the plan of a run.  In: a ModelSpec, where its weights lie, settings, a machine.  Out: a Plan."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from math import inf, log
from pathlib import Path
from typing import Any

from zinfer.chunks.at_home import packed_forms
from zinfer.chunks.pack import assemble
from zinfer.chunks.source import Source
from zinfer.chunks.table import ALIGN, LOOSE_ALIGN, ChunkTable
from zinfer.config.machine import Machine
from zinfer.config.resolve import Resolved
from zinfer.errors import UsageError
from zinfer.plan.candidates import Candidates
from zinfer.plan.curve import Curve
from zinfer.plan.kv import kv_reasons
from zinfer.plan.optimise import Candidate, forecast_of
from zinfer.plan.place import Reserve, tier_uses
from zinfer.plan.profile import KV_PAGE_TOKENS, cache_tokens, library_free
from zinfer.plan.records import Budget, Forecast, KvPlan, Placement, Schedule, Tier, TierUse, Workload
from zinfer.plan.schedule import build_schedule
from zinfer.plan.shares import link_seconds
from zinfer.spec.records import ModelSpec
from zinfer.units import round_up
from zinfer.watch import Watch, unwatched
from zinfer.whole import written_whole

_FORMAT = 1
_OTHER_DISK = 0.2  # a rate that is off by more than about a fifth may make another choice the better one


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
    def packed_bytes(self) -> tuple[int, int]:
        """What is packed in memory, as published and as it lies there."""
        packed = self.placement.packed
        published = sum(self.table.chunks[chunk].nbytes for chunk in packed)
        return published, sum(self.table.packed[chunk].nbytes for chunk in packed)

    @property
    def stream_s(self) -> float:
        """The busiest link's seconds in a steady pass."""
        return link_seconds(self.forecast.busy_s)

    @property
    def fill(self) -> float:
        """Times T* that passes carry, whatever T* turns out to be.  Infinite where all prompts at once are best: what a
        smaller T* leaves behind takes a pass of its own."""
        prompts = min(self.workload.batch * self.workload.prompt_len, self.workload.prefill_rows)
        takes_all = self.workload.num_requests is not None and self.forecast.full_rows >= prompts
        return inf if takes_all and self.forecast.fill > 1 else self.forecast.fill

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
        placement["guests"] = list(self.placement.guests)
        placement["packed"] = sorted(self.placement.packed)
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
    def load(cls, path: str | Path, source: Source, spec: ModelSpec | None = None) -> Plan:
        """Read what `save` wrote, for the model whose weights `source` describes; its spec is wanted for packed homes.

        Raises UsageError ZI-1010 when the file is no plan, ZI-1011 when it was made for another model.
        """
        try:
            tree = json.loads(Path(path).read_text(encoding="utf-8"))
            homes = [Tier(run["tier"]) for run in tree["placement"]["home"] for _ in range(run["chunks"])]
            placement = Placement(
                **tree["placement"]
                | {
                    "home": tuple(homes),
                    "compute_tier": Tier(tree["placement"]["compute_tier"]),
                    "guests": tuple(tree["placement"].get("guests", ())),
                    "packed": frozenset(tree["placement"].get("packed", ())),
                }
            )
            model = tree["model"]
            table = assemble(_aligned(source, tree["align"]), tree["chunk_limit"])
            if placement.packed and spec is not None:
                table = replace(table, packed=packed_forms(spec, table))
            if not placement.packed <= table.packed.keys():
                raise ValueError("it packs chunks, of which a model's spec tells how they lie")
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
    now: Callable[[], Machine] | None = None,
    watch: Watch = unwatched,
) -> Plan:
    """Settle batch, rows per pass, chunk size, placement and lookahead, and predict the run.

    `batches` are batch sizes to choose from by the objective; none: the workload's own.  What the settings leave to
    "auto" shrinks until the plan fits: first the rows of a pass, then the batch.  `now` may take a while to answer: all
    is chosen by `machine` meanwhile and foretold by what it says; a disk that is quite another one is chosen for again.
    Raises BudgetError ZI-2001 with the smallest change that works, UsageError ZI-1012 for a context beyond the
    model's.
    """
    source = as_read(source, spec, device=resolved.device, exact=resolved.settings.exact)
    candidates = Candidates(spec, source, resolved, machine.using(resolved.devices), watch)
    candidate, reasons = candidates.best(workload or Workload(), batches)
    if now is not None:
        known, candidates = candidates.machine, replace(candidates, machine=now().using(resolved.devices))
        if abs(log(candidates.machine.disk_read.bytes_per_s / known.disk_read.bytes_per_s)) > _OTHER_DISK:
            candidate, reasons = candidates.best(workload or Workload(), batches)
        else:
            candidate = candidates.again(candidate)
    return _plan_of(candidates, candidate, reasons)


def check_budget(
    spec: ModelSpec, source: Source, resolved: Resolved, machine: Machine, workload: Workload
) -> None:
    """Raises what `make_plan` would, and simulates nothing where it would not."""
    source = as_read(source, spec, device=resolved.device, exact=resolved.settings.exact)
    Candidates(spec, source, resolved, machine.using(resolved.devices)).check(workload)


def _plan_of(candidates: Candidates, candidate: Candidate, reasons: dict[str, str]) -> Plan:
    """Predict the run of what was chosen."""
    spec, resolved, machine = candidates.spec, candidates.resolved, candidates.machine
    exact, budget = resolved.settings.exact, candidates.budget
    choice, reserve = candidate.choice, candidate.choice.reserve
    if resolved.settings.runtime.lookahead == "auto":
        reasons["runtime.lookahead"] = f"auto: {choice.placement.lookahead}, the fastest on the virtual clock"
    if resolved.settings.runtime.graphs != "off":
        reserve = choice.reserve_with_recorded(spec, budget, device=resolved.device)
    return Plan(
        architecture=spec.architecture,
        num_parameters=spec.num_parameters,
        device=resolved.device,
        exact=exact,
        machine=machine,
        budget=budget,
        workload=candidate.workload,
        reserve=reserve,
        limit=choice.limit,
        align=candidates.source.align,
        placement=choice.placement,
        forecast=forecast_of(spec, candidate, machine, exact=exact),
        curve=candidate.curve,
        table=choice.table,
        schedule=choice.schedule,
        reasons=resolved.reasons | reasons | kv_reasons(resolved, candidate.workload.kv),
    )


def as_read(source: Source, spec: ModelSpec, *, device: str, exact: bool) -> Source:
    """The weights as a run of this kind wants them in memory.

    Published files seldom lie at multiples of ALIGN: moving what was read costs a core as much as reading it, every
    pass.  A processor reads a weight as fast from any address, only a library's bits may then be other than a store's.
    """
    align = LOOSE_ALIGN if device == "cpu" and (not exact or library_free(spec)) else ALIGN
    return _aligned(source, align)


def _aligned(source: Source, align: int) -> Source:
    if align not in (ALIGN, LOOSE_ALIGN):
        raise ValueError(f"weights at multiples of {align} bytes")
    return source if source.align == align else replace(source, align=align)
