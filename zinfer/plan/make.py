"""Make the plan of a run.  In: a ModelSpec, where its weights lie, settings, a machine.  Out: a Plan."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from zinfer.chunks.pack import assemble
from zinfer.chunks.source import Source
from zinfer.chunks.table import ChunkTable
from zinfer.config.machine import Machine
from zinfer.config.resolve import Resolved
from zinfer.errors import BudgetError, UsageError
from zinfer.plan.choose import Choice, choose
from zinfer.plan.forecast import forecast
from zinfer.plan.place import Reserve, tier_uses
from zinfer.plan.profile import KV_PAGE_TOKENS, reserve_for
from zinfer.plan.records import Budget, Forecast, Placement, Schedule, Tier, TierUse, Workload
from zinfer.plan.schedule import build_schedule
from zinfer.plan.settle import asked_workload, shrunk_workload
from zinfer.spec.records import ModelSpec
from zinfer.units import round_up

_FORMAT = 1


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
    placement: Placement
    forecast: Forecast
    table: ChunkTable = field(repr=False)
    schedule: Schedule = field(repr=False)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def uses(self) -> tuple[TierUse, ...]:
        """What each memory tier holds at its peak, compute tier first."""
        return tier_uses(self.table, self.placement, self.budget, self.reserve)

    @property
    def kv_tokens(self) -> int:
        """Tokens that the planned KV cache holds, all sequences together."""
        length = self.workload.prompt_len + self.workload.gen_len
        return self.workload.batch * round_up(length, KV_PAGE_TOKENS)

    def covers(self, workload: Workload) -> bool:
        """Whether this plan's cache also serves `workload`, so that no new plan is needed."""
        length = round_up(workload.prompt_len + workload.gen_len, KV_PAGE_TOKENS)
        return workload.batch <= self.workload.batch and length * workload.batch <= self.kv_tokens

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
            "workload": asdict(self.workload),
            "reserve": asdict(self.reserve),
            "chunk_limit": self.limit,
            "placement": placement,
            "tiers": [asdict(use) | {"total": use.total} for use in self.uses],
            "forecast": asdict(self.forecast),
            "reasons": self.reasons,
            "machine": self.machine.model_dump(mode="json"),
        }

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON; the file appears whole or not at all."""
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

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
            table = assemble(source, tree["chunk_limit"])
            plan = cls(
                architecture=model["architecture"],
                num_parameters=model["num_parameters"],
                device=tree["device"],
                exact=tree["exact"],
                machine=Machine.model_validate(tree["machine"]),
                budget=Budget(**tree["budget"]),
                workload=Workload(**tree["workload"]),
                reserve=Reserve(**tree["reserve"]),
                limit=tree["chunk_limit"],
                placement=placement,
                forecast=Forecast(**tree["forecast"]),
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
        return replace(plan, schedule=build_schedule(table, placement))


def make_plan(
    spec: ModelSpec,
    source: Source,
    resolved: Resolved,
    machine: Machine,
    workload: Workload | None = None,
) -> Plan:
    """Settle batch, rows per pass, chunk size, placement and lookahead, and predict the run.

    What the settings leave to "auto" shrinks until the plan fits: first the rows of a pass, then the batch.
    Raises BudgetError ZI-2001 with the smallest change that works, UsageError ZI-1012 for a context beyond the
    model's.
    """
    tier = Tier.HOST if resolved.device == "cpu" else Tier.DEVICE
    budget = Budget(host=resolved.host_bytes, device=resolved.device_bytes)
    lookahead = resolved.settings.runtime.lookahead
    exact = resolved.settings.exact

    def chosen(settled: Workload) -> Choice:
        return choose(
            spec,
            source,
            budget,
            machine,
            settled,
            compute_tier=tier,
            reserve=reserve_for(spec, settled, exact=exact),
            exact=exact,
            lookahead=None if lookahead == "auto" else lookahead,
        )

    compute_bytes = budget.host if tier is Tier.HOST else budget.device
    settled, reasons = asked_workload(spec, resolved, workload or Workload(), compute_bytes)
    try:
        choice = chosen(settled)
    except BudgetError:
        least = assemble(source, 1)
        settled, cuts = shrunk_workload(spec, resolved, settled, least, budget, tier)
        reasons |= cuts
        choice = chosen(settled)
    if lookahead == "auto":
        reasons["runtime.lookahead"] = f"auto: {choice.placement.lookahead}, the fastest on the virtual clock"
    return Plan(
        architecture=spec.architecture,
        num_parameters=spec.num_parameters,
        device=resolved.device,
        exact=exact,
        machine=machine,
        budget=budget,
        workload=settled,
        reserve=reserve_for(spec, settled, exact=exact),
        limit=choice.limit,
        placement=choice.placement,
        forecast=forecast(
            spec,
            choice.table,
            choice.placement,
            choice.schedule,
            machine,
            settled,
            choice.steady,
            exact=exact,
        ),
        table=choice.table,
        schedule=choice.schedule,
        reasons=resolved.reasons | reasons,
    )
