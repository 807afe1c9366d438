"""What a model is, as data: one composition per kind, every family a row of options.  No torch, no bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


def kv_row_bytes(num_kv_heads: int, head_dim: int, dtype: str) -> int:
    """Bytes of one token's keys and values in one layer; "INT8" has an fp32 scale per head."""
    return 2 * num_kv_heads * (head_dim + 4 if dtype == "INT8" else head_dim * DTYPE_BYTES[dtype])


@dataclass(frozen=True, slots=True)
class WeightRef:
    """One weight (or a block of its rows) that an op reads.

    `role` is what the op calls it ("matrix", "bias", "norm", "norm_bias", "q_norm", "k_norm"), `name` the
    published tensor name, [start, stop) the rows of the published tensor, `shape` the slice's shape.  Of a part of a
    quantised matrix (`zinfer.spec.quant`) they are the stored tensor's, and [start, stop) counts panels.
    """

    role: str
    name: str
    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: str = ""  # of a stored part; nothing: as published

    @property
    def key(self) -> tuple[str, int, int]:
        """What identifies the bytes: (published name, first row, end row)."""
        return (self.name, self.start, self.stop)

    @property
    def numel(self) -> int:
        """Elements in the slice."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count


@dataclass(frozen=True, slots=True)
class Op:
    """The smallest thing a pass computes: one product with one matrix, or one block of a large matrix's rows.

    The cut into ops depends on the model alone, never on a budget, so that every placement computes the same
    shapes.  What comes before the product (a norm) happens in the op with block 0, what comes after (attention,
    activation, residual) in the op with block == blocks - 1.
    """

    index: int
    kind: str  # "embed", "q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "head", "pool", ...
    layer: int  # -1: before the first layer; num_layers: after the last
    weights: tuple[WeightRef, ...]
    block: int = 0
    blocks: int = 1
    normed: bool = False  # its input is normalised first (in block 0), with weights or without
    transposed: bool = False  # its matrix is published as [in, out]
    stored: tuple[WeightRef, ...] = ()  # what a quantised store holds in place of `weights`

    @property
    def reads(self) -> tuple[WeightRef, ...]:
        """What a pass reads for this op."""
        return self.stored or self.weights

    @property
    def matrix(self) -> WeightRef | None:
        """The matrix (or the block of it) that the op multiplies with; the embedding op may have none."""
        return next((weight for weight in self.weights if weight.role == "matrix"), None)

    @property
    def weight_numel(self) -> int:
        """Elements of all weights the op reads."""
        return sum(weight.numel for weight in self.weights)


@dataclass(frozen=True, slots=True)
class RowLookup:
    """An embedding table that is read by rows: which, and what is added to the index (OPT's positions: 2)."""

    role: Literal["tokens", "positions", "segments"]
    name: str
    num_rows: int
    width: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions.  `kind` is one of the published ones; `parameters` its numbers, already validated."""

    kind: Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"]
    theta: float
    rotary_dim: int
    parameters: dict[str, float | int | bool | tuple[float, ...]] = field(default_factory=dict)
    interleaved: bool = False  # pairs (0,1)(2,3).. instead of halves


@dataclass(frozen=True, slots=True)
class Encoder:
    """What an encoder has beyond a decoder's shapes: every token sees its whole text, and a text has one result.

    `pooling` are the modes by which token rows become one embedding, side by side; `labels` the classes of a
    classification head.
    `unread` are stems of published tensors that may stand in the checkpoint and are not read.
    """

    num_segments: int = 0  # token types; 0: the family has none
    head: Literal["none", "classify"] = "none"
    head_activation: Literal["tanh", "relu", "gelu"] = "tanh"
    labels: tuple[str, ...] = ()
    scoring: str = "softmax"  # how logits become scores: "softmax", "sigmoid", "none"
    pooling: tuple[str, ...] = ("mean",)
    is_normalised: bool = False
    is_lowered: bool = False  # the text is put in lower case before it is cut into tokens
    max_tokens: int | None = None  # longer texts are cut; None: max_context
    unread: tuple[str, ...] = ()

    @property
    def is_multi_label(self) -> bool:
        """Whether each class is scored by itself and not against the others."""
        return self.scoring == "sigmoid"


@dataclass(frozen=True, slots=True)
class AttentionSizes:
    """What pieces of attention may be cut to with the same bits: new rows, and keys of a last block; ascending.

    With `in_place` none of that is needed over pages of the model's dtype: they are read where they are.
    """

    rows: tuple[int, ...]
    keys: tuple[int, ...]
    in_place: bool = False


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shapes and options of one model.  M model dim, H heads, D head dim, V vocabulary, F MLP width."""

    architecture: str  # "LlamaForCausalLM"
    family: str  # "llama"
    dtype: str  # that is computed in, as a rule that of the published weights: "BF16" | "F16" | "F32"
    num_layers: int
    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    vocab_size: int
    max_context: int
    norm: Literal["rms", "layer"]
    norm_eps: float
    norm_position: Literal["pre", "post"] = "pre"  # OPT-350m: post
    norm_affine: bool = True  # False: norms without weights
    activation: Literal["silu", "relu", "gelu", "gelu_tanh", "quick_gelu"] = "silu"
    gated_mlp: bool = True
    fused_qkv: Literal["no", "concat", "per_head"] = "no"  # Phi-3, GPT-2: concat; GPT-NeoX: per_head
    fused_gate_up: bool = False
    transposed: bool = False  # GPT-2 stores [in, out]
    qk_norm: bool = False  # Qwen3: per-head RMS norm on q and k
    parallel_residual: bool = False  # GPT-NeoX
    rope: Rope | None = None
    sliding_window: int | None = None
    window_layers: tuple[bool, ...] | None = None  # which layers use the window; None: all do
    attention_scale: float | None = None  # None: head_dim ** -0.5
    tied_head: bool = False
    embed_dim: int | None = None  # OPT-350m: embeddings narrower than the model, with projections
    final_norm: bool = True
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None
    labels: tuple[str, ...] = ()  # of a classification head; empty: the head has a row per token
    scoring: str = "softmax"  # how its logits become scores: "softmax", "sigmoid", "none"
    encoder: Encoder | None = None  # None: a decoder
    program: tuple[Op, ...] = field(default=(), repr=False)
    lookups: tuple[RowLookup, ...] = ()
    num_parameters: int = 0
    stored_dtype: str = ""  # of the published weights where `dtype` is another: each op converts its own
    weights: str = "published"  # the format of the matrices where they are stored: or "int8" | "int4"
    attention_sizes: AttentionSizes | None = None  # on this machine; None: not known
    # Rows of exact products by op kind, none where any number will do; what is not named is not known.
    product_sizes: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def kv_bytes_per_token(self) -> int:
        """Key and value bytes of one token over all layers, in the model's dtype."""
        return self.kv_token_bytes(self.dtype)

    def kv_token_bytes(self, dtype: str) -> int:
        """The same in another format: `dtype` may be "INT8".  An encoder keeps none."""
        if self.encoder is not None:
            return 0
        return self.num_layers * kv_row_bytes(self.num_kv_heads, self.head_dim, dtype)

    @property
    def unread(self) -> tuple[str, ...]:
        """Stems of tensors that a checkpoint may hold though the model reads none of them."""
        return () if self.encoder is None else self.encoder.unread
