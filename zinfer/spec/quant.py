"""Quantised weights as integers.  In: an op and a format.  Out: what its store holds of it.

A matrix is cut along its inputs into groups of GROUP weights that share a scale and a zero.  The tensors that a store
holds in its place, for P panels of `panel` outputs:

    NAME.nibbles  U8    [P, inputs, panel / 2]      byte i of a row: output i in the low half, i + panel / 2 in the high
    NAME.low      U8    the same, int8 only: the low four bits, while `nibbles` has the high ones
    NAME.scales   BF16  [inputs / GROUP, P * panel, 2]      scale and zero

    int4:  w = scale * (nibble - 8) + zero
    int8:  w = scale * (16 * (nibble - 8) + low - 8) + 17 * zero

so that int8 is two int4 products with one set of scales: 16 x times the nibbles, and x times the low ones.
"""

from __future__ import annotations

from dataclasses import replace

from zinfer.spec.records import ModelSpec, Op, WeightRef
from zinfer.units import MIB

GROUP = 64
FORMATS = ("int8", "int4")
PANELS = {
    "panels-64": 64,
    "panels-32": 32,
}  # layout id -> outputs per panel: what AVX-512 and AVX2 kernels read
PARTS = {"nibbles": "U8", "low": "U8", "scales": "BF16"}  # role -> dtype
SLOT_BYTES = 4 * MIB  # of bf16 into which a piece of a matrix is unpacked; one panel at least
GPU_SLOT_BYTES = 64 * MIB  # the same on a GPU, where a small product costs as much as a larger one
RMS_LIMITS = {"int8": 0.006, "int4": 0.11}  # relative RMS error of a matrix that looks trained, at most
PERPLEXITY_LIMITS = {"int8": 0.01, "int4": 0.06}  # by what share it may rise for a model that is trained
WEIGHT_BYTES = {"int8": 8.5 / 8, "int4": 4.5 / 8}  # scale and zero of a group are 32 bits
RATE_NAMES = {"int8": "I8", "int4": "I4"}  # under which a machine's profile has their products


def slot_outputs(inputs: int, panel: int, slot_bytes: int = SLOT_BYTES) -> int:
    """Outputs of the piece of a matrix that is unpacked at a time: it follows from the shape alone."""
    return max(slot_bytes // (2 * inputs * panel), 1) * panel


def workspace_bytes(spec: ModelSpec, slot_bytes: int = SLOT_BYTES) -> int:
    """The slot for unpacked weights and zeros, and the integers on their way into it; 0 where nothing is quantised."""
    parts = [part for op in spec.program for part in op.stored if part.role == "nibbles"]
    pieces = []
    for panels, inputs, half in (part.shape for part in parts):
        pieces.append(inputs * min(slot_outputs(inputs, 2 * half, slot_bytes), panels * 2 * half))
    return max((2 * numel + 2 * numel // GROUP + numel for numel in pieces), default=0)


def stored_op(op: Op, tables: set[str], weights: str, panel: int) -> Op:
    """The op with its matrix in panels of `panel` outputs; itself where it stays as published."""
    matrix = op.matrix
    if matrix is None or op.kind == "router" or matrix.name in tables:
        return op
    outputs, inputs = matrix.shape[:: -1 if op.transposed else 1]
    first = 0 if op.transposed else matrix.start // panel
    if inputs % GROUP or (not op.transposed and matrix.start % panel):
        return op
    panels = -(-outputs // panel)
    shapes = {
        "nibbles": (panels, inputs, panel // 2),
        "low": (panels, inputs, panel // 2),
        "scales": (inputs // GROUP, panels * panel, 2),
    }
    if weights == "int4":
        del shapes["low"]
    parts = tuple(
        WeightRef(role, f"{matrix.name}.{role}", first, first + panels, shape, PARTS[role])
        for role, shape in shapes.items()
    )
    kept = tuple(weight for weight in op.weights if weight.role != "matrix")
    return replace(op, stored=(*parts, *kept))
