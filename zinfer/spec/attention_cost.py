"""Bytes that attention needs beside its inputs.  In: rows, context, heads.  Out: an upper bound, as an int."""

from __future__ import annotations

from zinfer.spec.records import DTYPE_BYTES

KV_BLOCK = 256  # tokens; attention cuts keys at multiples of it, counted from the sequence's first token
KEY_COUNTS = (32, 64, 96, 128, 192)  # beside KV_BLOCK itself: what a sequence's last block may be cut to
QUERY_ROWS = 128  # most rows of scores per key-value head (new rows times heads of a group) at once
PROMPT_ROWS = 128  # most rows of whole prompts, all of one length, in one fused call
STACK_BYTES = (
    4 * 2**20
)  # of keys, values, scores and sums that one call carries, if it carries several sequences
FP32 = 4


def piece_bytes(kv_heads: int, head_dim: int, keys: int, query_rows: int, element_bytes: int = 0) -> int:
    """One sequence's block in `partial` and `merge`: fp32 keys and values; beside them first what was gathered from
    pages (`element_bytes` each), then scores, queries and sums, or two sums being merged."""
    both = 2 * keys * head_dim
    rows = query_rows * head_dim
    summing = FP32 * max(query_rows * keys + 3 * rows, 7 * rows)
    return kv_heads * (FP32 * both + max(element_bytes * both + FP32 * rows, summing))


def stacked_pieces(kv_heads: int, head_dim: int, keys: int, query_rows: int, element_bytes: int = 0) -> int:
    """How many pieces of `query_rows` rows (new rows times heads of a group) one call of blockwise attention carries.

    With `element_bytes` what is gathered from pages has to find room beside them too.
    """
    return max(STACK_BYTES // piece_bytes(kv_heads, head_dim, keys, query_rows, element_bytes), 1)


def _stack_bytes(
    kv_heads: int,
    head_dim: int,
    group: int,
    query_rows: int,
    sequences: int,
    gathered: int,
    width: int,
    exact: bool,
) -> int:
    """The largest call that carries several pieces of at most `query_rows` rows each, with queries or results in
    their dtype.  Whole pieces fill it, so it is seldom full: every size and every number of keys is tried."""
    most, rows = 0, group
    while rows <= query_rows:
        for keys in (*KEY_COUNTS, KV_BLOCK):
            count = stacked_pieces(kv_heads, head_dim, keys, rows, 0 if exact else gathered)
            alone = piece_bytes(kv_heads, head_dim, keys, rows, gathered) + rows * kv_heads * head_dim * width
            most = max(most, min(count, sequences) * alone)
        rows *= 2
    return most


def fused_sequences(kv_heads: int, head_dim: int, keys: int, element_bytes: int) -> int:
    """How many sequences one call of torch's own attention carries, `keys` keys of each."""
    return max(STACK_BYTES // (2 * element_bytes * kv_heads * keys * head_dim), 1)


def kernel_bytes(rows: int, context: int, heads: int, head_dim: int) -> int:
    """What a fused kernel keeps to itself, for one sequence: keys and values packed by head, fp32 sums of its rows."""
    return 2 * min(rows, context) * heads * head_dim * FP32


def arranged_bytes(rows: int, context: int, sequences: int) -> int:
    """What a pass works out once for all layers and keeps to its end: which row sees what, where the keys lie."""
    return 2 * KV_BLOCK * rows + 8 * min(sequences, rows) * (context + KV_BLOCK)


def attention_workspace_bytes(
    rows: int,
    context: int,
    heads: int,
    head_dim: int,
    dtype: str,
    exact: bool,
    *,
    kv_heads: int | None = None,
    sequences: int | None = None,
    kv_dtype: str | None = None,
) -> int:
    """Peak bytes of one `attend` call for `rows` new rows, the longest sequence ending at `context` tokens.

    The output [rows, heads, head_dim] is counted; queries, keys, values and `arranged_bytes` are not.  `dtype` is
    the word of ModelSpec.dtype.  Without `kv_heads` as many key-value heads as heads are assumed, without
    `sequences` one per row: the worst cases.  `kv_dtype` is the format of the pages: without it as `dtype`.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    sequences = rows if sequences is None else min(sequences, rows)
    group = heads // kv_heads
    width = DTYPE_BYTES[dtype]
    output = rows * heads * head_dim * width
    alone = max(min(max(2 * rows, 8) * group, QUERY_ROWS), group)
    stacked = max(min(alone, QUERY_ROWS // 2), group)
    gathered = 1 + FP32 if kv_dtype == "INT8" else width  # bytes of an element as it comes from its pages
    blockwise = max(
        piece_bytes(kv_heads, head_dim, KV_BLOCK, alone, gathered) + alone * kv_heads * head_dim * width,
        _stack_bytes(kv_heads, head_dim, group, stacked, sequences, gathered, width, exact),
    )
    if exact:
        return output + blockwise
    # One fused call: a whole prompt or some short ones, with their output; or gathered keys and values of a stack.
    prompt_rows = min(rows, max(context, PROMPT_ROWS))
    prompt = prompt_rows * heads * head_dim * width + kernel_bytes(rows, prompt_rows, heads, head_dim)
    element = gathered + width if kv_dtype == "INT8" else width
    of_one = 2 * context * kv_heads * head_dim * element
    decode = max(of_one, min(STACK_BYTES * element // width, sequences * of_one))
    return output + max(blockwise, prompt, decode)
