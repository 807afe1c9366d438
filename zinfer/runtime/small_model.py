"""A model so small that only fixed costs count.  In: rows and context of a pass.  Out: a pass, to be timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from zinfer.kvcache.cache import PagedKv, PagedView
from zinfer.kvcache.pages import pages_for
from zinfer.layers.packed import Packed
from zinfer.models.decoder import DTYPES, Flow, prepare, run_op
from zinfer.runtime.graph import graphs_for
from zinfer.spec.cost import attention_flops
from zinfer.spec.read import read_spec

_MAX_TOKENS = 2048
_MOST_BYTES = 2**23  # of a recorded pass
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,  # attention is of the usual size
    "vocab_size": 256,
    "max_position_embeddings": _MAX_TOKENS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


class SmallModel:
    """Runs the real ops of a decoder over made-up weights and one sequence; nothing moves, nothing is kept."""

    def __init__(self, device: torch.device, dtype: str = "BF16") -> None:
        spec = replace(read_spec(_CONFIG), dtype=dtype)
        self._spec = spec
        self._device = device
        draw = torch.Generator().manual_seed(0)
        self._weights: dict[tuple[str, int, int], Tensor] = {
            weight.key: torch.randn(weight.shape, generator=draw).to(device, DTYPES[dtype])
            for op in spec.program
            for weight in op.weights
        }
        self._kv = PagedKv(
            num_layers=spec.num_layers,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            num_pages=pages_for(_MAX_TOKENS),
            dtype=dtype,
            device=device,
        )
        for plane in self._kv.planes.tensors:
            plane.zero_()
        self._kv.open(0, _MAX_TOKENS)
        self._last = torch.zeros((), device=device)

    @property
    def num_ops(self) -> int:
        """Ops of a pass."""
        return len(self._spec.program)

    def attention_flops(self, rows: int, context: int) -> float:
        """Of all layers, for `rows` new rows of one sequence that ends at `context` tokens."""
        visible = context - (rows - 1) // 2
        return float(attention_flops(self._spec, rows, visible) * self._spec.num_layers)

    def replay(self, context: int, *, exact: bool) -> Callable[[], None] | None:
        """A pass of one row, recorded, to be carried out again and again; None where none is recorded.

        Each blocks until it is done.
        """
        graphs = graphs_for(self._spec, self._device, exact=exact, most_bytes=_MOST_BYTES)
        if graphs is None:
            return None
        if self._device.type != "cpu":
            self.run(1, context, exact=exact)  # nothing may be chosen, or compiled, while it is recorded
        batch, view, flow = self._pass(1, context)
        prepare(self._spec, flow, batch, view, exact=exact)
        read = (
            batch,
            view,
            dict(flow.rows),
            flow.rotary,
        )  # what is recorded reads their memory, and the weights
        with torch.no_grad():
            replay = graphs.record(lambda: self._run_ops(batch, view, flow, exact=exact))
        return None if replay is None else partial(self._carry_out, replay, read)

    def recorded(self, run: Callable[[], None], *, exact: bool) -> Callable[[], None] | None:
        """Products that `run` calls, recorded as a pass's are; None where none are recorded, or not such ones."""
        graphs = graphs_for(self._spec, self._device, exact=exact, most_bytes=_MOST_BYTES)
        replay = None if graphs is None else graphs.record(run)
        return None if replay is None else partial(self._carry_out, replay, run)

    def _carry_out(self, replay: Callable[[], None], _read: object) -> None:
        """Whoever may call this keeps what is read alive."""
        replay()
        if self._device.type != "cpu":
            self._last.item()  # behind everything that was asked of the device

    def run(self, rows: int, context: int, *, exact: bool) -> None:
        """One pass of one sequence; blocks until it is done."""
        batch, view, flow = self._pass(rows, context)
        with torch.no_grad():
            self._run_ops(batch, view, flow, exact=exact)
            flow.take_logits().sum().item()  # waits for a device

    def _pass(self, rows: int, context: int) -> tuple[Packed, PagedView, Flow]:
        past = context - rows
        self._kv.tables[0].length = past
        batch = Packed(
            tokens_T=torch.zeros(rows, dtype=torch.long, device=self._device),
            positions_T=torch.arange(past, context, device=self._device),
            bounds=(0, rows),
            past=(past,),
            logit_rows=torch.tensor([rows - 1], device=self._device),
        )
        view = self._kv.view([0], batch.bounds)
        flow = Flow()
        flow.rows["tokens"] = torch.ones(
            rows, self._spec.model_dim, dtype=DTYPES[self._spec.dtype], device=self._device
        )
        return batch, view, flow

    def _run_ops(self, batch: Packed, view: PagedView, flow: Flow, *, exact: bool) -> None:
        for op in self._spec.program:
            weights = {weight.role: self._weights[weight.key] for weight in op.weights}
            run_op(op, self._spec, flow, weights, batch, view, exact=exact)
