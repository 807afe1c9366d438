"""Chunks as they may lie at home, packed without loss.  In: a model, its chunks.  Out: the smaller chunks.

A chunk is read as it is published.  Where memory is short of its bytes, the matrices of what stays are packed behind
their first use (`zinfer.spec.lossless`), so that a third more of them stay; every bit of a product is as before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from zinfer.chunks.table import ALIGN, PAGE, Chunk, ChunkId, ChunkTable, TensorSlice
from zinfer.spec.lossless import LOSSLESS, packed_op, packs
from zinfer.spec.records import ModelSpec, WeightRef
from zinfer.spec.stored import PARTS, PUBLISHED, STORED_BYTES
from zinfer.units import round_up


def packed_forms(spec: ModelSpec, table: ChunkTable) -> dict[ChunkId, Chunk]:
    """By id, the chunks that take fewer bytes when packed; none of a store, whose weights are packed already."""
    if spec.weights != PUBLISHED or spec.dtype != "BF16" or spec.encoder is not None:
        return {}
    tables = {lookup.name for lookup in spec.lookups}
    forms = {}
    for chunk in table.streamable:
        dtypes = {piece.key: piece.dtype for piece in chunk.tensors}
        reads: list[WeightRef] = []
        for op in (spec.program[index] for index in chunk.ops):
            is_packed = op.matrix is not None and packs(op, tables, dtypes[op.matrix.key])
            reads += (packed_op(op) if is_packed else op).reads
        form = _laid_out(chunk, reads, dtypes)
        if form.nbytes < chunk.nbytes:
            forms[chunk.id] = form
    return forms


def with_packed(spec: ModelSpec, table: ChunkTable, chunks: Collection[ChunkId]) -> ModelSpec:
    """The same model with these chunks packed: what plans reckon with."""
    if not chunks:
        return spec
    keys = {piece.key for chunk in chunks for piece in table.packed[chunk].tensors}
    program = list(spec.program)
    for chunk in chunks:
        for index in table.chunks[chunk].ops:
            op = spec.program[index]
            if op.matrix is not None and op.matrix.key not in keys:
                program[index] = packed_op(op)
    return replace(spec, weights=LOSSLESS, program=tuple(program))


def _laid_out(chunk: Chunk, reads: Iterable[WeightRef], dtypes: dict[tuple[str, int, int], str]) -> Chunk:
    """One part behind the other; nothing of it is ever read from a file."""
    slices: dict[tuple[str, int, int], TensorSlice] = {}
    end = 0
    for part in reads:
        if part.key in slices:
            continue
        dtype = PARTS.get(part.role) or dtypes[part.key]
        at, nbytes = round_up(end, ALIGN), part.numel * STORED_BYTES[dtype]
        slices[part.key] = TensorSlice(part.name, part.start, part.stop, part.shape, dtype, at, nbytes)
        end = at + nbytes
    weight_bytes = sum(piece.nbytes for piece in slices.values())
    return Chunk(chunk.id, chunk.ops, tuple(slices.values()), (), (), round_up(end, PAGE), weight_bytes)
