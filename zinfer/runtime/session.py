"""A model with its plan and, while it is wanted, its engine.  In: jobs from any thread.  Out: their events."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from zinfer.errors import BudgetError, UsageError, ZinferError
from zinfer.memory.devices import give_back_cached
from zinfer.memory.faults import is_lost
from zinfer.plan.make import Plan
from zinfer.plan.records import Budget, Tier, Workload
from zinfer.plan.revise import rebudget
from zinfer.runtime.adapt import adapt, suit
from zinfer.runtime.engine import Engine, open_engine
from zinfer.runtime.loop import Event
from zinfer.runtime.model import Model
from zinfer.runtime.request import Request
from zinfer.runtime.stats import Stats
from zinfer.runtime.text import TextState
from zinfer.runtime.turns import Turns
from zinfer.watch import Watch, unwatched

_WINDOW = 256  # jobs that are looked at ahead of the passes: what the plan of a feed is made for


@dataclass(slots=True)
class Job:
    """A request and its text; `number` counts within its caller's jobs.  With `error` it is not carried out."""

    number: int
    request: Request
    text: TextState
    error: ZinferError | None = None


class Session:
    """Plans for what is asked, opens the engine late, and lets callers share its passes.

    A request that the plan does not cover makes a new one: the engine is closed, which needs it idle.  The lock is
    held within a pass only, so that a caller who stops reading blocks nobody.
    """

    def __init__(self, model: Model, *, trace: Path | None = None, watch: Watch = unwatched) -> None:
        model.check_budget()
        self.model = model
        self._plan_now: Plan | None = None
        self._stats: Stats | None = None
        self._lock = Turns()
        self._engine: Engine | None = None
        self._is_fitted = False
        self._num_callers = 0
        self._trace = trace
        self._watch = watch

    @property
    def plan(self) -> Plan:
        """The one that is followed, or that a small request would follow."""
        with self._lock:
            return self._plan_now or self._follow(self.model.plan())

    @property
    def stats(self) -> Stats:
        """Of the engine of that plan."""
        with self._lock:
            forecast = self.plan.forecast
            self._stats = self._stats or Stats(forecast)
            return self._stats

    def fit(self, requests: Sequence[Request], *, is_open: bool = False) -> Plan:
        """The plan that these requests (`is_open`: and more like them) will follow; nothing is read yet."""
        with self._lock:
            self._is_fitted = False
            self._plan_for(requests, is_open=is_open)
            self._is_fitted = True
            return self.plan

    def run(self, jobs: Sequence[Job]) -> Iterator[Event]:
        """Carry all jobs out; events as passes end.  Closing the iterator early forgets what has not ended."""
        with self._lock:
            self._plan_for([job.request for job in jobs])
            engine = self._open()
            for job in jobs:
                engine.loop.scheduler.refuse_impossible(job.request)
            for job in jobs:
                engine.submit(job.request, job.text)
            is_alone = not self._num_callers
            self._num_callers += 1
        running = {job.request.id: job.request for job in jobs}
        try:
            if is_alone:
                with self._lock:
                    if suit(engine):
                        self._plan_now = engine.plan
            while running:
                yield from self._next_events(engine, running)
        finally:
            with self._lock:
                self._num_callers -= 1
                for request in running.values():
                    engine.drop(request)

    def feed(self, jobs: Iterable[Job]) -> Iterator[Job]:
        """Carry out jobs of any number, each given back when it has ended; pulled as the passes have room.

        One that the plan does not cover waits until the others have ended; then a plan is made for what comes.
        """
        source = iter(jobs)
        ahead: deque[Job] = deque()
        while True:
            ahead.extend(islice(source, _WINDOW - len(ahead)))
            while ahead and ahead[0].error is not None:
                yield ahead.popleft()
            if not ahead:
                return
            try:
                requests = [job.request for job in ahead if job.error is None]
                plan = self._fit_most(requests, is_open=len(ahead) == _WINDOW)
            except BudgetError as error:
                ahead[0].error = error
                continue
            yield from self._feed(plan, source, ahead)

    def set_memory(self, memory: Mapping[str, object]) -> Plan:
        """Other budgets from the next pass on, for keys of `settings.memory`; running requests go on.

        What stays resident under both is not read again; on a CUDA device the engine is opened anew, which needs it
        idle.  Raises BudgetError when the new budget is too small, and the old one holds.
        """
        with self._lock:
            model = self.model.with_memory(memory, *self._held())
            if self._engine is None:
                self._follow(model.plan(self.plan.workload))
            elif self._engine.can_adopt:
                resolved = model.resolved
                budget = Budget(host=resolved.host_bytes, device=resolved.device_bytes)
                plan = rebudget(model.spec, self._engine.plan, budget)
                self._engine.adopt(plan)
                self._plan_now = plan
            elif self._num_callers:
                raise UsageError(
                    "ZI-1108",
                    "budgets on a CUDA device change between generations, one is running",
                    remedy="let it end first",
                )
            else:
                self._follow(model.plan(self.plan.workload))
                self.close()
            self.model = model
            return self.plan

    def _held(self) -> tuple[int, int]:
        """Bytes of host and device memory that are ours."""
        if self._engine is None:
            return 0, 0
        manager = self._engine.manager
        is_below = manager.placement.compute_tier is Tier.DEVICE
        return manager.ledger(Tier.HOST).used_bytes, manager.ledger(Tier.DEVICE).used_bytes if is_below else 0

    def close(self) -> None:
        """Give memory, files and threads back.  The next request opens the engine again."""
        with self._lock:
            self._is_fitted = False
            self.model.end_look()
            if self._engine is not None:
                device, engine, self._engine = self._engine.plan.device, self._engine, None
                engine.close()
                del engine
                give_back_cached(device)

    def _fit_most(self, requests: Sequence[Request], *, is_open: bool) -> Plan:
        """A plan for the first request and as many others as fit beside it, the shorter ones rather than the longer.

        Raises BudgetError when the first does not fit alone.
        """
        first, *others = requests
        others.sort(key=lambda request: request.max_kv_tokens)
        while True:
            try:
                return self.fit([first, *others], is_open=is_open)
            except BudgetError:
                if not others:
                    raise
                del others[len(others) // 2 :]

    def _feed(self, plan: Plan, source: Iterator[Job], ahead: deque[Job]) -> Iterator[Job]:
        """Under one plan: until the jobs end, or one comes that the plan does not cover and all others are done."""
        with self._lock:
            engine = self._open()
            self._num_callers += 1
        running: dict[int, Request] = {}
        jobs: dict[int, Job] = {}
        try:
            while True:
                while len(running) < 2 * plan.workload.batch:
                    if not ahead:
                        ahead.extend(islice(source, 1))
                    if not ahead or (
                        ahead[0].error is None and not self.plan.covers(self._workload([ahead[0].request]))
                    ):
                        break
                    job = ahead.popleft()
                    if job.error is not None:
                        yield job
                        continue
                    with self._lock:
                        engine.submit(job.request, job.text)
                    running[job.request.id] = job.request
                    jobs[job.request.id] = job
                if not running:
                    return
                for event in self._next_events(engine, running):
                    if event.is_finished:
                        yield jobs.pop(event.request.id)
        finally:
            with self._lock:
                self._num_callers -= 1
                for request in running.values():
                    engine.drop(request)

    def _next_events(self, engine: Engine, running: dict[int, Request]) -> Iterator[Event]:
        """Events of these requests, after a pass if none wait; who has ended leaves `running`."""
        with self._lock:
            try:
                events = engine.next_events(list(running.values()))
            except ZinferError as error:
                if is_lost(error):
                    self.close()  # every caller is told the same; the next request looks whether it can be opened
                raise
            if adapt(engine):
                self._plan_now, self.model = engine.plan, engine.model
            for event in events:
                if event.is_finished:
                    engine.drop(running.pop(event.request.id))
        yield from events

    def _plan_for(self, requests: Sequence[Request], *, is_open: bool = False) -> None:
        workload = self._workload(requests, is_open=is_open)
        # A plan without rows of logits carries few per pass: it is replaced unless somebody is using it.
        is_apt = self._num_callers > 0 or not workload.logit_rows or bool(self.plan.workload.logit_rows)
        if (self._engine is not None or self._is_fitted) and is_apt and self.plan.covers(workload):
            return  # a plan that was asked for holds for smaller requests too
        if self._num_callers:
            raise UsageError(
                "ZI-1108",
                "a request needs a larger plan while another generation is running",
                remedy="let it end first, or set runtime.context and runtime.max_batch for both",
            )
        self._follow(self._plan(workload))
        self.close()

    def _follow(self, plan: Plan) -> Plan:
        """Another plan from now on, and nothing done under it yet."""
        self._plan_now, self._stats = plan, Stats(plan.forecast)
        return plan

    def _plan(self, workload: Workload) -> Plan:
        """A plan that also serves what the engine served before, where that fits: whoever asks by turns for long and
        for short, or for text and for logits, must not pay for loading each time."""
        if self._engine is not None:
            with suppress(BudgetError):
                joined = self.model.plan(workload.joined(self.plan.workload))
                if joined.covers(workload):
                    return joined
        return self.model.plan(workload)

    def _workload(self, requests: Sequence[Request], *, is_open: bool = False) -> Workload:
        lengths = [(len(request.prompt_ids), request.params.max_tokens) for request in requests]
        scored = [
            request.num_logit_rows(0, len(request.prompt_ids)) for request in requests if request.on_logits
        ]
        return self.model.workload(lengths, is_open=is_open, logit_rows=sum(scored) or None)

    def _open(self) -> Engine:
        """The engine of the plan as it is."""
        if self._engine is None:
            self._engine = open_engine(
                self.model, self.plan, self.stats, trace=self._trace, watch=self._watch
            )
        return self._engine
