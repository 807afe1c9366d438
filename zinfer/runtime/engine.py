"""Put an engine together.  In: a model and its plan.  Out: tiers, cache, executor and loop, ready to run."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from zinfer.errors import ZinferError
from zinfer.kernels import columns, products, stored
from zinfer.kvcache.cache import PagedKv
from zinfer.kvcache.pages import PAGE_TOKENS
from zinfer.kvcache.spill import spill_folder
from zinfer.layers.shapes import prepare_attention
from zinfer.memory.assemble import open_manager
from zinfer.memory.faults import explained, is_lost
from zinfer.memory.heap import give_freed_memory_back
from zinfer.memory.manager import ChunkManager
from zinfer.parallel.aggregate import by_several_links
from zinfer.plan.make import Plan
from zinfer.plan.profile import graph_bytes
from zinfer.plan.records import Tier, Workload
from zinfer.plan.tokens import TokenBudget
from zinfer.runtime.achieved import note_disk
from zinfer.runtime.executor import Executor
from zinfer.runtime.garbage import OLD_OBJECTS
from zinfer.runtime.graph import graphs_for
from zinfer.runtime.loop import Event, Loop
from zinfer.runtime.model import Model
from zinfer.runtime.moments import WatchedMoments
from zinfer.runtime.request import Request
from zinfer.runtime.scheduler import Scheduler
from zinfer.runtime.stats import Stats
from zinfer.runtime.text import TextState
from zinfer.runtime.trace import Recorder, Span, TraceRecorder
from zinfer.watch import Watch, unwatched


@dataclass
class Engine:
    """A running engine.  Owns the chunk manager (threads, files, tiers) and the cache until close().

    Several callers may have requests in it: whoever needs an event drives the next pass for all of them.
    """

    model: Model
    plan: Plan
    manager: ChunkManager
    kv: PagedKv
    loop: Loop
    stats: Stats
    recorder: Recorder
    begin_s: float
    trace_file: Path | None = None
    inbox: dict[int, deque[Event]] = field(default_factory=dict)  # by request, until its caller collects
    settled_for: Workload | None = None  # what the batch size was last chosen for; none: what the plan is for
    fault: ZinferError | None = None  # the device is lost: what every caller is told from then on

    def submit(self, request: Request, text: TextState) -> None:
        """Queue a request.  Raises BudgetError ZI-2201 when the cache cannot hold it even alone."""
        self.loop.submit(request, text)
        if not self.inbox:
            OLD_OBJECTS.hold()
        self.inbox[request.id] = deque()

    def drop(self, request: Request) -> None:
        """Forget a request and what it was given; one that is unknown or has ended is no matter."""
        self.loop.drop(request)
        if self.inbox.pop(request.id, None) is not None and not self.inbox:
            OLD_OBJECTS.let_go()

    def next_events(self, requests: Sequence[Request]) -> list[Event]:
        """What these requests were given since the last call, after a pass if that is nothing."""
        if self.fault is not None:
            raise self.fault
        events = self._collect(requests)
        if not events:
            self._step()
            events = self._collect(requests)
        return events

    def _step(self) -> None:
        try:
            events = self.loop.step()
        except ZinferError as error:
            self.fault = error if is_lost(error) else None
            raise
        finally:
            self._note()
        if events and self.stats.first_token_s is None:
            self.stats.first_token_s = time.perf_counter() - self.begin_s
        for event in events:
            self.stats.num_tokens += event.token_id is not None
            self.stats.shared_tokens += event.request.num_shared if event.is_finished else 0
            self.inbox[event.request.id].append(event)

    def _collect(self, requests: Sequence[Request]) -> list[Event]:
        events = [event for request in requests for event in self.inbox[request.id]]
        for event in events:
            self.inbox[event.request.id].clear()
        return events

    @property
    def can_adopt(self) -> bool:
        """Whether `adopt` works here: a device's slab and page-locked memory are of one size for good."""
        return not self.plan.device.startswith("cuda")

    def adopt(self, plan: Plan, *, is_corrected: bool = False) -> None:
        """Follow another plan for the same chunks from the next pass on; nothing that stays is read again.

        With another cache all sequences are computed again.  Raises BudgetError ZI-2401, and the old plan holds.
        """
        has_other_cache = (plan.kv_tokens, plan.workload.kv) != (self.plan.kv_tokens, self.plan.workload.kv)
        if has_other_cache:
            self.loop.scheduler.preempt_all()
        self.loop.executor.let_go()
        self.manager.adopt(
            plan.placement,
            {Tier.HOST: plan.budget.host, Tier.DEVICE: plan.budget.device},
            _reservations(plan),
        )
        if has_other_cache:
            self.kv.end()
            self.kv = self.loop.kv = _open_cache(self.model, plan, self.manager)
        self.plan = plan
        self.stats.forecast = plan.forecast
        self.loop.executor.follow(plan.schedule)
        if self.loop.executor.graphs is not None and plan.device == "cpu":
            self.loop.executor.graphs.resize(plan.reserve.recorded)
        self.loop.scheduler.follow(self.kv, plan.workload.batch)
        self.loop.budget.follow(
            plan.curve,
            plan.stream_s,
            batch=plan.workload.batch,
            max_rows=plan.workload.prefill_rows,
            fill=plan.fill,
            is_corrected=is_corrected,
        )

    def close(self) -> None:
        """Give everything back and write the trace; may be called again."""
        if self.inbox:
            OLD_OBJECTS.let_go()
            self.inbox.clear()
        self._note()
        note_disk(self.plan, self.stats.passes)
        self.kv.end()
        with (
            nullcontext() if self.fault is None else suppress(RuntimeError)
        ):  # a lost device refuses this too
            self.loop.executor.let_go()  # graphs keep memory, which the slab's end gives back to the device
            self.manager.close()
        if self.trace_file is not None and isinstance(self.recorder, TraceRecorder):
            self.recorder.save(self.trace_file)

    def _note(self) -> None:
        held = self.manager.stats()
        self.stats.peak_bytes = held.peak_bytes
        self.stats.surprises = held.surprises
        self.stats.locked_bytes = max(self.stats.locked_bytes, held.locked_bytes)
        graphs = self.loop.executor.graphs
        self.stats.graph_replays = 0 if graphs is None else graphs.num_replays
        self.stats.preemptions = asdict(self.loop.scheduler.preemptions)
        self.stats.token_rows = self.loop.budget.rows
        if self.recorder.is_recording:
            self.recorder.add(
                Span(
                    move.link,
                    "rows" if move.chunk is None else f"chunk {move.chunk}",
                    move.begin_s,
                    move.end_s,
                )
                for move in self.manager.log.drain()
            )


def open_engine(
    model: Model, plan: Plan, stats: Stats, *, trace: Path | None = None, watch: Watch = unwatched
) -> Engine:
    """Allocate what the plan says and start the threads; the first pass loads.

    Raises BudgetError, MachineError; nothing is left then.
    """
    begin_s = time.perf_counter()
    manager, executor = open_executor(model, plan, stats, trace=trace, watch=watch)
    try:
        kv = _open_cache(model, plan, manager)
    except BaseException as error:
        manager.close()
        if typed := explained(error, "for the key-value cache"):
            raise typed from error
        raise
    budget = TokenBudget(
        plan.curve,
        plan.stream_s,
        batch=plan.workload.batch,
        max_rows=plan.workload.prefill_rows,
        fill=plan.fill,
    )
    scheduler = Scheduler(
        kv,
        max_batch=plan.workload.batch,
        max_rows=plan.workload.prefill_rows,
        max_logit_rows=plan.workload.logit_rows,
        wants_spill=_wants_spill(model, plan, budget),
    )
    loop = Loop(executor, kv, scheduler, budget, micro_rows=plan.workload.micro_rows)
    return Engine(model, plan, manager, kv, loop, stats, executor.recorder, begin_s, trace)


def _open_cache(model: Model, plan: Plan, manager: ChunkManager) -> PagedKv:
    kv = plan.workload.kv
    return PagedKv(
        num_layers=model.spec.num_layers,
        num_kv_heads=model.spec.num_kv_heads,
        head_dim=model.spec.head_dim,
        num_pages=plan.kv_tokens // PAGE_TOKENS,
        dtype=kv.dtype or model.spec.dtype,
        device=manager.device if kv.attend == "resident" else "cpu",
        attend=kv.attend,
        crossing=manager.transfer,
        spill_folder=spill_folder(model.resolved.settings.memory.disk, model.folder),
    )


def _reservations(plan: Plan) -> dict[Tier, dict[str, int]]:
    """What holds no weights, by tier."""
    reserve, tier = plan.reserve, plan.placement.compute_tier
    found = {tier: {"kv": reserve.kv, "activations": reserve.activations, "recorded": reserve.recorded}}
    if tier is not Tier.HOST:
        found[Tier.HOST] = {"kv": reserve.host_kv, "activations": reserve.host_activations}
    return found


def open_executor(
    model: Model, plan: Plan, stats: Stats, *, trace: Path | None = None, watch: Watch = unwatched
) -> tuple[ChunkManager, Executor]:
    """The tiers of a plan and the one executor over them; the caller closes the manager.

    Raises BudgetError, MachineError.
    """
    torch.set_num_threads(model.resolved.threads)
    give_freed_memory_back()
    device_type = "cuda" if plan.device.startswith("cuda") else "cpu"
    try:
        for prepare in (products.prepare, columns.prepare, stored.prepare):
            prepare(model.spec, device_type, exact=plan.exact)
        if model.spec.encoder is None:
            kv_dtype = plan.workload.kv.dtype
            prepare_attention(model.spec, device_type, exact=plan.exact, kv_dtype=kv_dtype)
    except RuntimeError as error:
        if typed := explained(error, "while its kernels were tried"):
            raise typed from error
        raise
    parking_bytes = plan.reserve.parked if plan.device.startswith("cuda") else 0
    manager = open_manager(
        plan.table,
        plan.placement,
        plan.budget,
        device=plan.device,
        machine=plan.machine,
        reservations=_reservations(plan),
        verify=model.resolved.settings.runtime.verify,
        wants_direct=model.resolved.settings.runtime.read_mode != "buffered",
        make_transfer=by_several_links(
            plan.table, plan.placement, plan.budget, plan.machine, plan.device, parking_bytes=parking_bytes
        ),
        parking_bytes=parking_bytes,
    )
    runtime = model.resolved.settings.runtime
    may_record = runtime.graphs == "auto" and not runtime.watch_moments and model.spec.encoder is None
    may_record = may_record and plan.device != "sim"  # whose passes take the time that they are said to take
    executor = Executor(
        model.spec,
        plan.table,
        manager,
        plan.schedule,
        stats=stats,
        exact=plan.exact,
        recorder=Recorder() if trace is None else TraceRecorder(),
        moments=WatchedMoments(manager, plan.reserve.activations) if runtime.watch_moments else None,
        watch=watch,
        graphs=graphs_for(
            model.spec,
            manager.device,
            exact=plan.exact,
            most_bytes=plan.reserve.recorded or graph_bytes(plan.budget.device),
        )
        if may_record
        else None,
    )
    return manager, executor


def _wants_spill(model: Model, plan: Plan, budget: TokenBudget) -> Callable[[int], bool]:
    """Whether to write a preempted sequence of so many tokens to disk: when that and reading it back take less time
    than feeding it again, or as the settings say."""
    how = model.resolved.settings.runtime.preempt
    disk = plan.machine.disk_read
    row_bytes = model.spec.kv_token_bytes(plan.workload.kv.dtype or model.spec.dtype)

    def wants_spill(tokens: int) -> bool:
        if how != "auto":
            return how == "spill"
        return 2 * disk.seconds(tokens * row_bytes) < budget.extra_s(tokens)

    return wants_spill
