"""How long each chunk computes.  In: a ModelSpec, a chunk table, compute rates, the rows of a pass.  Out: seconds."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from zinfer.chunks.table import ChunkTable
from zinfer.config.machine import Compute, Machine
from zinfer.plan.records import KvPlan
from zinfer.spec.cost import attention_flops
from zinfer.spec.lossless import LOSSLESS
from zinfer.spec.records import DTYPE_BYTES, ModelSpec, Op, kv_row_bytes
from zinfer.spec.stored import PUBLISHED, RATE_NAMES, WEIGHT_BYTES, op_bytes
from zinfer.units import round_up

_ATTENTION_AFTER = ("qkv", "v")  # the op whose last block is followed by attention
_RESIDENT = KvPlan()
_HEADS = ("head", "dense", "classify")
_BEHIND_ATTENTION = ("o", "gate", "up", "gate_up", "down")
RECORDED_ROWS = 256  # the most of a pass that a host records
_UNPACKING = 1.25  # of a product's time with the weight as it was: 0.9 to 1.3 of it with compiled kernels
Kind = tuple[object, ...]  # of ops that take as long as each other
_PREFILL_ROWS = 16  # new rows per sequence from which attention's arithmetic counts and not its reading


@dataclass(frozen=True, slots=True)
class PassLoad:
    """What one pass carries: `rows` token rows of `sequences` sequences that see `context` tokens each at its end.

    `logits` rows are scored, where those are more than one per sequence.
    """

    rows: int
    sequences: int
    context: int
    kv: KvPlan = _RESIDENT
    logits: int = 0

    @property
    def wanted(self) -> int:
        """Rows whose logits are wanted."""
        return max(min(self.sequences, self.rows), self.logits)


@dataclass(frozen=True, slots=True)
class ChunkSeconds:
    """Compute time of one chunk in one pass: products and attention, and the fixed cost of its ops."""

    work: float
    overhead: float

    @property
    def total(self) -> float:
        """Both together."""
        return self.work + self.overhead


def chunk_seconds(
    spec: ModelSpec,
    table: ChunkTable,
    compute: Compute,
    load: PassLoad,
    *,
    exact: bool,
    machine: Machine | None = None,
    all_stay: bool = False,
) -> list[ChunkSeconds]:
    """Seconds of every chunk of the table, in its order; a row table costs nothing.

    A pass that is recorded is replayed: as one where all chunks stay, part by part where they come and go.
    """
    costs = OpCosts(spec, compute, load, exact=exact, machine=machine)
    works: dict[Kind, float] = {}
    seconds = []
    for chunk in table.chunks:
        work = 0.0
        for op in (spec.program[index] for index in chunk.ops):
            kind = kind_of(spec, op)
            if kind not in works:
                works[kind] = costs.work(op)
            work += works[kind]
        # Where all stays leases outlast a pass.
        chunk_s = 0.0 if costs.is_replayed and all_stay else compute.chunk_overhead_s * bool(chunk.ops)
        overhead = len(chunk.ops) * costs.overhead_s + chunk_s
        seconds.append(ChunkSeconds(work, overhead))
    return seconds


class OpCosts:
    """Seconds of single ops in one pass.

    seconds(op) = weight bytes * seconds_per_byte(dtype, rows) + attention FLOPs / rate + overhead, the product's
    rate being a measured point at that many rows, so that it covers both regimes: bytes at few rows, FLOPs at many.
    The head, and what lies behind the last layer's attention, multiply rows whose logits are wanted.  Where the cache
    is not in the compute tier, attention costs what the links of `machine` and the attending side take.
    """

    def __init__(
        self,
        spec: ModelSpec,
        compute: Compute,
        load: PassLoad,
        *,
        exact: bool,
        machine: Machine | None = None,
    ) -> None:
        self._spec = spec
        self._load = load
        self._exact = exact
        self._machine = machine
        cost = compute.step_cost(exact=exact)
        replayed_s = cost.replayed_op_s
        self.is_replayed = replayed_s is not None and is_recorded(spec, load)
        self.overhead_s = cost.op_overhead_s if replayed_s is None or not self.is_replayed else replayed_s
        self._per_byte = _rates(compute, spec, load.rows, exact=exact)
        self._per_head_byte = _rates(compute, spec, load.wanted, exact=exact)
        self._attention_rate = attention_rate(compute, load, exact=exact)

    def work(self, op: Op) -> float:
        """Product, and attention behind the op that completes keys and values."""
        spec = self._spec
        per_byte = self._per_head_byte if is_narrow(spec, op) else self._per_byte
        work = op_bytes(spec, op) * per_byte[bool(op.stored)]
        if op.kind in _ATTENTION_AFTER and op.block == op.blocks - 1:
            keys = visible_keys(spec, op.layer, self._load)
            if self._load.kv.attend != "resident" and self._machine is not None:
                return work + far_attention_s(spec, self._machine, self._load, keys, exact=self._exact)
            work += attention_flops(spec, self._load.rows, keys) / self._attention_rate
        return work


def kind_of(spec: ModelSpec, op: Op) -> Kind:
    """All that an op's seconds depend on: of a hundred layers that are alike one is worked out."""
    window = spec.window_layers[op.layer] if spec.window_layers and 0 <= op.layer < spec.num_layers else None
    shapes = tuple([part.shape for part in op.reads])
    return (op.kind, shapes, bool(op.stored), op.block == op.blocks - 1, window, is_narrow(spec, op))


def is_narrow(spec: ModelSpec, op: Op) -> bool:
    """Whether an op multiplies only rows whose logits are wanted, or one of each text."""
    is_last = op.layer == spec.num_layers - 1 and spec.encoder is None
    return op.kind in _HEADS or (is_last and op.kind in _BEHIND_ATTENTION)


def has_steps(spec: ModelSpec) -> bool:
    """Whether all ops of a model are steps that a host can record (zinfer.kernels.native.tape)."""
    return spec.dtype == "BF16" and spec.encoder is None


def is_recorded(spec: ModelSpec, load: PassLoad) -> bool:
    """Whether a host that records passes records such ones: one new row per sequence, the cache beside the weights."""
    is_decode = load.rows == load.sequences <= RECORDED_ROWS and load.context > 1
    return has_steps(spec) and is_decode and load.kv == _RESIDENT


def attention_rate(compute: Compute, load: PassLoad, *, exact: bool) -> float:
    """FLOPs per second of attention under a load."""
    cost = compute.step_cost(exact=exact)
    is_prefill = load.rows >= _PREFILL_ROWS * load.sequences
    return cost.prefill_attention_flops_per_s if is_prefill else cost.attention_flops_per_s


def far_attention_s(spec: ModelSpec, machine: Machine, load: PassLoad, keys: int, *, exact: bool) -> float:
    """Seconds of one layer's attention over pages in host memory below a device.

    New keys and values go down.  Then either queries follow and results come back, and the host computes; or the
    pages come up, every one once, and the device computes.
    """
    assert machine.h2d is not None and machine.device is not None, "pages lie below a device"
    up, down = machine.h2d, machine.d2h or machine.h2d
    width = DTYPE_BYTES[spec.dtype]
    queries = load.rows * spec.num_heads * spec.head_dim * width
    seconds = down.seconds(load.rows * kv_row_bytes(spec.num_kv_heads, spec.head_dim, spec.dtype))
    if load.kv.attend == "host":
        seconds += down.seconds(queries) + up.seconds(queries)
        engine = machine.host
    else:
        row_bytes = kv_row_bytes(spec.num_kv_heads, spec.head_dim, load.kv.dtype or spec.dtype)
        seconds += up.seconds(load.sequences * keys * row_bytes)
        engine = machine.device
    return seconds + attention_flops(spec, load.rows, keys) / attention_rate(engine, load, exact=exact)


def visible_keys(spec: ModelSpec, layer: int, load: PassLoad) -> int:
    """Keys that a new row sees on average: its sequence's past and half of the new rows, within the window.

    A row of an encoder's text sees all of it.
    """
    if spec.encoder is not None:
        return load.context
    window = spec.sliding_window
    if window is None or (spec.window_layers is not None and not spec.window_layers[layer]):
        window = load.context
    new_rows = ceil(load.rows / load.sequences)
    return min(load.context - (new_rows - 1) // 2, window)


def seconds_per_byte(compute: Compute, dtype: str, rows: int, *, exact: bool) -> float:
    """Seconds per weight byte at so many rows.

    Exact mode has points of its own where the machine was measured ("BF16 exact"); declared machines are taken to
    pad to 2 rows in 16 bits and to a multiple of 4 in fp32.
    """
    if exact and f"{dtype} exact" in compute.products:
        return compute.seconds_per_byte(f"{dtype} exact", rows)
    if exact:
        rows = round_up(rows, 4) if dtype == "F32" else max(rows, 2)
    return compute.seconds_per_byte(dtype, rows)


def _rates(compute: Compute, spec: ModelSpec, rows: int, *, exact: bool) -> tuple[float, float]:
    """Seconds per byte of published weights, and of stored bytes of others."""
    published = seconds_per_byte(compute, spec.dtype, rows, exact=exact)
    if spec.weights == PUBLISHED:
        return published, published
    return published, stored_seconds_per_byte(compute, spec.weights, rows, exact=exact)


def stored_seconds_per_byte(compute: Compute, weights: str, rows: int, *, exact: bool) -> float:
    """Seconds per stored byte at so many rows.

    Where the machine's products with such weights were not measured: quantised weights are unpacked, at the rate at
    which memory is read for one row, and multiplied in bf16; lossless ones nearer to where they are multiplied.
    """
    name = RATE_NAMES[weights]
    if name in compute.products:
        return seconds_per_byte(compute, name, rows, exact=exact)
    nbytes = WEIGHT_BYTES[weights]
    if weights == LOSSLESS:
        return _UNPACKING * 2 * seconds_per_byte(compute, "BF16", rows, exact=exact) / nbytes
    unpack = (nbytes + 2) * compute.seconds_per_byte("BF16", 1)
    return (unpack + 2 * seconds_per_byte(compute, "BF16", rows, exact=exact)) / nbytes
