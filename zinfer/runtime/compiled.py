"""A resident encoder in compiled code.  In: an executor that has loaded.  Out: its shortcut, where that is faster.

The slow twin is the executor's own loop over ops; the two are compared before the shortcut is taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from zinfer.kernels.choice import fastest
from zinfer.kernels.native.encoder import EncoderLayers, packed_bytes, serves
from zinfer.kernels.remembered import remembered
from zinfer.layers.packed import Packed
from zinfer.log import logger
from zinfer.memory.lease import WeightKey
from zinfer.models.encoder import EncoderFlow, run_op
from zinfer.runtime.executor import Executor, Micro
from zinfer.runtime.texts import pack_texts
from zinfer.tokenizer import Encoded

AGREE = 1e-4  # of the largest number: what the shortcut may differ by from its twin
_TEXT = 32  # tokens of a text in the passes that are compared
_MANY, _FEW = 8, 2  # texts in them: of a small model, of a large one
_LARGE_BYTES = 2**26
_TAKE, _LEAVE = "compiled", "op by op"


class CompiledEncoder:
    """Embeddings and head by torch, all layers by one call of compiled code.  Holds copies of the weights it needs."""

    def __init__(self, executor: Executor, lanes: int) -> None:
        spec = executor.spec
        assert spec.encoder is not None, "a decoder has no such form"
        self._spec, self._manager, self._lanes = spec, executor.manager, lanes
        self._is_first = set(spec.encoder.pooling) == {"cls"}  # of the last layer nothing else is read
        weights: dict[WeightKey, Tensor] = {}
        for chunk in executor.table.chunks:
            if chunk.ops:
                with executor.manager.lease(chunk.id) as held:
                    weights |= {key: view.clone() for key, view in held.views.items()}
        by_name = {name: view for (name, _, _), view in weights.items()}
        self._layers = EncoderLayers(spec, [by_name])
        outside = [op for op in spec.program if not 0 <= op.layer < spec.num_layers]
        # The norm behind the last layer is the layers' own.
        self._ops = [replace(op, normed=op.normed and op.kind != "pool") for op in outside]
        self._weights = {
            op.index: {part.role: weights[part.key] for part in op.reads} for op in self._ops if op.weights
        }

    def __call__(self, micros: Sequence[Micro]) -> bool:
        """Carry a pass out; False, and nothing done, where rows of every layer are asked for."""
        if any(not isinstance(micro.flow, EncoderFlow) or micro.flow.layers is not None for micro in micros):
            return False
        for micro in micros:
            assert isinstance(micro.flow, EncoderFlow), "that was asked"
            self._run(micro.batch, micro.flow)
        return True

    def _run(self, batch: Packed, flow: EncoderFlow) -> None:
        for lookup in self._spec.lookups:
            flow.rows[lookup.role] = self._manager.rows(lookup.name, batch.ids(lookup.role) + lookup.offset)
        embed, *tail = self._ops
        run_op(embed, self._spec, flow, self._weights.get(embed.index, {}), batch, exact=False)
        (rows,) = self._layers.run(
            flow.take("stream"), batch.bounds, 1, first_only=self._is_first, lanes=self._lanes
        )
        flow.stream, flow.input = rows, None
        if self._is_first:
            batch = replace(batch, bounds=tuple(range(batch.num_sequences + 1)))
        for op in tail:
            run_op(op, self._spec, flow, self._weights.get(op.index, {}), batch, exact=False)


def take_shortcut(executor: Executor, lanes: int) -> None:
    """Set the executor's shortcut, where the whole model is resident on the CPU, the compute tier has room for a
    second copy of the layers, results need not be exact, and it is right and faster here.  After the first pass."""
    spec, manager = executor.spec, executor.manager
    is_resident = all(map(manager.placement.resident, range(len(executor.table.chunks))))
    if executor.exact or manager.device.type != "cpu" or not is_resident or not serves(spec):
        return
    nbytes = packed_bytes(spec)
    ledger = manager.ledger()
    if 2 * nbytes > ledger.free_bytes:  # twice for a moment: all weights are taken before they are packed
        return
    shortcut = CompiledEncoder(executor, lanes)
    ledger.reserve("packed layers", nbytes)
    texts = _FEW if nbytes > _LARGE_BYTES else _MANY
    runs = {name: partial(_answer, executor, way, texts) for name, way in _ways(shortcut).items()}
    wanted, found = (run() for run in runs.values())
    if (wanted - found).abs().max() > AGREE * wanted.abs().max():
        logger.warning("the compiled encoder computes wrongly here: slower torch code replaces it")
        ledger.reserve("packed layers", 0)
        return
    shape = (spec.num_layers, spec.model_dim, spec.mlp_dim, spec.num_heads)
    question = f"encoder {shape} texts {texts} threads {torch.get_num_threads()} lanes {lanes}"
    name = remembered(question, lambda answer: answer in runs, lambda: fastest(runs, time.perf_counter))
    if name == _TAKE:
        executor.shortcut = shortcut
    else:
        ledger.reserve("packed layers", 0)


def _ways(shortcut: CompiledEncoder) -> dict[str, Callable[[Sequence[Micro]], bool] | None]:
    return {_LEAVE: None, _TAKE: shortcut}


def _answer(executor: Executor, way: Callable[[Sequence[Micro]], bool] | None, num_texts: int) -> Tensor:
    """Pooled rows of some texts; the pass is in nobody's books."""
    text = Encoded((0,) * _TEXT, (0,) * _TEXT, is_cut=False)
    batch = pack_texts([text] * num_texts)
    encoder = executor.spec.encoder
    if encoder is not None and encoder.num_segments < 2:
        batch = batch.without_segments()
    flow = EncoderFlow()
    executor.shortcut = way
    try:
        executor.traverse([Micro(batch, None, flow)])
    finally:
        executor.shortcut = None
        executor.stats.passes.pop()
    assert flow.pooled is not None, "a whole pass has pooled"
    return flow.pooled
