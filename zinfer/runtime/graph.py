"""Record what decode passes repeat, and replay it.  In: ops over weights at fixed addresses.  Out: activations.

A pass at batch 1 issues some thousand kernels, each of which costs the host more than it takes the device; a graph
costs one call, and so does a tape of compiled kernels on the host (`zinfer.kernels.native.tape`).
Where shapes or addresses differ from what was recorded, ops run one by one as ever: the slow twin.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, fields
from math import inf
from typing import Any, Protocol

import torch
from torch import Tensor

from zinfer.errors import BudgetError, ZinferError
from zinfer.kernels.native.calls import kernels
from zinfer.kernels.native.tape import NotRecordableError, TapeRecorder
from zinfer.kvcache.cache import PagedView
from zinfer.layers.packed import Packed
from zinfer.log import logger
from zinfer.memory.faults import is_lost
from zinfer.models.decoder import Flow, prepare, run_op
from zinfer.plan.cost import has_steps
from zinfer.runtime.fixed import PassBuffers, mapped, outline, pass_state, tensors
from zinfer.runtime.forms import weights_of
from zinfer.spec.records import DTYPE_BYTES, ModelSpec

FEW_ROWS = 64  # of a pass that is recorded when it comes again: beyond, kernels outlast their launches
_OFTEN = 8  # times that a wider pass has come before it is recorded, which takes what ten replays spare
_MOST_KINDS = 8  # of passes whose buffers and graphs are kept
_MOST_SEEN = 64  # and those that are recognised when they come again
_ATTENDING = frozenset({"v", "qkv"})  # ops that end in attention

Weights = Mapping[Any, Tensor]
Eager = Callable[[range], None]


class GraphRecorder(Protocol):
    """Records what a function issues to the device."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Call `run` once, which carries nothing out yet; the answer carries it out, as often as it is called.

        What `run` has allocated stays allocated for as long as the answer lives.
        """
        ...

    is_promised: bool  # whether the plan made room: that it does not suffice is worth a word
    most_rows: int  # of a pass that is recorded
    most_logit_bytes: float  # a pass with more of them has its head by itself, which is one op

    @property
    def nbytes(self) -> int:
        """Memory that everything recorded takes."""
        ...

    def clone(self, x: Tensor) -> Tensor:
        """A copy that what is recorded may read."""
        ...

    def lent(self, x: Tensor) -> Tensor:
        """`x` where it lies; where memory is this recorder's own, its place is another's once the pass has gone on."""
        ...

    def holding(self, alive: Iterable[Tensor]) -> AbstractContextManager[None]:
        """While something is recorded these keep their places, though they are only lent."""
        ...

    def resize(self, most_bytes: int) -> None:
        """So much memory for what is recorded from now on."""
        ...

    def forget(self) -> None:
        """Nothing that was recorded is replayed any more."""
        ...


class CudaRecorder:
    """CUDA graphs in one memory pool.

    Graphs are replayed on one stream, so what they need only while they run may be shared; what leads from one to
    the next is referred to by whoever recorded it, and so never handed out twice.  Only the recording thread is
    bound by what a capture forbids: the transfers' threads go on issuing copies and reading events.
    """

    is_promised, most_rows, most_logit_bytes = True, FEW_ROWS, inf

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """What torch's allocator has grown by while something was recorded."""
        return self._nbytes

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """As GraphRecorder.record.  Raises what the capture refuses."""
        graph = torch.cuda.CUDAGraph()
        compute = torch.cuda.current_stream(self._device)
        before = torch.cuda.memory_reserved(self._device)
        self._stream.wait_stream(compute)
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                run()
            except BaseException:
                with suppress(RuntimeError):  # the capture is broken already
                    graph.capture_end()
                raise
            graph.capture_end()
        compute.wait_stream(self._stream)
        self._nbytes += max(torch.cuda.memory_reserved(self._device) - before, 0)
        return graph.replay

    def clone(self, x: Tensor) -> Tensor:
        """By torch's allocator."""
        return x.clone()

    def lent(self, x: Tensor) -> Tensor:
        """Itself: the pool hands a place out again when nobody refers to it."""
        return x

    def holding(self, alive: Iterable[Tensor]) -> AbstractContextManager[None]:
        """Who is alive is referred to."""
        return nullcontext()

    def resize(self, most_bytes: int) -> None:
        """A device's plan holds for good."""

    def forget(self) -> None:
        """Graphs and their memory end with whoever refers to them."""


@dataclass(slots=True)
class _Recorded:
    """One run of ops: the buffers it reads, what it leaves behind, and how to carry it out."""

    inputs: list[Tensor]
    outputs: dict[str, Any]
    replay: Callable[[], None]


class Graphs:
    """Graphs of one executor, by what they were recorded for: the kind of pass, the ops, where their weights lie.

    A kind of pass that comes twice in a row is recorded.  Where attention's shapes are new, only what lies between
    attentions is: that depends on the number of rows alone.  Everything takes at most `most_bytes`; what no longer
    fits, and all after something could not be recorded, runs one by one, which is said once.
    """

    def __init__(self, spec: ModelSpec, recorder: GraphRecorder, *, exact: bool, most_bytes: int) -> None:
        self.num_replays = self.num_eager = 0
        self.is_off = False
        self._spec = spec
        self._recorder = recorder
        self._exact = exact
        self._most_bytes = most_bytes
        self._seen: OrderedDict[Hashable, int] = OrderedDict()
        self._last: tuple[Hashable, ...] = ()  # what the last pass was
        self._kinds: OrderedDict[Hashable, Kind] = OrderedDict()

    def fits(self, batch: Packed, view: object) -> bool:
        """Whether a pass is one that repeats itself: few rows, one per sequence, over a cache on the device."""
        return (
            not self.is_off
            and self._most_bytes > 0
            and isinstance(view, PagedView)
            and view.is_resident
            and batch.num_rows == batch.num_sequences <= self._recorder.most_rows
            and all(batch.past)
            and batch.ancestors is None
            and not batch.forked
        )

    def begin(self, batch: Packed, view: PagedView, flow: Flow) -> Kind:
        """A pass begins, its rows looked up: work out what its layers share, and find what was recorded for it."""
        prepare(self._spec, flow, batch, view, exact=self._exact)
        whole = ("whole", batch.bounds, outline(pass_state(batch, view)))
        between = ("between", batch.num_rows, tuple(batch.logit_rows.tolist()))
        times = {key: self._note(key) for key in (whole, between)}
        key = whole if times[whole] > 1 else between
        kind = self._kinds.pop(key, None)
        if kind is None:
            kind = Kind(self, batch, view, is_whole=key is whole)
        self._kinds[key] = kind
        while len(self._kinds) > _MOST_KINDS:
            self._kinds.popitem(last=False)
        kind.may_record = times[key] > (1 if batch.num_rows <= FEW_ROWS else _OFTEN) and key in self._last
        self._last = (whole, between)
        kind.load(batch, view)
        return kind

    def _note(self, key: Hashable) -> int:
        """How often a kind of pass has come, this time included; of those that came long ago, nobody knows."""
        self._seen[key] = self._seen.pop(key, 0) + 1
        while len(self._seen) > _MOST_SEEN:
            self._seen.popitem(last=False)
        return self._seen[key]

    def resize(self, most_bytes: int) -> None:
        """Another budget: what was recorded is forgotten."""
        self._most_bytes = most_bytes
        self._recorder.resize(most_bytes)
        self.clear()

    def clear(self) -> None:
        """Addresses have changed: everything is recorded again."""
        self._kinds.clear()
        self._seen.clear()
        self._recorder.forget()

    def record(self, run: Callable[[], None]) -> Callable[[], None] | None:
        """None where it cannot be recorded: the reason is said, and nothing is recorded any more."""
        try:
            if self.nbytes > self._most_bytes:
                what = f"{self.nbytes} bytes of graphs are more than {self._most_bytes}"
                raise BudgetError("ZI-2405", what) if self._recorder.is_promised else NotRecordableError(what)
            return self._recorder.record(run)
        except NotRecordableError:
            return None
        except (RuntimeError, ZinferError, AttributeError, LookupError) as error:
            if is_lost(error):
                raise
            self.is_off = True
            logger.warning("passes are not recorded any more, their ops run one by one: %s", error)
            return None

    def kept(self, x: Tensor) -> Tensor:
        """Itself, or a copy where it lies in what the next replay of a host writes."""
        is_ours = x.device.type == "cpu" and any(kind.writes(x) for kind in self._kinds.values())
        return x.clone() if is_ours else x

    @property
    def recorder(self) -> GraphRecorder:
        """Whose memory it is."""
        return self._recorder

    @property
    def nbytes(self) -> int:
        """Of graphs and buffers."""
        return self._recorder.nbytes + sum(kind.buffers.nbytes for kind in self._kinds.values())

    def run_ops(self, ops: range, weights: Weights, flow: Flow, buffers: PassBuffers) -> None:
        """The ops over a pass's buffers: what is recorded."""
        for index in ops:
            op = self._spec.program[index]
            views = weights_of(op, weights)
            run_op(op, self._spec, flow, views, buffers.batch, buffers.view, exact=self._exact)

    def parts(self, ops: range, batch: Packed, *, is_whole: bool) -> Iterator[tuple[range, bool]]:
        """The ops in runs, and whether each may be recorded."""
        logit_bytes = len(batch.logit_rows) * self._spec.vocab_size * DTYPE_BYTES["F32"]
        apart = {"head"} if logit_bytes > self._recorder.most_logit_bytes else set()
        apart |= set() if is_whole else _ATTENDING
        begin = ops.start
        for index in ops:
            if self._spec.program[index].kind in apart:
                if begin < index:
                    yield range(begin, index), True
                yield range(index, index + 1), False
                begin = index + 1
        if begin < ops.stop:
            yield range(begin, ops.stop), True


class Kind:
    """One kind of pass: its buffers, and graphs by ops and by where their weights lie."""

    def __init__(self, graphs: Graphs, batch: Packed, view: PagedView, *, is_whole: bool) -> None:
        self.buffers = PassBuffers(batch, view) if is_whole else PassBuffers(without_attention(batch), view)
        self.may_record = False
        self._graphs = graphs
        self._is_whole = is_whole
        self._recorded: dict[Hashable, _Recorded | None] = {}
        self._fixed: set[int] = set()  # addresses that graphs write: they stay

    def load(self, batch: Packed, view: PagedView) -> None:
        """Another pass of this kind begins."""
        self.buffers.load(batch if self._is_whole else without_attention(batch), view)

    def writes(self, x: Tensor) -> bool:
        """Whether a recording leaves its results there."""
        return x.data_ptr() in self._fixed

    def run(self, ops: range, where: Hashable, weights: Weights, flow: Flow, eager: Eager) -> None:
        """Carry the ops out: by graphs where they were recorded for these addresses, else by `eager`."""
        for part, may_record in self._graphs.parts(ops, self.buffers.batch, is_whole=self._is_whole):
            found = self._find(part, where, weights, flow) if may_record else None
            if found is None:
                self._graphs.num_eager += 1
                eager(part)
                continue
            self._graphs.num_replays += 1
            _bring(found.inputs, tensors(flow_state(flow)))
            found.replay()
            set_flow(flow, found.outputs)

    def _find(self, ops: range, where: Hashable, weights: Weights, flow: Flow) -> _Recorded | None:
        key = (ops.start, ops.stop, where, outline(flow_state(flow)))
        if key not in self._recorded and self.may_record and not self._graphs.is_off:
            self._recorded[key] = self._record(ops, weights, flow)
        return self._recorded.get(key)

    def _record(self, ops: range, weights: Weights, flow: Flow) -> _Recorded | None:
        recorder, made = self._graphs.recorder, dict[int, Tensor]()

        def fixed(x: Tensor) -> Tensor:
            """Itself where a graph writes it, else a buffer; what is held under two names stays one tensor."""
            if x.data_ptr() in self._fixed:
                return x
            if id(x) not in made:
                made[id(x)] = recorder.clone(x)
            return made[id(x)]

        inside = Flow()
        with recorder.holding(tensors(flow_state(flow))):
            try:
                set_flow(inside, mapped(flow_state(flow), fixed))
            except NotRecordableError:  # there is no memory for the buffers
                return None
            inputs = list(tensors(flow_state(inside)))
            replay = self._graphs.record(lambda: self._graphs.run_ops(ops, weights, inside, self.buffers))
        if replay is None:
            return None
        self._fixed |= {x.data_ptr() for x in (*inputs, *tensors(flow_state(inside)))}
        # All that is alive between two runs of ops is in the flow, and the next run brings it to places of its own.
        return _Recorded([*map(recorder.lent, inputs)], mapped(flow_state(inside), recorder.lent), replay)


def _bring(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """What is not there yet, to where it is read; all is copied first, for a place may be one where another lies."""
    moved = [
        (target, source.clone())
        for target, source in zip(targets, sources, strict=True)
        if target.data_ptr() != source.data_ptr() or target.stride() != source.stride()
    ]
    for target, copied in moved:
        target.copy_(copied)


def flow_state(flow: Flow) -> dict[str, Any]:
    """Everything that waits for the next op, by name."""
    return {field.name: getattr(flow, field.name) for field in fields(flow)}


def set_flow(flow: Flow, state: Mapping[str, Any]) -> None:
    """The way back; containers are the flow's own."""
    for name, value in state.items():
        setattr(flow, name, dict(value) if isinstance(value, dict) else value)


def without_attention(batch: Packed) -> Packed:
    """The same rows, nothing worked out for attention, of which nothing is recorded."""
    memo = {key: value for key, value in batch.memo.items() if key[0] == "on"}
    return Packed(
        tokens_T=batch.tokens_T,
        positions_T=batch.positions_T,
        bounds=batch.bounds,
        past=batch.past,
        logit_rows=batch.logit_rows,
        memo=memo,
    )


def graphs_for(spec: ModelSpec, device: torch.device, *, exact: bool, most_bytes: int) -> Graphs | None:
    """For a device that can record, and for a host with compiled kernels that know the model's ops; None for others."""
    if device.type == "cuda":
        return Graphs(spec, CudaRecorder(device), exact=exact, most_bytes=most_bytes)
    found = kernels() if device.type == "cpu" and has_steps(spec) else None
    if found is None or not found.has_products:
        return None
    return Graphs(spec, TapeRecorder(found, most_bytes), exact=exact, most_bytes=most_bytes)
