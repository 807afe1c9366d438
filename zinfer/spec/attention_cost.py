"""Bytes that attention needs beside its inputs.  In: rows, context, heads.  Out: an upper bound, as an int."""

from __future__ import annotations

from zinfer.spec.records import DTYPE_BYTES

FP32 = 4
KV_BLOCK = 256  # tokens; attention cuts keys at multiples of it, counted from the sequence's first token
QUERY_ROWS = 128  # most rows of scores per key-value head (new rows times heads of a group) at once


def attention_workspace_bytes(
    rows: int,
    context: int,
    heads: int,
    head_dim: int,
    dtype: str,
    exact: bool,
    *,
    kv_heads: int | None = None,
) -> int:
    """Peak bytes of one `attend` call for `rows` new rows, the longest sequence ending at `context` tokens.

    The output [rows, heads, head_dim] is counted, queries, keys and values are not.  `dtype` is the word of
    ModelSpec.dtype.  Without `kv_heads` as many key-value heads as heads are assumed, the worst case.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    output = rows * heads * head_dim * DTYPE_BYTES[dtype]
    blockwise = _blockwise_bytes(rows, context, heads, kv_heads, head_dim, DTYPE_BYTES[dtype])
    if exact:
        return output + blockwise
    # One fused call per sequence: its own output, and at worst its keys and values gathered from scattered pages.
    sequence = min(rows, context) * heads * head_dim * DTYPE_BYTES[dtype]
    gathered = 2 * context * kv_heads * head_dim * DTYPE_BYTES[dtype] if rows < context else 0
    private = kernel_bytes(rows, context, heads, head_dim)
    return output + max(blockwise if rows < context else 0, sequence + gathered + private)


def kernel_bytes(rows: int, context: int, heads: int, head_dim: int) -> int:
    """What a fused kernel keeps to itself, for one sequence: keys and values packed by head, fp32 sums of its rows."""
    return 2 * min(rows, context) * heads * head_dim * FP32


def _blockwise_bytes(rows: int, context: int, heads: int, kv_heads: int, head_dim: int, width: int) -> int:
    """The most that is alive in `_blockwise`, step by step; the names are those of its tensors."""
    group = heads // kv_heads
    score_rows = max(min(max(2 * rows, 8) * group, QUERY_ROWS), group)
    q = kv_heads * score_rows * head_dim * FP32  # also `total`, a block's share of it, and the result
    k = kv_heads * KV_BLOCK * head_dim * FP32
    scores = kv_heads * score_rows * KV_BLOCK * FP32
    small = score_rows * (KV_BLOCK + 6 * kv_heads * FP32)  # the mask, maxima and sums of rows
    # Half precision is padded, and joined where past and new rows meet, before it is widened.
    narrow = (k // FP32 * width) * ((width < FP32) + (rows < context))
    return small + max(
        3 * q + q // FP32 * width,  # queries padded, widened, scaled, put in order
        2 * q + 2 * k + max(narrow, scores),
        3 * q + k + scores,
    )
