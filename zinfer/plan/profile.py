"""What a model costs, from its ModelSpec alone.  In: shapes.  Out: bytes and FLOPs of ops, cache and activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from zinfer.chunks.table import ChunkTable
from zinfer.plan.place import Reserve
from zinfer.plan.records import Workload
from zinfer.spec.attention_cost import arranged_bytes
from zinfer.spec.cost import activation_bytes, attention_bytes, converted_bytes, waiting_bytes
from zinfer.spec.encoder_cost import encoder_peak_bytes
from zinfer.spec.records import DTYPE_BYTES, ModelSpec, Op, kv_row_bytes
from zinfer.spec.stored import op_bytes, workspace_bytes
from zinfer.units import KIB, round_up

KV_PAGE_TOKENS = 16  # a sequence's part of the KV cache is rounded up to pages of so many tokens
_MOST_GRAPH_BYTES = 64 * 2**20
_LEAST_GRAPH_BYTES = 32 * 2**20
ROW_STAGING_BYTES = 128 * KIB  # windows through which embedding rows are read


@dataclass(frozen=True, slots=True)
class Profile:
    """Sizes of one model.  `pass_bytes` is what one pass multiplies with, embedding tables read by rows aside."""

    num_parameters: int
    num_ops: int
    pass_bytes: int
    largest_op_bytes: int
    row_table_bytes: int
    kv_bytes_per_token: int
    flops_per_row: int  # products alone; attention comes on top


def profile(spec: ModelSpec) -> Profile:
    """Sum up the program; nothing is read and nothing is allocated."""
    width = DTYPE_BYTES[spec.dtype]
    sizes = [op_bytes(spec, op) for op in spec.program]
    return Profile(
        num_parameters=spec.num_parameters,
        num_ops=len(sizes),
        pass_bytes=sum(sizes),
        largest_op_bytes=max(sizes),
        row_table_bytes=sum(lookup.num_rows * lookup.width * width for lookup in spec.lookups),
        kv_bytes_per_token=spec.kv_bytes_per_token,
        flops_per_row=2 * sum(op.weight_numel for op in spec.program),
    )


def matrix_shapes(spec: ModelSpec) -> list[tuple[int, int]]:
    """[out, in] of the products of one layer and of one block of the head, on which a machine is measured."""
    matrices = [op.matrix for op in spec.program if op.matrix and op.layer in (0, spec.num_layers)]
    layer = [op.matrix for op in spec.program if op.matrix and op.layer == 0]
    return [(m.shape[0], m.shape[1]) for m in matrices[: len(layer) + 1]]


def cache_tokens(workload: Workload) -> int:
    """Tokens that the cache holds, in whole pages: what was asked for, or the longest `batch` requests at their end."""
    longest = round_up(workload.context, KV_PAGE_TOKENS)
    if workload.cache_tokens is not None:
        return max(round_up(workload.cache_tokens, KV_PAGE_TOKENS), longest)
    known = [round_up(length, KV_PAGE_TOKENS) for length in workload.lengths[: workload.batch]]
    return sum(known) + (workload.batch - len(known)) * (known[-1] if known else longest)


def kv_bytes(spec: ModelSpec, workload: Workload) -> int:
    """The cache of a workload."""
    return cache_tokens(workload) * spec.kv_token_bytes(workload.kv.dtype or spec.dtype)


def graph_bytes(device_bytes: int) -> int:
    """What recorded passes may take of a device's budget, beside the activations of passes that are not recorded.

    torch takes 20 MiB for the first tensor of more than 1 MiB: where there is any room, that is there.
    """
    return min(_MOST_GRAPH_BYTES, max(device_bytes // 64, min(_LEAST_GRAPH_BYTES, device_bytes // 16)))


def library_free(spec: ModelSpec) -> bool:
    """Whether exact products with published weights are all our kernels'."""
    sizes = dict(spec.product_sizes)
    return all(sizes.get(op.kind) == () for op in spec.program if op.matrix and not op.stored)


def turns_of(spec: ModelSpec, table: ChunkTable) -> list[Op]:
    """The ops behind which micro-batches take turns: the last of each chunk."""
    return [spec.program[chunk.ops[-1]] for chunk in table.streamable]


def reserve_for(
    spec: ModelSpec,
    workload: Workload,
    *,
    exact: bool,
    device: str = "cpu",
    turns: Sequence[Op] | None = None,
) -> Reserve:
    """What passes of at most `workload.prefill_rows` rows need beside weights, the cache included.

    Logits are wanted for one row per sequence, or for `workload.logit_rows`.  While one micro-batch computes, the
    others keep what they hold after an op of `turns` (None: any), behind which they take turns.  A cache below the
    device costs host memory: pages, and what attends or gathers there; pages that come up cost the device one
    sequence's layer.
    """
    unpacking = workspace_bytes(spec, device)
    unpacking += converted_bytes(spec)
    rows, kv = workload.rows_at_once, workload.kv
    logit_rows = max(workload.logit_rows or 0, workload.batch)
    if spec.encoder is not None:  # texts are in one micro-batch, and keep nothing in a cache
        peak = encoder_peak_bytes(spec, workload.prefill_rows, logit_rows, workload.context, exact=exact)
        return Reserve(kv=0, activations=peak + ROW_STAGING_BYTES + unpacking)
    kv_dtype = kv.dtype or spec.dtype
    context = round_up(workload.context, KV_PAGE_TOKENS)  # whoever fits the pages is served
    costs = activation_bytes(spec, rows, logit_rows, context, exact=exact, kv_dtype=kv_dtype)
    waiting = waiting_bytes(spec, rows, costs, spec.program if turns is None else turns)
    arranged = arranged_bytes(workload.prefill_rows, context, logit_rows)
    activations = max(cost.peak for cost in costs.values())
    parked = workload.num_micros * waiting if workload.parks else 0
    num_waiting, rest = workload.num_micros - 1, workload.prefill_rows - (workload.num_micros - 1) * rows
    if workload.parks:  # one may still be on its way down when the next one's turn has begun
        activations += waiting
    elif num_waiting:  # a full one computes, or the last one, which has fewer rows, beside full ones
        last = activation_bytes(spec, rest, min(rest, logit_rows), context, exact=exact, kv_dtype=kv_dtype)
        activations = max(
            activations + ceil((num_waiting - 1) * waiting + waiting * rest / rows),
            max(cost.peak for cost in last.values()) + num_waiting * waiting,
        )
    activations += arranged + ROW_STAGING_BYTES + unpacking
    if kv.attend == "resident":
        return Reserve(kv_bytes(spec, workload), activations, host_activations=parked, parked=parked)
    if kv.attend == "device":
        activations += context * kv_row_bytes(spec.num_kv_heads, spec.head_dim, "F32")
    width = DTYPE_BYTES[spec.dtype]
    crossing = rows * 2 * (spec.num_heads + spec.num_kv_heads) * spec.head_dim * width
    attending = attention_bytes(spec, rows, context, logit_rows, exact=exact, kv_dtype=kv_dtype)
    return Reserve(
        activations=activations,
        host_kv=kv_bytes(spec, workload),
        host_activations=crossing + attending + arranged + parked,
        parked=parked,
    )
