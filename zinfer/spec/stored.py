"""What a store holds in place of published matrices.  In: a ModelSpec and a format.  Out: the same model, as stored.

Embedding tables, a head tied to one, norms, biases, routers and matrices whose shapes a format does not take stay as
published.
"""

from __future__ import annotations

from dataclasses import replace

from zinfer.spec import lossless, quant
from zinfer.spec.lossless import LOSSLESS
from zinfer.spec.records import DTYPE_BYTES, ModelSpec, Op

PUBLISHED = "published"
FORMATS = (LOSSLESS, *quant.FORMATS)
PARTS = quant.PARTS | dict.fromkeys(lossless.ROLES, "U8")  # role -> dtype
STORED_BYTES = DTYPE_BYTES | {"U8": 1}
RMS_LIMITS = quant.RMS_LIMITS | {LOSSLESS: 0.0}
WEIGHT_BYTES = quant.WEIGHT_BYTES | {LOSSLESS: lossless.WEIGHT_BYTES}
RATE_NAMES = quant.RATE_NAMES | {LOSSLESS: "BF12"}  # under which a machine's profile has their products


def layouts(weights: str) -> dict[str, int]:
    """Layout id -> outputs that lie together, of a format."""
    return {lossless.LAYOUT: lossless.SHARED} if weights == LOSSLESS else dict(quant.PANELS)


def shared_weights(weights: str) -> int:
    """How many share what is stored once for all of them: inputs a scale, or outputs a list of exponents."""
    return lossless.SHARED if weights == LOSSLESS else quant.GROUP


def as_stored(spec: ModelSpec, weights: str, layout: str) -> ModelSpec:
    """The spec of the same model with its matrices stored in the format `weights` (one of FORMATS)."""
    tables = {lookup.name for lookup in spec.lookups}

    def stored(op: Op) -> Op:
        if weights != LOSSLESS:
            return quant.stored_op(op, tables, weights, quant.PANELS[layout])
        return lossless.packed_op(op) if lossless.packs(op, tables, spec.stored_dtype or spec.dtype) else op

    return replace(spec, weights=weights, program=tuple(map(stored, spec.program)))


def op_bytes(spec: ModelSpec, op: Op) -> int:
    """Bytes of all that the op reads, as stored."""
    return sum(part.numel * STORED_BYTES[part.dtype or spec.dtype] for part in op.reads)


def workspace_bytes(spec: ModelSpec, device: str) -> int:
    """What unpacking needs on the device beside weights and activations; 0 where all is as published."""
    if spec.weights == LOSSLESS:
        return lossless.workspace_bytes(spec.program, device)
    return quant.workspace_bytes(
        spec, quant.GPU_SLOT_BYTES if device.startswith("cuda") else quant.SLOT_BYTES
    )


def part_of(name: str) -> str:
    """The role that a stored tensor's name ends in, or nothing where it is a published tensor."""
    suffix = name.rpartition(".")[2]
    return suffix if suffix in PARTS else ""
