"""The one encoder composition.  In: an op, its weights, packed texts.  Out: one pooled row per text, and class logits.

Shape legend: T token rows, S texts, M model dim, E embedding width, H heads, D head dim, F MLP width, C classes.
BERT (Devlin et al. 2018, arXiv 1810.04805) and what descends from it: norms behind residuals, learned positions,
token types, every row sees its whole text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zinfer.kernels.stored import any_linear, is_stored, stored_weight
from zinfer.layers.bidirectional import attend_whole
from zinfer.layers.mlp import activate
from zinfer.layers.norm import layer_norm
from zinfer.layers.packed import KvView, Packed
from zinfer.layers.pooling import pool
from zinfer.memory.upload import indices
from zinfer.models.decoder import DTYPES
from zinfer.spec.records import Encoder, ModelSpec, Op
from zinfer.spec.stored import PARTS

KEEP_INPUT = frozenset({"q", "k"})  # the next product reads the same rows
ROLES = ("tokens", "positions", "segments")  # of embedding rows, in the order in which they are added


@dataclass(slots=True)
class EncoderFlow:
    """Activations of one micro-batch between ops; each is dropped with its last use.

    Before the pass `rows` receives the looked-up embedding rows, [T, E] per RowLookup role.  After it `pooled` is
    fp32 [S, M per pooling mode], `first` fp32 [S, M] (each text's first row, which a head reads) and `logits` fp32
    [S, C] where the model has a head.  A list given as `layers` receives each layer's output [T, M].
    """

    rows: dict[str, Tensor] = field(default_factory=dict)
    stream: Tensor | None = None  # [T, M], what the residuals add up to
    input: Tensor | None = None  # of the next product; None where a new section begins
    pieces: list[Tensor] = field(default_factory=list)  # of a product whose blocks are not all done
    query: Tensor | None = None  # [T, H, D]
    key: Tensor | None = None
    pooled: Tensor | None = None
    first: Tensor | None = None
    logits: Tensor | None = None
    layers: list[Tensor] | None = None

    def take(self, name: str) -> Tensor:
        """Hand an activation over, so that the caller holds the only reference."""
        value = getattr(self, name)
        assert isinstance(value, Tensor), f"the flow has no {name}: ops were run out of order"
        setattr(self, name, None)
        return value

    def move(self, carry: Callable[[Tensor], Tensor]) -> None:
        """Carry everything that waits for the next op elsewhere; the stream may also be the input."""
        is_both = self.input is self.stream
        self.rows = {role: carry(x) for role, x in self.rows.items()}
        self.pieces = [carry(x) for x in self.pieces]
        for name in ("stream", "input", "query", "key", "pooled", "first", "logits"):
            if getattr(self, name) is not None and not (is_both and name == "input"):
                setattr(self, name, carry(getattr(self, name)))
        if is_both:
            self.input = self.stream

    def take_logits(self) -> Tensor:
        """The pass's result: fp32 [S, C], or what was pooled where there is no head."""
        return self.take("pooled" if self.logits is None else "logits")


def run_op(
    op: Op,
    spec: ModelSpec,
    flow: EncoderFlow,
    weights: Mapping[str, Tensor],
    batch: Packed,
    kv: KvView | None = None,
    *,
    exact: bool,
) -> None:
    """Run one op of the program on one micro-batch; an encoder keeps nothing in a cache, `kv` is not touched.

    `weights` maps roles to views that are only read.  Everything is a function of the activations and the weights,
    so that the same code runs under autograd.
    """
    assert spec.encoder is not None, "a decoder has a composition of its own"
    dtype = DTYPES[spec.dtype]
    weights = {role: part if role in PARTS else part.to(dtype) for role, part in weights.items()}
    if flow.input is None:
        flow.input = _enter(op, spec, flow, weights)
    if op.matrix is None:
        output = flow.take("input")
    else:
        is_packed = is_stored(weights)
        matrix = stored_weight(weights, op.matrix.shape[0]) if is_packed else weights["matrix"]
        flow.pieces.append(any_linear(flow.input, matrix, weights.get("bias"), exact=exact))
        if op.block < op.blocks - 1:
            return
        pieces, flow.pieces = flow.pieces, []
        output = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
        if op.kind not in KEEP_INPUT:
            flow.input = None
    _finish(op, spec, spec.encoder, flow, output, batch, exact=exact)


def _enter(op: Op, spec: ModelSpec, flow: EncoderFlow, weights: Mapping[str, Tensor]) -> Tensor:
    """What the first product of a section reads: embeddings added up, or the stream; normalised behind a residual."""
    if op.kind == "embed":
        found = [flow.rows.pop(role).to(DTYPES[spec.dtype]) for role in ROLES if role in flow.rows]
        entered = found[0]
        for rows in found[1:]:
            entered = entered + rows
        return layer_norm(entered, weights["norm"], weights["norm_bias"], spec.norm_eps)
    entered = flow.take("stream")
    if op.normed:
        entered = layer_norm(entered, weights["norm"], weights["norm_bias"], spec.norm_eps)
    if flow.layers is not None and op.kind in ("q", "pool") and op.layer:
        flow.layers.append(entered)
    if op.kind != "pool":
        flow.stream = entered
    return entered


def _finish(
    op: Op,
    spec: ModelSpec,
    encoder: Encoder,
    flow: EncoderFlow,
    output: Tensor,
    batch: Packed,
    *,
    exact: bool,
) -> None:
    """What follows a whole product: attention, activation, residual, pooling."""
    match op.kind:
        case "embed":
            flow.stream = output
        case "q":
            flow.query = _by_head(output, spec)
        case "k":
            flow.key = _by_head(output, spec)
        case "v":
            attended = attend_whole(
                flow.take("query"),
                flow.take("key"),
                _by_head(output, spec),
                batch.bounds,
                scale=spec.head_dim**-0.5,
                exact=exact,
                memo=batch.memo,
            )
            flow.input = attended.flatten(1)
        case "o" | "down":
            flow.stream = output + flow.take("stream")
        case "up":
            flow.input = activate(output, spec.activation, exact=exact)
        case "pool":
            flow.pooled = pool(output, batch.bounds, encoder.pooling).float()
            first_SM = output.index_select(0, indices(batch.bounds[:-1], output.device))
            flow.first, flow.input = first_SM.float(), first_SM
        case "dense":
            flow.input = activate(output, encoder.head_activation, exact=exact)
        case _:
            flow.logits = output.float()


def _by_head(output: Tensor, spec: ModelSpec) -> Tensor:
    """[T, H * D] as [T, H, D]; a view."""
    return output.view(-1, spec.num_heads, spec.head_dim)
