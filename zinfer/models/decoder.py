"""The one decoder composition.  In: an op, its weights, the rows of a pass.  Out: activations, at last logits.

Shape legend: T new rows, R rows whose logits are wanted, M model dim, H heads, K key-value heads, D head dim,
F MLP width, E embedding width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zinfer.kernels.columns import column_linear
from zinfer.kernels.products import linear
from zinfer.kernels.stored import any_linear, is_stored, stored_weight
from zinfer.layers import attention
from zinfer.layers.attention import attend
from zinfer.layers.mlp import activate, close_gate, open_gate
from zinfer.layers.norm import layer_norm, rms_norm
from zinfer.layers.packed import KvView, Packed
from zinfer.layers.rotary import rotary_tables, rotate
from zinfer.spec.program import matrix_shape
from zinfer.spec.records import ModelSpec, Op
from zinfer.spec.stored import PARTS

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
KEEP_INPUT = frozenset({"q", "k", "gate"})  # the next product reads the same rows


@dataclass(slots=True)
class Flow:
    """Activations of one micro-batch between ops; each is dropped with its last use.

    Before the pass `rows` receives the looked-up embedding rows, [T, width] per RowLookup role; after it `logits`
    is fp32 [R, V].
    """

    rows: dict[str, Tensor] = field(default_factory=dict)
    stream: Tensor | None = None  # [T, M], what the residuals add up to; [R, M] behind the last attention
    input: Tensor | None = None  # of the next product; None where a new section begins
    output: Tensor | None = None  # of a product whose blocks are not all done
    query: Tensor | None = None  # [T, H, D]
    key: Tensor | None = None  # [T, K, D]
    gate: Tensor | None = None  # [T, F], as `open_gate` left it
    branch: Tensor | None = None  # [T, M], attention's output where the residual is parallel
    rotary: tuple[Tensor, Tensor] | None = None
    logits: Tensor | None = None

    def take(self, name: str) -> Tensor:
        """Hand an activation over, so that the caller holds the only reference."""
        value = getattr(self, name)
        assert isinstance(value, Tensor), f"the flow has no {name}: ops were run out of order"
        setattr(self, name, None)
        return value

    def move(self, carry: Callable[[Tensor], Tensor]) -> None:
        """Carry everything that waits for the next op elsewhere; what is held under two names stays one tensor."""
        moved: dict[int, Tensor] = {}

        def once(x: Tensor) -> Tensor:
            if id(x) not in moved:
                moved[id(x)] = carry(x)
            return moved[id(x)]

        self.rows = {role: once(x) for role, x in self.rows.items()}
        if self.rotary is not None:
            self.rotary = (once(self.rotary[0]), once(self.rotary[1]))
        for name in ("stream", "input", "output", "query", "key", "gate", "branch", "logits"):
            if (x := getattr(self, name)) is not None:
                setattr(self, name, once(x))

    def take_logits(self) -> Tensor:
        """The pass's result, fp32 [R, V]."""
        return self.take("logits")


def prepare(spec: ModelSpec, flow: Flow, batch: Packed, kv: KvView, *, exact: bool) -> None:
    """Work out what all layers share, as their first op would: rotary tables, which rows attend together to what."""
    like_THD = flow.rows["tokens"].new_empty((0, spec.num_heads, spec.head_dim), dtype=DTYPES[spec.dtype])
    batch.on("logit_rows", like_THD.device)
    if spec.rope is not None and flow.rotary is None:
        flow.rotary = rotary_tables(spec.rope, batch, like_THD.dtype, like_THD.device)
    windowed = spec.window_layers or (True,)
    windows = {spec.sliding_window if is_windowed else None for is_windowed in windowed}
    attention.prepare(batch, kv, spec.num_kv_heads, like_THD, windows=sorted(windows, key=str), exact=exact)


def run_op(
    op: Op,
    spec: ModelSpec,
    flow: Flow,
    weights: Mapping[str, Tensor],
    batch: Packed,
    kv: KvView,
    *,
    exact: bool,
) -> None:
    """Run one op of the program on one micro-batch.

    `weights` maps roles to views that are only read.  Ops are run in program order; everything is a function of
    the activations and the weights, so that the same code runs under autograd.
    """
    dtype = DTYPES[spec.dtype]
    # A copy is made only where a checkpoint mixes dtypes.
    weights = {
        role: part if part.dtype is dtype or role in PARTS else part.to(dtype)
        for role, part in weights.items()
    }
    if flow.input is None:
        flow.input = _enter(op, spec, flow, weights, batch)
    if op.matrix:
        _product(op, spec, flow, weights, exact=exact)
    else:
        flow.output = flow.input
    if op.block == op.blocks - 1:
        if op.kind not in KEEP_INPUT:
            flow.input = None
        _finish(op, spec, flow, weights, batch, kv, exact=exact)


def _enter(op: Op, spec: ModelSpec, flow: Flow, weights: Mapping[str, Tensor], batch: Packed) -> Tensor:
    """What the first product of a section reads: the stream, normalised where the family does so."""
    if op.kind == "embed":
        return flow.rows.pop("tokens").to(DTYPES[spec.dtype])
    stream = flow.take("stream")
    if op.layer == spec.num_layers:
        flow.rotary = None
    if not op.normed:
        entered = stream
    elif spec.norm == "rms":
        entered = rms_norm(stream, weights["norm"], spec.norm_eps)
    else:
        entered = layer_norm(stream, weights.get("norm"), weights.get("norm_bias"), spec.norm_eps)
    if op.layer < spec.num_layers:
        flow.stream = entered if spec.norm_position == "post" else stream
    return entered


def _product(op: Op, spec: ModelSpec, flow: Flow, weights: Mapping[str, Tensor], *, exact: bool) -> None:
    """One block of the op's matrix, put in its place in the whole output; logits are fp32."""
    x, matrix = flow.input, op.matrix
    assert x is not None and matrix is not None, "a product needs an input and a matrix"
    outputs, bias = matrix.shape[1 if op.transposed else 0], weights.get("bias")
    into_TO = _place(op, spec, flow, x)
    if not x.shape[0]:
        piece = x.new_empty(0, outputs)
    elif is_stored(weights):
        piece = any_linear(x, stored_weight(weights, outputs), bias, exact=exact, into_TO=into_TO)
    elif op.transposed:
        piece = column_linear(x, weights["matrix"], bias, exact=exact)
    else:
        piece = linear(x, weights["matrix"], bias, exact=exact, into_TO=into_TO)
    if into_TO is None:
        flow.output = piece
    elif piece is not into_TO:
        into_TO.copy_(piece)


def _place(op: Op, spec: ModelSpec, flow: Flow, x: Tensor) -> Tensor | None:
    """Where a product belongs in an output that is wider than it, or in another format; None: it is the output."""
    assert op.matrix is not None, "a product needs a matrix"
    dtype = torch.float32 if op.kind == "head" else x.dtype
    if op.blocks == 1 and dtype is x.dtype:
        return None
    if op.block == 0:
        flow.output = x.new_empty(x.shape[0], matrix_shape(spec, op.kind)[0], dtype=dtype)
    assert flow.output is not None, "block 0 of a product goes first"
    return flow.output[:, op.matrix.start : op.matrix.stop]


def _finish(
    op: Op,
    spec: ModelSpec,
    flow: Flow,
    weights: Mapping[str, Tensor],
    batch: Packed,
    kv: KvView,
    *,
    exact: bool,
) -> None:
    """What follows a whole product: attention, activation, residual."""
    match op.kind:
        case "embed":
            flow.stream = flow.take("output")
            if "positions" in flow.rows:
                flow.stream = flow.stream + flow.rows.pop("positions").to(flow.stream.dtype)
        case "q":
            flow.query = _heads(flow.take("output"), spec, flow, batch, weights.get("q_norm"))
        case "k":
            flow.key = _heads(flow.take("output"), spec, flow, batch, weights.get("k_norm"))
        case "v":
            value = _by_head(flow.take("output"), spec.head_dim)
            flow.input = _attention(op.layer, spec, flow, value, batch, kv, exact=exact)
        case "qkv":
            value = _split_heads(spec, flow, batch)
            flow.input = _attention(op.layer, spec, flow, value, batch, kv, exact=exact)
        case "gate":
            flow.gate = open_gate(flow.take("output"), spec.activation, exact=exact)
        case "up" if spec.gated_mlp:
            flow.input = close_gate(flow.take("gate"), flow.take("output"), spec.activation)
        case "up":
            flow.input = activate(flow.take("output"), spec.activation, exact=exact)
        case "gate_up":
            gate, up = flow.take("output").chunk(2, dim=-1)
            flow.input = close_gate(open_gate(gate, spec.activation, exact=exact), up, spec.activation)
        case "o" if spec.parallel_residual:
            flow.branch = flow.take("output")
        case "o" | "down":
            output = flow.take("output")
            output = output if flow.branch is None else output + flow.take("branch")
            flow.stream = output + flow.take("stream")
        case "project_out":
            flow.input = flow.take("output")
        case "head":
            flow.logits = flow.take("output")


def _heads(output: Tensor, spec: ModelSpec, flow: Flow, batch: Packed, norm: Tensor | None) -> Tensor:
    """Queries or keys as [T, heads, D]: normalised per head where a norm is given, rotated where the family rotates."""
    heads = _by_head(output, spec.head_dim)
    if norm is not None:
        heads = rms_norm(heads, norm, spec.norm_eps)
    if spec.rope is None:
        return heads
    if flow.rotary is None:
        flow.rotary = rotary_tables(spec.rope, batch, heads.dtype, heads.device)
    return rotate(heads, *flow.rotary)


def _split_heads(spec: ModelSpec, flow: Flow, batch: Packed) -> Tensor:
    """Cut a fused product into query and key (left in the flow) and value (returned)."""
    output = flow.take("output")
    width = spec.head_dim
    if spec.fused_qkv == "per_head":
        query, key, value = output.view(-1, spec.num_heads, 3, width).unbind(2)
    else:
        key_width = spec.num_kv_heads * width
        query, key, value = torch.split(output, [spec.num_heads * width, key_width, key_width], dim=-1)
        value = _by_head(value, width)
    flow.query = _heads(query, spec, flow, batch, None)
    flow.key = _heads(key, spec, flow, batch, None)
    return value


def _by_head(rows: Tensor, width: int) -> Tensor:
    """[T, heads * D] as [T, heads, D]; a view."""
    return rows.view(rows.shape[0], -1, width)


def _attention(
    layer: int, spec: ModelSpec, flow: Flow, value: Tensor, batch: Packed, kv: KvView, *, exact: bool
) -> Tensor:
    """[T, H * D]: every new row over its sequence's past and the rows before it.

    Behind the last layer's attention only rows whose logits are wanted go on, [R, H * D]: no other row will be read.
    """
    is_windowed = spec.window_layers is None or spec.window_layers[layer]
    attended = attend(
        flow.take("query"),
        flow.take("key"),
        value,
        layer,
        batch,
        kv,
        scale=spec.head_dim**-0.5 if spec.attention_scale is None else spec.attention_scale,
        window=spec.sliding_window if is_windowed else None,
        exact=exact,
    )
    attended = attended.flatten(1)
    if layer < spec.num_layers - 1 or len(batch.logit_rows) == len(attended):
        return attended
    wanted = batch.on("logit_rows", attended.device)
    flow.stream = flow.take("stream").index_select(0, wanted)
    return attended.index_select(0, wanted)
