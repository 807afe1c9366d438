"""Choose how many sequences run at once.  In: a queue and what each batch size costs.  Out: the cheapest candidate.

A larger batch carries more tokens per pass but its cache takes memory from the weights: with a fixed number of
requests weights win early, with an open queue the cache does, until computation binds.  Nothing of that is a rule
here; every candidate is planned and its queue simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from typing import Generic, TypeVar

from zinfer.config.machine import Machine, Overlap
from zinfer.errors import BudgetError
from zinfer.plan.choose import Choice
from zinfer.plan.curve import Curve
from zinfer.plan.forecast import forecast
from zinfer.plan.passes import PassSeconds, best_fill
from zinfer.plan.place import Reserve
from zinfer.plan.queue import QueueRun, queue_passes
from zinfer.plan.records import Budget, Forecast, Tier, Workload
from zinfer.plan.shares import link_seconds
from zinfer.plan.tokens import TokenBudget
from zinfer.spec.records import ModelSpec
from zinfer.watch import Watch, unwatched

C = TypeVar("C")

PLANNING = "planning"  # what is watched: one plan or size of a batch after another
MAX_BATCH = 512  # beyond it the scheduler's own time begins to show


@dataclass(frozen=True)
class Candidate:
    """One batch size, planned: what runs at once, where the chunks live, and how its queue would go."""

    workload: Workload
    choice: Choice
    curve: Curve
    run: QueueRun
    token_rows: int  # T*
    full_rows: int  # what its passes are filled to
    pass_s: PassSeconds

    @property
    def stream_s(self) -> float:
        """The busiest link's seconds in a steady pass."""
        return link_seconds(self.choice.steady.busy_s)


def judge(
    workload: Workload,
    choice: Choice,
    curve: Curve,
    *,
    machine: Machine,
    objective: str = "throughput",
) -> Candidate:
    """Simulate the queue of a planned batch size, with passes as full as suits it."""
    is_shared = choice.placement.compute_tier is Tier.HOST
    overlap = machine.overlap if is_shared else Overlap()
    pass_s = PassSeconds.of(choice.steady, curve, overlap, workload.batch)
    stream_s = link_seconds(choice.steady.busy_s)
    budget = TokenBudget(curve, stream_s, batch=workload.batch, max_rows=workload.prefill_rows)
    full_rows, run = best_fill(workload, budget.rows, pass_s, objective)
    return Candidate(workload, choice, curve, run, budget.rows, full_rows, pass_s)


def forecast_of(spec: ModelSpec, candidate: Candidate, machine: Machine, *, exact: bool) -> Forecast:
    """Predict the run of a planned batch size."""
    choice = candidate.choice
    return forecast(
        choice.spec_of(spec),
        choice.table,
        choice.placement,
        choice.schedule,
        machine,
        candidate.workload,
        choice.steady,
        queue_s=candidate.run.seconds,
        token_rows=candidate.token_rows,
        full_rows=candidate.full_rows,
        exact=exact,
    )


def open_tokens_per_s(candidate: Candidate) -> float:
    """Output tokens per second of a queue that never ends: decode tokens over a pass that also feeds newcomers."""
    workload = candidate.workload
    rows = workload.batch * (1 + workload.prompt_len / workload.gen_len)
    return workload.batch / candidate.pass_s(round(rows))


def batch_sizes(num_requests: int | None) -> list[int]:
    """Sizes worth a trial, largest first: 1, 2, 3, 4, 6, 8, 12, ... up to the number of requests."""
    limit = min(num_requests or MAX_BATCH, MAX_BATCH)
    sizes = {size for power in range(10) for size in (2**power, 3 * 2**power) if size <= limit}
    return sorted(sizes | {limit}, reverse=True)


def cost_of(candidate: Candidate, objective: str) -> float:
    """What is made small: seconds of the job, seconds per token of an open queue, or a request's mean seconds."""
    if objective == "latency":
        return candidate.run.mean_finish_s
    if candidate.workload.num_requests is None:
        return 1 / open_tokens_per_s(candidate)
    return candidate.run.seconds


class Cheapest(Generic[C]):
    """Branch and bound: plans in order of `bound`, and stops where no bound is below the best cost found.

    `bound(item)` may never exceed `cost(plan(item))`; then the answer is that of planning every item.
    """

    def __init__(
        self,
        plan: Callable[[int], C],
        cost: Callable[[C], float],
        bound: Callable[[int], float],
        watch: Watch = unwatched,
    ) -> None:
        self._plan, self._cost, self._bound, self._watch = plan, cost, bound, watch
        self.num_planned = 0

    def find(self, items: Iterable[int]) -> C:
        """The cheapest of those that can be planned.  Raises the last BudgetError where none can."""
        best: C | None = None
        best_cost, refused = inf, None
        waiting = sorted((self._bound(item), -item) for item in items)
        for at, (bound, item) in enumerate(waiting):
            if bound >= best_cost:
                break
            self._watch(at, at + sum(other < best_cost for other, _ in waiting[at:]), PLANNING)
            try:
                candidate = self._plan(-item)
            except BudgetError as error:
                refused = error
                continue
            self.num_planned += 1
            cost = self._cost(candidate)
            if cost < best_cost:
                best, best_cost = candidate, cost
        if best is None:
            assert refused is not None, "there was nothing to choose from"
            raise refused
        return best


def least_cost(
    workload: Workload,
    reserve: Reserve,
    curve: Curve,
    budget: Budget,
    machine: Machine,
    weight_bytes: int,
    tier: Tier,
    objective: str,
) -> float:
    """A lower bound of `cost_of` that needs no placement: links move at least what fits nowhere, at full rate, and
    computation never costs less per row than in the fullest pass."""
    if objective == "latency":
        return 0.0
    room = (budget.device if tier is Tier.DEVICE else budget.host) - reserve.total
    missing = max(weight_bytes - max(room, 0), 0)
    stream_s = missing / machine.up_bytes_per_s if tier is Tier.DEVICE else 0.0
    unhoused = missing - budget.host if tier is Tier.DEVICE else missing
    stream_s = max(stream_s, unhoused / machine.disk_read.bytes_per_s)
    per_row_s = curve.at(workload.prefill_rows) / workload.prefill_rows
    if workload.num_requests is None:
        rows = workload.batch * (1 + workload.prompt_len / workload.gen_len)
        return max(stream_s, curve.at(round(rows))) / workload.batch
    passes = len(queue_passes(workload, workload.prefill_rows)) if workload.num_requests <= 4096 else 0
    rows = workload.num_requests * (workload.prompt_len + workload.gen_len - 1)
    return max(passes * stream_s, rows * per_row_s)
