"""Run one pass.  In: packed batches and a schedule.  Out: logits.  Interprets steps; decides nothing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from zinfer.chunks.table import ChunkTable
from zinfer.kernels.exponents import TooManyExponentsError
from zinfer.kvcache.cache import PagedView
from zinfer.layers.packed import KvView, Packed
from zinfer.log import logger
from zinfer.memory.faults import explained
from zinfer.memory.manager import ChunkManager
from zinfer.models.decoder import Flow
from zinfer.models.registry import Flow as AnyFlow
from zinfer.models.registry import composition
from zinfer.plan.curve import group_of
from zinfer.plan.records import Compute, Evict, Fetch, FetchRows, Schedule, Settle
from zinfer.runtime.forms import pack_weights, weights_of
from zinfer.runtime.graph import Graphs, Kind, Weights
from zinfer.runtime.moments import Moments
from zinfer.runtime.stats import PassRecord, Stats
from zinfer.runtime.stays import Stays, Together
from zinfer.runtime.trace import Recorder
from zinfer.spec.records import ModelSpec
from zinfer.watch import Watch, unwatched


@dataclass(slots=True)
class Micro:
    """One micro-batch of a pass: its rows, its cache view, and the activations on their way through the ops."""

    batch: Packed
    kv: KvView | None
    flow: AnyFlow


class Executor:
    """Interprets the schedule over the chunk manager: the only place where weights meet activations.

    The first passes follow `schedule.loading`, which also loads what stays; later ones `schedule.steady`.  After an
    error every streamed chunk is dropped and the next pass starts from the first schedule again.  A `shortcut` may
    carry a later pass out in a way of its own, or decline; nothing that it needs is streamed.
    """

    def __init__(
        self,
        spec: ModelSpec,
        table: ChunkTable,
        manager: ChunkManager,
        schedule: Schedule,
        *,
        stats: Stats,
        exact: bool,
        recorder: Recorder,
        moments: Moments | None = None,
        watch: Watch = unwatched,
        graphs: Graphs | None = None,
    ) -> None:
        self.spec = spec
        self.table = table
        self.manager = manager
        self.schedule = schedule
        self.exact = exact
        self.stats = stats
        self.recorder = recorder
        self.moments = moments or Moments()
        self.watch = watch
        self.graphs = graphs
        self.shortcut: Callable[[Sequence[Micro]], bool] | None = None
        self._stays = Stays(manager)
        self._joined = self._stays.joined(schedule.steady)
        self._pass_bytes = sum(chunk.nbytes for chunk in table.streamable)
        self._num_loaded = 0  # passes of `schedule.loading` that have been carried out
        self.cannot_pack = False  # some weights, against the plan
        self._clock = manager.transfer.clock
        self._begin_s, self._begin_bytes = 0.0, Counter[str]()
        self._replays_before = 0
        self._new_flow, self._run_op = composition(spec)

    def run(self, batches: Sequence[tuple[Packed, KvView | None]]) -> list[Tensor]:
        """One traversal of all chunks with every micro-batch: fp32 logits [logit rows, V] per micro-batch.

        Of a sequence that is cut, the earlier part lies in an earlier micro-batch.  An encoder needs no KvView and
        gives one row per text.  Raises what a failed read or transfer raised.
        """
        micros = [Micro(batch, kv, self._new_flow()) for batch, kv in batches]
        self.traverse(micros)
        logits = [micro.flow.take_logits() for micro in micros]
        return logits if self.graphs is None else [self.graphs.kept(rows_RV) for rows_RV in logits]

    def traverse(self, micros: Sequence[Micro]) -> None:
        """`run` for callers that bring their own flows and take more than logits from them."""
        self._begin_s, self._begin_bytes = time.perf_counter(), Counter(self.manager.log.num_bytes)
        waited_s = self.manager.stats().wait_s
        self._replays_before = self._num_replays()
        self._clock.read()
        try:
            with torch.no_grad(), self.moments.of_pass(sum(micro.batch.num_rows for micro in micros)):
                self._interpret(micros)
        except BaseException as error:
            self._num_loaded = 0
            self.let_go()
            typed = explained(error, "in a pass")
            with suppress(Exception) if typed else nullcontext():  # a lost device refuses this too
                self.manager.drop_streamed()
            if typed:
                raise typed from error
            raise
        self.stats.passes.append(
            PassRecord(
                seconds=time.perf_counter() - self._begin_s,
                wait_s=self.manager.stats().wait_s - waited_s,
                rows=sum(micro.batch.num_rows for micro in micros),
                sequences=sum(micro.batch.num_sequences for micro in micros),
                is_first=not self._is_warm,
                is_decode=all(map(_is_decode, (micro.batch for micro in micros))),
                num_bytes=self._moved_bytes(),
                group_s={},
            )
        )
        self._num_loaded += not self._is_warm

    def results_are_here(self) -> None:
        """Whoever ran the last pass has its results on the host: only now has a device done it.

        Nobody waits for a device before that, so the record of the pass is completed here.
        """
        last = self.stats.passes[-1]
        seconds = self._clock.read()  # where ops were replayed they are in nobody's laps
        last.group_s = seconds if self._num_replays() == self._replays_before else {}
        if self.manager.device.type != "cpu":
            last.seconds = time.perf_counter() - self._begin_s
            last.num_bytes = self._moved_bytes()

    def _moved_bytes(self) -> dict[str, int]:
        """Bytes by link since the pass began, of copies whose end has been seen."""
        return dict(Counter(self.manager.log.num_bytes) - self._begin_bytes)

    def follow(self, schedule: Schedule) -> None:
        """Another schedule from the next pass on, which also loads what is to stay."""
        self.let_go()
        self.schedule, self._joined = schedule, self._stays.joined(schedule.steady)
        self._num_loaded = 0

    def let_go(self) -> None:
        """End the leases that outlast a pass, and forget what was recorded: places may change now."""
        self._stays.let_go()
        if self.graphs is not None:
            self.graphs.clear()

    @property
    def _is_warm(self) -> bool:
        """Whether all that stays is there or on its way."""
        return self._num_loaded == len(self.schedule.loading)

    def _num_replays(self) -> int:
        return 0 if self.graphs is None else self.graphs.num_replays

    def _interpret(self, micros: Sequence[Micro]) -> None:
        if self.shortcut is not None and self._is_warm and self.shortcut(micros):
            return
        next_op = done_bytes = 0
        name = f"pass {len(self.stats.passes) + 1}" + ("" if self._is_warm else ", loading")
        kind: Kind | None = None
        repeats = self._repeats(micros)
        steady = self._joined if repeats else self.schedule.steady
        for step in steady if self._is_warm else self.schedule.loading[self._num_loaded]:
            match step:
                case Fetch(chunk, as_guest):
                    self.manager.prefetch(chunk, as_guest=as_guest)
                case Compute(chunk):
                    end_op = self.table.chunks[chunk].ops[-1] + 1
                    with self.moments.moment(chunk):
                        self._compute(chunk, range(next_op, end_op), micros, kind)
                    next_op = end_op
                    done_bytes += self.table.chunks[chunk].nbytes
                    self.watch(done_bytes, self._pass_bytes, name)
                case Together(chunks):
                    end_op = self.table.chunks[chunks[-1]].ops[-1] + 1
                    ops, views = range(next_op, end_op), self._stays.views(chunks)
                    self._carry_out(ops, self._stays.where(chunks), views, micros[0], kind)
                    next_op = end_op
                    done_bytes += sum(self.table.chunks[chunk].nbytes for chunk in chunks)
                    self.watch(done_bytes, self._pass_bytes, name)
                case Evict(chunk):
                    self.manager.evict(chunk)
                case Settle(chunk):
                    self._settle(chunk)
                case FetchRows():
                    self._fetch_rows(micros)
                    if self.graphs is not None and repeats is not None:
                        kind = self.graphs.begin(*repeats)

    def _repeats(self, micros: Sequence[Micro]) -> tuple[Packed, PagedView, Flow] | None:
        """The lone micro-batch of a pass that graphs may have been recorded for, shaped so that it has its like."""
        if self.graphs is None or not self._is_warm or len(micros) != 1:
            return None
        (micro,) = micros
        if not (isinstance(micro.kv, PagedView) and isinstance(micro.flow, Flow)):
            return None
        if not self.graphs.fits(micro.batch, micro.kv):
            return None
        micro.batch = replace(micro.batch, is_padded=True)
        return micro.batch, micro.kv, micro.flow

    def _compute(self, chunk: int, ops: range, micros: Sequence[Micro], kind: Kind | None) -> None:
        with self.recorder.span("wait", f"chunk {chunk}"):
            lease = self.manager.lease(self.table.chunks[chunk].id)
        with lease as held:
            views = held.views
            for micro in micros:
                self._bring(micro, self.manager.transfer.unpark, micros)
                self._carry_out(ops, (chunk, held.address), views, micro, kind)
                is_last = ops.stop == len(self.spec.program)  # the host reads that next
                transfer = self.manager.transfer
                self._bring(micro, transfer.to_host if is_last else transfer.park, micros)

    def _settle(self, chunk: int) -> None:
        """Bring a chunk home packed, or note that its weights are not of the kind that can be."""
        ops = [self.spec.program[index] for index in self.table.chunks[chunk].ops]
        with self.recorder.span("pack", f"chunk {chunk}"):
            try:
                self.manager.settle(self.table.chunks[chunk].id, partial(pack_weights, ops))
            except TooManyExponentsError as error:
                self.cannot_pack = True
                logger.warning("chunk %d stays as it is published: %s", chunk, error)

    def _carry_out(
        self, ops: range, where: Hashable, views: Weights, micro: Micro, kind: Kind | None
    ) -> None:
        if kind is None or not isinstance(micro.flow, Flow):
            self._run_ops(ops, views, micro)
            return
        with self.recorder.span("compute", f"ops {ops.start} to {ops.stop - 1}"):
            kind.run(ops, where, views, micro.flow, lambda part: self._run_ops(part, views, micro))

    def _run_ops(self, ops: range, views: Weights, micro: Micro) -> None:
        """One op after the other: the slow twin of what is recorded."""
        self._clock.start()
        for index in ops:
            op = self.spec.program[index]
            weights = weights_of(op, views)
            with self.recorder.span("compute", f"{op.layer}.{op.kind}"):
                self._run_op(op, self.spec, micro.flow, weights, micro.batch, micro.kv, exact=self.exact)
            self._clock.lap(group_of(op.kind))

    def _bring(self, micro: Micro, carry: Callable[[Tensor], Tensor], micros: Sequence[Micro]) -> None:
        """Where the schedule parks, a micro-batch that is not the only one is on the device for its turn only."""
        if self.schedule.parks and len(micros) > 1:
            with self.recorder.span("park", carry.__name__):
                micro.flow.move(carry)

    def _fetch_rows(self, micros: Sequence[Micro]) -> None:
        for micro in micros:
            for lookup in self.spec.lookups:
                ids_T = micro.batch.ids(lookup.role)
                with self.recorder.span("rows", lookup.name):
                    micro.flow.rows[lookup.role] = self.manager.rows(lookup.name, ids_T + lookup.offset)
            self._bring(micro, self.manager.transfer.park, micros)


def _is_decode(batch: Packed) -> bool:
    return batch.num_rows == batch.num_sequences and all(batch.past)
