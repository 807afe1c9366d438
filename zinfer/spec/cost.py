"""What an op costs.  In: a ModelSpec, an op and the rows of a pass.  Out: FLOPs and bytes of activations, as ints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

from zinfer.spec.attention_cost import FP32, attention_workspace_bytes
from zinfer.spec.cover import cover
from zinfer.spec.program import matrix_shape
from zinfer.spec.quant import GROUP
from zinfer.spec.records import DTYPE_BYTES, ModelSpec, Op
from zinfer.units import round_up

EXACT_ROWS = 256  # most rows of one exact product; more go piece by piece
EXACT_SIZES = (1, 4, 16, 32, 64, 128, EXACT_ROWS)  # what they may be padded to, where a machine lets them
MOST_ROWS = 1024  # the same without exact: libraries keep buffers of their own for the rows of a call
FEW_ROWS = 6  # of a product: more are packed first, for the compiled kernel to read in its order
_AGREEING_ROWS = 16  # that a library may need for its fewest rows to agree with more
_TILE_ROWS = 16  # of the matrix unit, whose tiles are of one height: some rows are in two of them
ACTIVATION_PIECE = 2**20  # elements; exact activations of more go piece by piece
KEEP_INPUT = frozenset({"q", "k", "gate"})  # kinds after which the next product reads the same rows


@dataclass(frozen=True, slots=True)
class OpBytes:
    """Activation bytes of one micro-batch: the most while an op runs, and what then waits for the next one.

    `between` is what waits while another block of the same op is to come.
    """

    peak: int
    held: int
    between: int = 0


def quantised_product_bytes(rows: int, op: Op) -> int:
    """Beside input and output: the input in bf16, once more with its groups' sums behind it, one more output.

    Where no kernel was compiled a library's product of a few rows is one of more, as many as agree with others.
    """
    if op.matrix is None or not any(part.role == "nibbles" for part in op.stored):
        return 0
    outputs, inputs = op.matrix.shape[:: -1 if op.transposed else 1]
    return DTYPE_BYTES["BF16"] * max(rows, _AGREEING_ROWS) * (2 * inputs + inputs // GROUP + outputs)


def packed_rows(rows: int, inputs: int) -> tuple[int, int]:
    """The shape in which the compiled kernel packs the rows of a product: 256 at a time, inputs in registers of 32."""
    if rows <= FEW_ROWS:
        return (0, 0)
    return (min(rows + _TILE_ROWS - 1, EXACT_ROWS), round_up(inputs, 32))


def converted_bytes(spec: ModelSpec) -> int:
    """The weights of one op in the dtype that is computed in; 0 where they are published in it."""
    if spec.stored_dtype in ("", spec.dtype):
        return 0
    return max(sum(part.numel for part in op.reads) for op in spec.program) * DTYPE_BYTES[spec.dtype]


def attention_flops(spec: ModelSpec, rows: int, context: int) -> int:
    """Of one layer: scores and weighted values of `rows` new rows that each see `context` keys."""
    return 4 * rows * context * spec.num_heads * spec.head_dim


def attention_bytes(
    spec: ModelSpec, rows: int, context: int, sequences: int, *, exact: bool, kv_dtype: str | None = None
) -> int:
    """The workspace of one layer's attention; see `attention_workspace_bytes`."""
    return attention_workspace_bytes(
        rows,
        context,
        spec.num_heads,
        spec.head_dim,
        spec.dtype,
        exact,
        kv_heads=spec.num_kv_heads,
        sequences=sequences,
        kv_dtype=kv_dtype,
        sizes=spec.attention_sizes,
    )


def activation_peak_bytes(
    spec: ModelSpec,
    rows: int,
    logit_rows: int,
    context: int,
    *,
    exact: bool = True,
    kv_dtype: str | None = None,
) -> int:
    """The most bytes of activations alive at once in a pass of one micro-batch; see `activation_bytes`."""
    costs = activation_bytes(spec, rows, logit_rows, context, exact=exact, kv_dtype=kv_dtype)
    return max(cost.peak for cost in costs.values())


def activation_bytes(
    spec: ModelSpec,
    rows: int,
    logit_rows: int,
    context: int,
    *,
    exact: bool = True,
    kv_dtype: str | None = None,
) -> dict[str, OpBytes]:
    """Activation bytes per op kind, for `rows` new rows of which `logit_rows` want logits.

    `context` is the length of the longest sequence at the end of the pass; as many sequences are assumed as rows
    that want logits.  Embedding rows count until they are
    added up; weights and the KV cache do not count.
    """
    flow = _FlowBytes(spec, rows, logit_rows, context, exact, kv_dtype)
    costs: dict[str, OpBytes] = {}
    # Two layers stand for all: the first makes the rotary tables and, where norms come behind, has one norm less.
    # The last one, where only rows that want logits go on behind attention, needs less.
    for op in spec.program:
        if op.block == 0 and (op.layer < 2 or op.layer == spec.num_layers):
            cost, other = flow.run(op), costs.get(op.kind, OpBytes(0, 0))
            costs[op.kind] = OpBytes(
                max(cost.peak, other.peak), max(cost.held, other.held), max(cost.between, other.between)
            )
    return costs


def waiting_bytes(spec: ModelSpec, rows: int, costs: Mapping[str, OpBytes], ends: Iterable[Op]) -> int:
    """The most that a micro-batch of `rows` rows holds while others compute.

    They take turns after each of `ends`, the last ops of chunks; before its first turn a micro-batch holds the rows
    that were looked up.  The last op's logits count with the rows that want them, once for the whole pass.
    """
    width = (spec.embed_dim or spec.model_dim) + (spec.model_dim if spec.rope is None else 0)
    most = rows * width * DTYPE_BYTES[spec.dtype]
    for op in ends:
        if op.kind != "head":
            cost = costs[op.kind]
            most = max(most, cost.held if op.block == op.blocks - 1 else cost.between)
    return most


@dataclass(slots=True)
class _FlowBytes:
    """The decoder's Flow with bytes in place of tensors; each step mirrors the one of that name there."""

    spec: ModelSpec
    rows: int
    logit_rows: int
    context: int
    exact: bool
    kv_dtype: str | None
    live: dict[str, int] = field(default_factory=dict)
    peak: int = 0
    product_sizes: Mapping[str, tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self.product_sizes = dict(self.spec.product_sizes)
        self.live["tokens"] = self._size(self.spec.embed_dim or self.spec.model_dim)
        if self.spec.rope is None:
            self.live["positions"] = self._size(self.spec.model_dim)

    def run(self, op: Op) -> OpBytes:
        """All blocks of one matrix; `op` is the first."""
        if op.layer == self.spec.num_layers and "stream" in self.live:  # since the last layer's attention
            self.rows = self.logit_rows
            self.live["stream"] = self._size(self.spec.model_dim)
        self.peak = sum(self.live.values())
        if "input" not in self.live:
            self._enter(op)
        self._product(op)
        between = sum(self.live.values())
        if op.kind not in KEEP_INPUT:
            self._drop("input")
        self._finish(op.kind)
        return OpBytes(self.peak, sum(self.live.values()), between)

    def _size(self, width: int) -> int:
        return self.rows * width * DTYPE_BYTES[self.spec.dtype]

    def _touch(self, extra: int) -> None:
        """Something of `extra` bytes is alive for a moment beside what the flow holds."""
        self.peak = max(self.peak, sum(self.live.values()) + extra)

    def _drop(self, *names: str) -> None:
        for name in names:
            self.live.pop(name, None)

    def _enter(self, op: Op) -> None:
        spec = self.spec
        if op.kind == "embed":
            self.live["input"] = self.live.pop("tokens")
            return
        if op.layer == spec.num_layers:
            self._drop("rotary")
        width = self._size(spec.model_dim)
        if op.normed:
            moments = 2 * FP32 * self.rows  # mean and deviation
            self._touch(self._norm_bytes(spec.model_dim) if spec.norm == "rms" else width + moments)
        # A stream that is read as it is, or that a norm takes the place of, is one tensor and not two.
        self.live["input"] = width if op.normed and spec.norm_position == "pre" else 0
        if op.layer == spec.num_layers:
            self._drop("stream")
            self.live["input"] = width

    def _norm_bytes(self, width: int, heads: int = 1) -> int:
        """RMS norm at its worst holds two fp32 copies of its input, or one and two results: as much for bf16."""
        return 2 * FP32 * self.rows * (width + 1) * heads

    def _product(self, op: Op) -> None:
        if op.matrix is None:
            self.live["output"] = self.live.pop("input")
            return
        width = self._size(1)
        wide = FP32 * self.rows if op.kind == "head" else width
        num_out = matrix_shape(self.spec, op.kind)[0]
        block = num_out if op.blocks == 1 else op.matrix.shape[0]
        is_placed = op.blocks > 1 or wide > width
        if is_placed:
            self.live["output"] = num_out * wide
        # The compiled kernel writes where the result belongs; whether it serves is only known of exact products.
        is_compiled = self.exact and self.product_sizes.get(op.kind) == () and not op.stored
        product = 0 if is_placed and is_compiled else self._product_bytes(op, block, is_placed=is_placed)
        self._touch(product + quantised_product_bytes(self.rows, op) + self._packed_bytes(op))
        self.live["output"] = num_out * wide

    def _product_bytes(self, op: Op, block: int, *, is_placed: bool) -> int:
        """A product of `block` outputs: the result, unless its place is there already (`is_placed`), and a piece, with
        what is padded, before it is in its place."""
        row, whole = block * DTYPE_BYTES[self.spec.dtype], block * self._size(1)
        most = EXACT_ROWS if self.exact else MOST_ROWS
        if not self.exact or op.stored:
            return whole + (row * most if self.rows > most else 0)
        inputs = matrix_shape(self.spec, op.kind)[1] * DTYPE_BYTES[self.spec.dtype]
        largest = 0 if is_placed else whole
        sizes = self.product_sizes.get(op.kind, EXACT_SIZES)
        for start, stop, size in cover(self.rows, sizes) if sizes else ():
            padded = size * inputs if size > stop - start else 0
            largest = max(
                largest, size * row + padded + (whole if size != self.rows and not is_placed else 0)
            )
        return largest

    def _packed_bytes(self, op: Op) -> int:
        """The input once more, where the compiled kernel may serve."""
        is_library = self.exact and bool(self.product_sizes.get(op.kind, EXACT_SIZES))
        if op.stored or is_library or self.spec.dtype != "BF16":
            return 0
        return prod(packed_rows(self.rows, matrix_shape(self.spec, op.kind)[1])) * DTYPE_BYTES["BF16"]

    def _finish(self, kind: str) -> None:
        output = self.live["output"]
        match kind:
            case "embed":
                self._touch(self._size(self.spec.model_dim) if "positions" in self.live else 0)
                self._become("stream", output, "positions")
            case "q" | "k":
                self._heads({"q": "query", "k": "key"}[kind], output)
                self._drop("output")
            case "v":
                self._attention()
            case "qkv":
                self._heads("query", 0)
                self._heads("key", 0)
                self._attention()
            case "gate":
                self._touch(self._activation_bytes(output))
                self._become("gate", output)
            case "up" if self.spec.gated_mlp:
                self._touch(output)
                self._become("input", output, "gate")
            case "up":
                self._touch(self._activation_bytes(output))
                self._become("input", output)
            case "gate_up":
                half = output // 2
                copied = half if self.exact else 0  # the gate's columns are put together first
                self._touch(max(copied + self._activation_bytes(half), 2 * half))
                self._become("input", half)
            case "o" if self.spec.parallel_residual:
                self._become("branch", output)
            case "o" | "down":
                self._touch(output)
                self._become("stream", output, "branch")
            case "project_out":
                self._become("input", output)
            case _:
                self._become("logits", output)

    def _become(self, name: str, nbytes: int, *used: str) -> None:
        """The output, and what else was `used`, has become `name`."""
        self._drop("output", *used)
        self.live[name] = nbytes

    def _heads(self, name: str, output: int) -> None:
        """Rotation makes half products, both halves and their joint copy; `output` is what it reads."""
        spec = self.spec
        heads = spec.num_heads if name == "query" else spec.num_kv_heads
        width = self._size(heads * spec.head_dim)
        if spec.qk_norm:
            self._touch(self._norm_bytes(spec.head_dim, heads))
        if spec.rope is None:
            self.live[name] = output
            return
        normed = width if spec.qk_norm else 0
        rotary = self._size(spec.rope.rotary_dim)
        if "rotary" not in self.live:
            self.live["rotary"] = rotary
            self._touch(normed + 3 * FP32 * self.rows * spec.rope.rotary_dim // 2)
        self._touch(normed + width + self._size(heads * spec.rope.rotary_dim))
        self.live[name] = width

    def _attention(self) -> None:
        spec = self.spec
        self._touch(
            attention_bytes(
                spec, self.rows, self.context, self.logit_rows, exact=self.exact, kv_dtype=self.kv_dtype
            )
        )
        self._become("input", self._size(spec.num_heads * spec.head_dim), "query", "key")

    def _activation_bytes(self, output: int) -> int:
        if self.spec.activation == "relu" or not self.exact:
            return output * (3 if self.spec.activation == "quick_gelu" else 1)
        piece = ACTIVATION_PIECE * DTYPE_BYTES[self.spec.dtype]
        return output + (piece if output > piece else 0)
