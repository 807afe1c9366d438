"""The ordered ops of one pass.  In: a ModelSpec's shapes and published names.  Out: ops and row lookups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from zinfer.spec.records import DTYPE_BYTES, ModelSpec, Op, RowLookup, WeightRef
from zinfer.units import MIB, round_up

BLOCK_BYTES = 64 * MIB  # a larger matrix is cut into blocks of rows, so that no slot need hold more
BLOCK_ROWS = 256  # every border between blocks is a multiple of this


@dataclass(frozen=True, slots=True)
class Names:
    """Published names of one checkpoint: what an op reads -> stem ("{}" is the layer), and which ops are biased."""

    stems: Mapping[str, str]
    biased: frozenset[str] = frozenset()
    position_offset: int | None = None


def build_program(spec: ModelSpec, names: Names) -> tuple[tuple[Op, ...], tuple[RowLookup, ...], int]:
    """Cut one pass into ops.  Returns (program, lookups, number of parameters); a tied head is counted once.

    Depends on the model alone, so that every placement computes the same shapes.
    """
    stems = names.stems
    program: list[Op] = []
    products = _products if spec.encoder is None else _encoder_products
    for kind, layer, stem, norm in products(spec, stems):
        program += _blocks(spec, names, len(program), kind, layer, stem, norm)
    width = spec.embed_dim or spec.model_dim
    lookups = [RowLookup("tokens", f"{stems['embed']}.weight", spec.vocab_size, width)]
    if names.position_offset is not None:
        num_rows = spec.max_context + names.position_offset
        table = f"{stems['positions']}.weight"
        wide = spec.model_dim if spec.encoder is None else width
        lookups.append(RowLookup("positions", table, num_rows, wide, names.position_offset))
    if spec.encoder is not None and spec.encoder.num_segments:
        table = f"{stems['segments']}.weight"
        lookups.append(RowLookup("segments", table, spec.encoder.num_segments, width))
    weights = {weight.key: weight.numel for op in program for weight in op.weights}
    tables = (0 if spec.tied_head and row.role == "tokens" else row.num_rows * row.width for row in lookups)
    return tuple(program), tuple(lookups), sum(weights.values()) + sum(tables)


def layer_kinds(spec: ModelSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Op kinds of a layer in order: those of attention, those of the MLP."""
    attention = ("q", "k", "v", "o") if spec.fused_qkv == "no" else ("qkv", "o")
    if not spec.gated_mlp:
        return attention, ("up", "down")
    return attention, (("gate_up", "down") if spec.fused_gate_up else ("gate", "up", "down"))


def matrix_shape(spec: ModelSpec, kind: str) -> tuple[int, int]:
    """(out, in) of an op's whole matrix."""
    width, mlp = spec.model_dim, spec.mlp_dim
    query, key = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    embed = spec.embed_dim or width
    shapes = {
        "embed": (width, embed),
        "q": (query, width),
        "k": (key, width),
        "v": (key, width),
        "qkv": (query + 2 * key, width),
        "o": (width, query),
        "gate": (mlp, width),
        "up": (mlp, width),
        "gate_up": (2 * mlp, width),
        "down": (width, mlp),
        "project_out": (embed, width),
        "head": (len(spec.labels) or spec.vocab_size, embed),
        "dense": (width, width),
        "classify": (0 if spec.encoder is None else len(spec.encoder.labels), width),
    }
    return shapes[kind]


def row_blocks(num_rows: int, row_bytes: int) -> list[tuple[int, int]]:
    """Cut [0, num_rows) evenly into as few blocks of at most BLOCK_BYTES as borders at BLOCK_ROWS allow."""
    if num_rows * row_bytes <= BLOCK_BYTES:
        return [(0, num_rows)]
    most = max(BLOCK_BYTES // row_bytes // BLOCK_ROWS, 1) * BLOCK_ROWS
    count = -(-num_rows // most)
    size = round_up(-(-num_rows // count), BLOCK_ROWS)
    return [(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def _products(spec: ModelSpec, stems: Mapping[str, str]) -> Iterator[tuple[str, int, str, str | None]]:
    """(kind, layer, stem of the matrix, stem of the norm in front of it) in execution order.

    A norm behind a residual (OPT-350m) is the norm in front of the next product, whose result is the new stream.
    """
    is_post = spec.norm_position == "post"
    yield "embed", -1, stems["project_in"] if spec.embed_dim else "", None
    behind = None  # a post-norm that waits for the next product
    for layer in range(spec.num_layers):
        for kinds, key in zip(layer_kinds(spec), ("attention_norm", "mlp_norm"), strict=True):
            norm = stems[key].format(layer)
            front, behind = (behind, norm) if is_post else (norm, None)
            for kind in kinds:
                yield kind, layer, stems[kind].format(layer), front
                front = None
    last = behind or (stems["final_norm"] if spec.final_norm else None)
    if spec.embed_dim:
        yield "project_out", spec.num_layers, stems["project_out"], last
        last = None
    yield "head", spec.num_layers, stems["embed" if spec.tied_head else "head"], last


def _encoder_products(
    spec: ModelSpec, stems: Mapping[str, str]
) -> Iterator[tuple[str, int, str, str | None]]:
    """As `_products`: norms lie behind the embeddings and behind every residual; "pool" makes one row of a text."""
    assert spec.encoder is not None, "a decoder has a program of another kind"
    yield "embed", -1, stems["project_in"] if spec.embed_dim else "", stems["embed_norm"]
    behind = None
    for layer in range(spec.num_layers):
        for kinds, key in zip(layer_kinds(spec), ("attention_norm", "mlp_norm"), strict=True):
            for kind in kinds:
                yield kind, layer, stems[kind].format(layer), behind
                behind = None
            behind = stems[key].format(layer)
    yield "pool", spec.num_layers, "", behind
    if spec.encoder.head == "classify":
        yield "dense", spec.num_layers, stems["dense"], None
        yield "classify", spec.num_layers, stems["classify"], None


def _blocks(
    spec: ModelSpec, names: Names, index: int, kind: str, layer: int, stem: str, norm: str | None
) -> Iterator[Op]:
    width = matrix_shape(spec, kind)[1] if kind == "embed" else spec.model_dim
    front = _norm_weights(spec, norm, width) if norm else ()
    if not stem:
        yield Op(index, kind, layer, front, normed=norm is not None)
        return
    num_out, num_in = matrix_shape(spec, kind)
    row_bytes = num_in * DTYPE_BYTES[spec.dtype]
    # The head and the projections around it are published as [out, in] even where layers are transposed.
    if spec.transposed and 0 <= layer < spec.num_layers:
        cuts, matrix = [(0, num_out)], WeightRef("matrix", f"{stem}.weight", 0, num_in, (num_in, num_out))
    else:
        cuts, matrix = row_blocks(num_out, row_bytes), None
    head_norm = f"{kind}_norm" if spec.qk_norm and kind in ("q", "k") else ""
    for block, (start, stop) in enumerate(cuts):
        weights = [matrix or WeightRef("matrix", f"{stem}.weight", start, stop, (stop - start, num_in))]
        if kind in names.biased:
            weights.append(WeightRef("bias", f"{stem}.bias", start, stop, (stop - start,)))
        if block == 0:
            weights[:0] = front
        # The whole head is needed to normalise it, so this one comes with the last block.
        if head_norm and block == len(cuts) - 1:
            name = f"{names.stems[head_norm].format(layer)}.weight"
            weights.append(WeightRef(head_norm, name, 0, spec.head_dim, (spec.head_dim,)))
        yield Op(
            index + block,
            kind,
            layer,
            tuple(weights),
            block,
            len(cuts),
            normed=norm is not None and block == 0,
            transposed=matrix is not None,
        )


def _norm_weights(spec: ModelSpec, stem: str, width: int) -> tuple[WeightRef, ...]:
    if not spec.norm_affine:
        return ()
    scale = WeightRef("norm", f"{stem}.weight", 0, width, (width,))
    if spec.norm == "rms":
        return (scale,)
    return (scale, WeightRef("norm_bias", f"{stem}.bias", 0, width, (width,)))
