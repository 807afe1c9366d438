"""Settle what a plan is made of.  In: a model, settings, a machine, a workload.  Out: the best candidate, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from zinfer.chunks.pack import assemble
from zinfer.chunks.source import Source
from zinfer.chunks.table import ChunkTable
from zinfer.config.machine import Machine
from zinfer.config.resolve import Resolved
from zinfer.errors import BudgetError
from zinfer.plan.choose import choose, recorded_room
from zinfer.plan.curve import Curve, compute_curve
from zinfer.plan.forecast import SteadyPasses, decode_load, engine_of
from zinfer.plan.guests import with_guests, without_guests
from zinfer.plan.kv import kv_plans
from zinfer.plan.optimise import PLANNING, Candidate, Cheapest, cost_of, judge, least_cost
from zinfer.plan.packing import with_packing
from zinfer.plan.place import Reserve, smallest_budget, tier_uses
from zinfer.plan.profile import graph_bytes, library_free, reserve_for, turns_of
from zinfer.plan.records import Budget, Tier, Workload
from zinfer.plan.settle import asked_workload, shrunk_workload
from zinfer.spec.records import ModelSpec, Op
from zinfer.spec.stored import op_bytes
from zinfer.watch import Watch, unwatched

_WAITING_SHARE = 0.02  # of a device: less than that is not worth the links' time
_SPARE_ROWS = 2  # rows of a pass are planned for twice T*: the first passes may show that it lies higher

Chosen = tuple[Candidate, dict[str, str]]  # and the reasons for what was left to "auto"


@dataclass(frozen=True, slots=True)
class Candidates:
    """What stays the same while batch sizes are tried; `source` as it will be read."""

    spec: ModelSpec
    source: Source
    resolved: Resolved
    machine: Machine
    watch: Watch = unwatched

    @property
    def tier(self) -> Tier:
        return Tier.HOST if self.resolved.device == "cpu" else Tier.DEVICE

    @property
    def budget(self) -> Budget:
        return Budget(host=self.resolved.host_bytes, device=self.resolved.device_bytes)

    def best(self, workload: Workload, batches: Sequence[int]) -> Chosen:
        """The best of `batches`, or (none) the workload's own."""
        self.watch(0, max(len(batches), 1), PLANNING)
        candidate, reasons = self.cheapest(workload, batches) if batches else self.fitting(workload)
        return self._with_packing(self._with_guests(candidate)), reasons

    def again(self, candidate: Candidate) -> Candidate:
        """The same choice under this machine, which differs from the other one in its disk's rate and free memory."""
        choice, settled = candidate.choice, candidate.workload
        is_there = bool(choice.placement.guests) and self.machine.there.nbytes > 0
        if is_there:  # fewer need wait for the second pass
            choice = without_guests(choice)
        passes = SteadyPasses(
            choice.spec_of(self.spec),
            choice.table,
            self.machine,
            decode_load(settled),
            exact=self.resolved.settings.exact,
        )
        choice = replace(choice, steady=passes.under(choice.placement))
        objective = self.resolved.settings.runtime.objective
        again = judge(settled, choice, candidate.curve, machine=self.machine, objective=objective)
        return self._with_guests(again) if is_there else again

    def check(self, workload: Workload) -> None:
        """Raises BudgetError as `best` would: where single ops fit beside the least look-ahead it finds something."""
        settled, _ = self._asked(replace(workload, num_requests=workload.num_requests or workload.batch))
        least, lookahead = assemble(self.source, 1), self.resolved.settings.runtime.lookahead
        turns = turns_of(self.spec, least)
        for kv, parks in product(
            kv_plans(self.spec, self.resolved, self.machine, settled), self._parks(settled)
        ):
            reserve = self._reserve(replace(settled, kv=kv, parks=parks), turns=turns)
            need = smallest_budget(
                least,
                compute_tier=self.tier,
                reserve=reserve,
                lookahead=1 if lookahead == "auto" else lookahead,
            )
            if need.host <= self.budget.host and need.device <= self.budget.device:
                return
        self.fitting(workload)

    def _with_packing(self, candidate: Candidate) -> Candidate:
        """Only where our kernels multiply with packed weights, and to the bits of published ones in exact mode: where
        nobody has asked the kernels (`zinfer plan`) a profile whose exact passes are recorded says so.
        """
        runtime, exact = self.resolved.settings.runtime, self.resolved.settings.exact
        has_kernels = self.machine.host.step_cost(exact=exact).replayed_op_s is not None
        is_library = exact and bool(self.spec.product_sizes) and not library_free(self.spec)
        if runtime.pack == "never" or not has_kernels or is_library:
            return candidate
        use, *_ = tier_uses(
            candidate.choice.table, candidate.choice.placement, self.budget, candidate.choice.reserve
        )
        return with_packing(
            self.spec,
            candidate,
            self.machine,
            spare=max(use.budget - use.total - self._room(candidate.workload), 0),
            objective=runtime.objective,
            exact=exact,
            always=runtime.pack == "always",
        )

    def _with_guests(self, candidate: Candidate) -> Candidate:
        return with_guests(self.spec, candidate, self.machine, exact=self.resolved.settings.exact)

    def cheapest(self, workload: Workload, batches: Sequence[int]) -> Chosen:
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

        search = Cheapest(planned, lambda candidate: cost_of(candidate, objective), bound, self.watch)
        try:
            best = search.find(batches)
        except BudgetError:
            return self.fitting(replace(workload, batch=max(batches)))
        chosen = (
            f"auto: {best.workload.batch} sequences at once, best for {objective} of {len(batches)} sizes"
        )
        return best, reasons[best.workload.batch] | {"runtime.max_batch": chosen}

    def fitting(self, workload: Workload) -> Chosen:
        """The workload as it was asked for, or the largest part of it that fits."""
        workload = replace(workload, num_requests=workload.num_requests or workload.batch)
        settled, reasons = self._asked(workload)
        try:
            return self._judged(settled), reasons
        except BudgetError:
            return self._shrunk(settled, reasons)

    def _shrunk(self, settled: Workload, reasons: dict[str, str]) -> Chosen:
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

    def _asked(self, workload: Workload) -> tuple[Workload, dict[str, str]]:
        compute_bytes = self.budget.host if self.tier is Tier.HOST else self.budget.device
        return asked_workload(self.spec, self.resolved, workload, compute_bytes)

    def _reserve(self, settled: Workload, *, turns: Sequence[Op] | None = None) -> Reserve:
        device, settings = self.resolved.device, self.resolved.settings
        reserve = reserve_for(self.spec, settled, exact=settings.exact, device=device, turns=turns)
        if not device.startswith("cuda") or settings.runtime.graphs == "off":
            return reserve
        return replace(reserve, activations=reserve.activations + graph_bytes(self.budget.device))

    def _room(self, settled: Workload) -> int:
        settings = self.resolved.settings
        records = self.machine.host.step_cost(exact=settings.exact).replayed_op_s is not None
        if self.resolved.device != "cpu" or settings.runtime.graphs == "off" or not records:
            return 0  # a host without our kernels would keep the room and record nothing
        return recorded_room(self.spec, settled, self.budget, exact=settings.exact)

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
            room=self._room(settled),
        )
        objective = self.resolved.settings.runtime.objective
        curve = self._curve(settled)
        return judge(settled, choice, curve, machine=self.machine, objective=objective)
