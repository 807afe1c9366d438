"""What an encoder's pass keeps alive.  In: a ModelSpec, the rows and texts of a pass.  Out: bytes of activations."""

from __future__ import annotations

from math import ceil

from zinfer.spec.cost import ACTIVATION_PIECE, EXACT_ROWS, EXACT_SIZES, MOST_ROWS
from zinfer.spec.cover import cover
from zinfer.spec.records import DTYPE_BYTES, ModelSpec

_FP32 = 4


def encoder_peak_bytes(spec: ModelSpec, rows: int, texts: int, context: int, *, exact: bool) -> int:
    """The most bytes of activations alive at once, for `texts` texts of `rows` token rows together.

    `context` is the longest text.  An upper bound, op by op of `models.encoder`; weights do not count.
    """
    peaks = encoder_activation_bytes(spec, rows, texts, context, exact=exact)
    return max(peaks.values())


def encoder_activation_bytes(
    spec: ModelSpec, rows: int, texts: int, context: int, *, exact: bool
) -> dict[str, int]:
    """As `encoder_peak_bytes`, per op kind."""
    assert spec.encoder is not None, "a decoder's activations are counted by activation_bytes"
    width = DTYPE_BYTES[spec.dtype]
    stream, mlp = rows * spec.model_dim * width, rows * spec.mlp_dim * width
    embedding = rows * (spec.embed_dim or spec.model_dim) * width
    most = EXACT_ROWS if exact else MOST_ROWS
    joined = 1 + (most / rows if rows > most else 0)  # the whole of a product, and a piece on its way into it
    # The last piece of a product is copied to be filled up.
    filled = min(rows, EXACT_ROWS) * width if exact else 0
    wide, narrow = filled * spec.mlp_dim, filled * spec.model_dim
    text = context * spec.model_dim * width
    roles = 2 + bool(spec.encoder.num_segments)
    # Queries, keys and values, the stream; one text's copies and result; all results, and the whole put together.
    # Without exact the copies of texts of equal length: at worst all but one text's.
    attention = 6 * stream + 5 * text if exact else 8 * stream + 2 * text
    piece = ACTIVATION_PIECE * width if exact and rows * spec.mlp_dim > ACTIVATION_PIECE else 0
    modes, labels = len(spec.encoder.pooling), len(spec.encoder.labels)
    first, pooled = texts * spec.model_dim, texts * spec.model_dim * modes
    peaks = {
        "embed": (roles + 3) * embedding + (joined * stream if spec.embed_dim else 0),
        "q": (1 + joined) * stream + max(stream, narrow),
        "k": (2 + joined) * stream + narrow,
        "v": max((3 + joined) * stream + narrow, attention),
        "o": (2 + joined) * stream + narrow,
        "up": stream + max(stream, narrow) + max(joined, 2) * mlp + piece,
        "down": (1 + joined) * stream + mlp + wide,
        "pool": 2 * stream + text + (first + pooled) * (3 * width + _FP32),
        "dense": (4 * first + pooled) * (width + _FP32),
        "classify": (2 * first + pooled + 2 * texts * labels) * (width + _FP32),
    }
    if exact:  # a head's few rows are filled up before the product, and so is its result
        for kind, outputs in (("dense", spec.model_dim), ("classify", labels)):
            peaks[kind] += _filled_rows(spec, kind, texts) * (spec.model_dim + outputs) * width
    return {kind: ceil(peak) for kind, peak in peaks.items()}


def _filled_rows(spec: ModelSpec, kind: str, rows: int) -> int:
    """Rows of the largest piece in which an exact product of so many rows is multiplied; 0 where none is filled up."""
    sizes = dict(spec.product_sizes).get(kind, EXACT_SIZES)
    pieces = cover(rows, sizes) if sizes else []
    return max((size for start, stop, size in pieces if size > stop - start), default=0)
