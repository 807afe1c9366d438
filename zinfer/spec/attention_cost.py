"""Bytes that attention needs beside its inputs.  In: rows, context, heads.  Out: an upper bound, as an int."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from zinfer.spec.records import DTYPE_BYTES, AttentionSizes

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
    sizes: Mapping[int, int],
    gathered: int,
    width: int,
    exact: bool,
    cuts: Sequence[int],
) -> int:
    """The largest call that carries several pieces, with queries or results in their dtype.  `sizes`: new rows of a
    piece, and how many such pieces a pass may have.  Whole pieces fill a call, so it is seldom full: every size and
    every number of keys is tried."""
    most = 0
    for size, num_pieces in sizes.items():
        rows = size * group
        for keys in cuts:
            count = stacked_pieces(kv_heads, head_dim, keys, rows, 0 if exact else gathered)
            alone = piece_bytes(kv_heads, head_dim, keys, rows, gathered) + rows * kv_heads * head_dim * width
            most = max(most, min(count, num_pieces) * alone)
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


def _cuts(context: int, key_counts: Sequence[int] | None) -> list[int]:
    """How many keys of a sequence of at most `context` tokens a call may read, ascending."""
    if key_counts is None:  # not known: any of them, or none
        return [*KEY_COUNTS, KV_BLOCK]
    known = sorted({*key_counts, KV_BLOCK})
    return _up_to(known, min(context, KV_BLOCK))


def _pieces(rows: int, longest: int, group: int, row_counts: Sequence[int] | None) -> dict[int, int]:
    """New rows of a piece, and how many such pieces `rows` rows of sequences with at most `longest` make.

    The last size is that of the largest piece.  A piece has more rows than the next smaller size would hold.
    """
    if row_counts is None:  # not known: whatever is twice as much as is wanted
        most = max(min(max(2 * longest, 8), QUERY_ROWS // group), 1)
        halves = [most >> shift for shift in range(most.bit_length())]
        return dict.fromkeys(reversed(halves), rows)
    sizes = _up_to(row_counts, longest)
    return {size: rows // (less + 1) for less, size in zip([0, *sizes], sizes, strict=False)}


def _up_to(ascending: Sequence[int], want: int) -> list[int]:
    """Those that are tried for `want`: the first that holds it, and the smaller ones."""
    most = next((count for count in ascending if count >= want), ascending[-1])
    return [count for count in ascending if count <= most]


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
    sizes: AttentionSizes | None = None,
) -> int:
    """Peak bytes of one `attend` call for `rows` new rows, the longest sequence ending at `context` tokens.

    The output [rows, heads, head_dim] is counted; queries, keys, values and `arranged_bytes` are not.  `dtype` is
    the word of ModelSpec.dtype.  Without `kv_heads` as many key-value heads as heads are assumed, without
    `sequences` one per row: the worst cases.  `kv_dtype` is the format of the pages: without it as `dtype`.
    `sizes` as in ModelSpec: with pages that are attended in place there are queries, results and their places, each of
    which is a copy only where a batch holds branches.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    sequences = rows if sequences is None else min(sequences, rows)
    group = heads // kv_heads
    width = DTYPE_BYTES[dtype]
    output = rows * heads * head_dim * width
    if sizes is not None and sizes.in_place and kv_dtype in (None, dtype):
        return 3 * output
    gathered = 1 + FP32 if kv_dtype == "INT8" else width  # bytes of an element as it comes from its pages
    cuts = _cuts(context, None if sizes is None else sizes.keys)
    pieces = _pieces(rows, min(rows, context), group, None if sizes is None else sizes.rows)
    alone = max(pieces) * group
    small = {size: min(count, sequences) for size, count in pieces.items() if 2 * size * group <= QUERY_ROWS}
    blockwise = max(
        piece_bytes(kv_heads, head_dim, cuts[-1], alone, gathered) + alone * kv_heads * head_dim * width,
        _stack_bytes(kv_heads, head_dim, group, small, gathered, width, exact, cuts),
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
