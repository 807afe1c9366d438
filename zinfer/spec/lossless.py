"""bfloat16 weights in three quarters of their bytes, without loss.  In: an op.  Out: what its store holds of it.

A bfloat16 is a sign, eight bits of exponent and seven of fraction.  Trained weights use few exponents (Zhang et al.
2025, "70% Size, 100% Accuracy", arXiv 2504.11651: 2.6 bits of information).  So SHARED outputs list the LISTED most
frequent of theirs, a weight has a code of four bits in its exponent's place, and the rest are exceptions, in order.
The tensors that a store holds in a matrix's place, for P tiles of SHARED outputs:

    NAME.rest       U8  [P, SHARED, inputs]       the sign above the fraction
    NAME.codes      U8  [P, SHARED, inputs / 2]   of 64 weights in 32 bytes: the first half's low, the second's high
    NAME.exponents  U8  [P, HEAD + inputs / 8]    SHARED of the list (the last unused), SHARED numbers of 16 bits: where
                                                  in what follows each output's exceptions begin; the exceptions

That is 0.755 of the bytes where an entropy coder would reach 0.66; but fixed widths unpack as fast as memory is read,
from any output on, and what a store takes follows from shapes alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

from zinfer.spec.records import DTYPE_BYTES, Op, WeightRef
from zinfer.units import KIB, MIB

LOSSLESS = "lossless"
LAYOUT = "exponents-16"
SHARED = 16  # outputs that share a list
LISTED = SHARED - 1  # exponents of a list; the code LISTED says: an exception
HEAD = SHARED + 2 * SHARED  # bytes of a tile in front of its exceptions
RUN = 64  # weights whose codes lie together: inputs are a multiple of it
MOST_INPUTS = 2**15  # a kernel's thread unpacks some outputs onto its stack
ROLES = ("rest", "codes", "exponents")
WEIGHT_BYTES = 1.51  # a list and room for exceptions included
# Of bf16 into which outputs are unpacked where no kernel reads them packed; on a GPU a small step costs as much as a
# larger one.
SLOT_BYTES = 256 * KIB
GPU_SLOT_BYTES = 8 * MIB
_WORK_BYTES = 14  # of each weight in the slot, while torch unpacks it: two more than were seen
_DTYPE = "BF16"


def most_exceptions(inputs: int) -> int:
    """Of a tile: one weight in 128."""
    return SHARED * inputs // 128


def slot_outputs(inputs: int, device: str) -> int:
    """Outputs that are unpacked at a time: it follows from the shape and the kind of device alone."""
    slot_bytes = GPU_SLOT_BYTES if device.startswith("cuda") else SLOT_BYTES
    return max(slot_bytes // (DTYPE_BYTES[_DTYPE] * inputs * SHARED), 1) * SHARED


def packs(op: Op, tables: set[str], dtype: str) -> bool:
    """Whether the op's matrix is one that the format takes: rows of bfloat16 whose number of inputs fits."""
    matrix = op.matrix
    if matrix is None or op.kind == "router" or op.transposed or dtype != _DTYPE or matrix.name in tables:
        return False
    outputs, inputs = matrix.shape
    return outputs >= SHARED and inputs % RUN == 0 and inputs <= MOST_INPUTS and matrix.start % SHARED == 0


@lru_cache(maxsize=4096)
def packed_op(op: Op) -> Op:
    """The op with the tensors that stand for its matrix."""
    assert op.matrix is not None, "nothing to pack"
    outputs, inputs = op.matrix.shape
    tiles, first = -(-outputs // SHARED), op.matrix.start // SHARED
    shapes = {
        "rest": (tiles, SHARED, inputs),
        "codes": (tiles, SHARED, inputs // 2),
        "exponents": (tiles, HEAD + most_exceptions(inputs)),
    }
    parts = tuple(
        WeightRef(role, f"{op.matrix.name}.{role}", first, first + tiles, shape, "U8")
        for role, shape in shapes.items()
    )
    return replace(op, stored=(*parts, *(weight for weight in op.weights if weight.role != "matrix")))


def workspace_bytes(ops: Iterable[Op], device: str) -> int:
    """The slot, and what unpacking into it needs beside; 0 where nothing is packed."""
    rests = (part for op in ops for part in op.stored if part.role == "rest")
    pieces = (
        part.shape[2] * min(slot_outputs(part.shape[2], device), SHARED * part.shape[0]) for part in rests
    )
    return max((numel * (DTYPE_BYTES[_DTYPE] + _WORK_BYTES) for numel in pieces), default=0)
