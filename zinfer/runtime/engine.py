"""Put an engine together.  In: a model and its plan.  Out: tiers, cache, executor and loop, ready to run."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zinfer.kernels.products import prepare
from zinfer.kvcache.cache import PagedKv
from zinfer.kvcache.pages import PAGE_TOKENS
from zinfer.kvcache.spill import spill_folder
from zinfer.memory.assemble import open_manager
from zinfer.memory.manager import ChunkManager
from zinfer.plan.make import Plan
from zinfer.runtime.executor import Executor, Watch, unwatched
from zinfer.runtime.loop import Event, Loop
from zinfer.runtime.model import Model
from zinfer.runtime.request import Request
from zinfer.runtime.stats import Stats
from zinfer.runtime.text import TextState
from zinfer.runtime.trace import Recorder, Span, TraceRecorder


@dataclass
class Engine:
    """A running engine.  Owns the chunk manager (threads, files, tiers) and the cache until close()."""

    manager: ChunkManager
    kv: PagedKv
    loop: Loop
    stats: Stats
    recorder: Recorder
    begin_s: float
    trace_file: Path | None = None

    def generate(
        self, requests: Sequence[Request], texts: Sequence[TextState]
    ) -> Generator[Event, None, None]:
        """Events of the one loop, counted."""
        try:
            for event in self.loop.run(requests, texts):
                if self.stats.first_token_s is None:
                    self.stats.first_token_s = time.perf_counter() - self.begin_s
                self.stats.num_tokens += 1
                yield event
        finally:
            self._note()

    def logits(self, request: Request) -> Tensor:
        """Logits of every prompt token: CPU fp32 [T, V]."""
        try:
            return self.loop.logits(request).cpu()
        finally:
            self._note()

    def close(self) -> None:
        """Give everything back and write the trace; may be called again."""
        self._note()
        self.kv.end()
        self.manager.close()
        if self.trace_file is not None and isinstance(self.recorder, TraceRecorder):
            self.recorder.save(self.trace_file)

    def _note(self) -> None:
        held = self.manager.stats()
        self.stats.peak_bytes = held.peak_bytes
        self.stats.surprises = held.surprises
        if self.recorder.is_recording:
            self.recorder.add(
                Span(move.link, f"chunk {move.chunk}", move.begin_s, move.end_s)
                for move in self.manager.log.drain()
            )


def open_engine(
    model: Model, plan: Plan, stats: Stats, *, trace: Path | None = None, watch: Watch = unwatched
) -> Engine:
    """Allocate what the plan says and start the threads; the first pass loads.  Raises BudgetError, MachineError."""
    begin_s = time.perf_counter()
    folder = spill_folder(model.resolved.settings.memory.disk, model.folder)
    torch.set_num_threads(model.resolved.threads)
    prepare(model.spec, "cuda" if plan.device.startswith("cuda") else "cpu", exact=plan.exact)
    manager = open_manager(
        plan.table,
        plan.placement,
        plan.budget,
        device=plan.device,
        machine=plan.machine,
        reservations={
            plan.placement.compute_tier: {"kv": plan.reserve.kv, "activations": plan.reserve.activations}
        },
        verify=model.resolved.settings.runtime.verify,
        wants_direct=model.resolved.settings.runtime.read_mode != "buffered",
    )
    spec = model.spec
    recorder = Recorder() if trace is None else TraceRecorder()
    kv = PagedKv(
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        num_pages=plan.kv_tokens // PAGE_TOKENS,
        dtype=spec.dtype,
        device=manager.device,
        spill_folder=folder,
    )
    executor = Executor(
        spec,
        plan.table,
        manager,
        plan.schedule,
        stats=stats,
        exact=plan.exact,
        recorder=recorder,
        watch=watch,
    )
    loop = Loop(executor, kv, max_rows=plan.workload.prefill_rows, max_batch=plan.workload.batch)
    return Engine(manager, kv, loop, stats, recorder, begin_s, trace)
