"""Bytes that attention needs beside its inputs.  In: rows, context, heads.  Out: an upper bound, as an int."""

from __future__ import annotations

from zinfer.spec.records import DTYPE_BYTES

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
    group = heads // kv_heads
    width = DTYPE_BYTES[dtype]
    outputs = 2 * rows * heads * head_dim * width  # pieces, and the whole put together
    score_rows = max(min(max(2 * rows, 8) * group, QUERY_ROWS), group)
    # fp32 scores, plain and masked, and the masks; queries as given and scaled, the running sum, a block's share,
    # the result; a block's keys and values in fp32 and as they are joined.
    scores = score_rows * KV_BLOCK * (2 * 4 * kv_heads + 8)
    queries = kv_heads * score_rows * head_dim * (5 * 4 + width)
    block = kv_heads * KV_BLOCK * head_dim * (2 * 4 + 3 * width)
    blockwise = scores + queries + block
    if exact:
        return outputs + blockwise
    # One fused call per sequence: at worst its keys and values are gathered from scattered pages, and the
    # kernel keeps fp32 sums of its output rows.
    gathered = 2 * context * kv_heads * head_dim * width
    return outputs + max(blockwise, gathered + 2 * rows * heads * head_dim * 4)
