"""Products with a weight that is packed without loss.  In: rows of activations, a LosslessWeight.  Out: rows.

The format is that of `zinfer.spec.lossless`.  The compiled kernel unpacks some outputs at a time onto its threads'
stacks and multiplies them as any other weight: the same bits.  Where there is none a slot takes a piece of the matrix.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from zinfer.kernels.exponents import LosslessWeight, check_exceptions, packed_without_loss, unpacked_by_torch
from zinfer.kernels.native.calls import Kernels, kernels
from zinfer.kernels.products import linear, row_sizes
from zinfer.spec.lossless import HEAD, RUN, SHARED, most_exceptions, slot_outputs
from zinfer.spec.records import ModelSpec


def lossless_linear(
    x_TI: Tensor,
    weight: LosslessWeight,
    bias: Tensor | None = None,
    *,
    exact: bool,
    into_TO: Tensor | None = None,
) -> Tensor:
    """As `products.linear` with the weight as it was: [T, O], in `into_TO` where that is given; no gradients.

    In exact mode, where kernels are compiled, with the very same bits.
    """
    native = reader(x_TI.device.type)
    if native is not None and x_TI.dtype == torch.bfloat16:
        parts = (weight.rest, weight.codes, weight.exponents)
        return native.lossless(x_TI, parts, weight.outputs, bias, into_TO)
    y_TO = x_TI.new_empty(x_TI.shape[0], weight.outputs) if into_TO is None else into_TO
    step = slot_outputs(weight.inputs, x_TI.device.type)
    for start in range(0, weight.outputs, step):
        stop = min(start + step, weight.outputs)
        piece_OI = unpacked(weight.rows(start, stop)).to(x_TI.dtype)
        part = None if bias is None else bias[start:stop]
        linear(x_TI, piece_OI, part, exact=exact, into_TO=y_TO[:, start:stop])
        del piece_OI  # or it would lie beside the next one
    return y_TO


def reader(device: str) -> Kernels | None:
    """The compiled kernels, where they multiply with such weights."""
    found = kernels() if device == "cpu" else None
    return found if found is not None and found.has_products else None


def prepare(spec: ModelSpec, device: str, *, exact: bool) -> None:
    """Make all choices for products through the slot now, as `products.prepare` does for the others."""
    if not exact or reader(device) is not None:
        return
    for op in spec.program:
        if any(part.role == "rest" for part in op.stored) and op.matrix is not None:
            outputs, inputs = op.matrix.shape
            has_bias = any(weight.role == "bias" for weight in op.weights)
            step = slot_outputs(inputs, device)
            for piece in {min(step, outputs), outputs % step} - {0}:
                row_sizes(torch.bfloat16, device, piece, inputs, False, has_bias, torch.get_num_threads())


def packed(matrix_OI: Tensor) -> LosslessWeight:
    """Pack bf16 [O, I], I a multiple of RUN, by the compiled kernel where there is one: the same bytes either way.

    Raises TooManyExponentsError.
    """
    outputs, inputs = matrix_OI.shape
    tiles, room = -(-outputs // SHARED), most_exceptions(inputs)
    shapes = (tiles, SHARED, inputs), (tiles, SHARED, inputs // 2), (tiles, HEAD + room)
    rest, codes, exponents = (torch.empty(shape, dtype=torch.uint8) for shape in shapes)
    weight = LosslessWeight(rest, codes, exponents, outputs)
    pack_into(weight, matrix_OI)
    return weight


def pack_into(weight: LosslessWeight, matrix_OI: Tensor) -> None:
    """As `packed`, into the memory that the views of `weight` show."""
    native, parts = kernels(), (weight.rest, weight.codes, weight.exponents)
    if native is not None:
        check_exceptions(native.pack(matrix_OI, parts), most_exceptions(weight.inputs))
        return
    made = packed_without_loss(matrix_OI)
    for part, filled in zip(parts, (made.rest, made.codes, made.exponents), strict=True):
        part.copy_(filled)


def unpacked(weight: LosslessWeight) -> Tensor:
    """bf16 [O, I], by the compiled kernel where there is one."""
    native = kernels() if weight.rest.device.type == "cpu" else None
    if native is None:
        return unpacked_by_torch(weight)
    return native.unpack((weight.rest, weight.codes, weight.exponents), weight.outputs)


def made_up(outputs: int, inputs: int) -> LosslessWeight:
    """A weight to be timed, in memory of its own: noise, as a model's weights look; I in whole runs."""
    inputs = max(inputs // RUN, 1) * RUN
    tile, tiles = _noise(inputs), -(-outputs // SHARED)

    def repeated(part: Tensor) -> Tensor:
        return part.expand(tiles, *part.shape[1:]).clone()

    return LosslessWeight(repeated(tile.rest), repeated(tile.codes), repeated(tile.exponents), outputs)


@cache
def _noise(inputs: int) -> LosslessWeight:
    """One tile."""
    return packed_without_loss(
        torch.randn(SHARED, inputs, generator=torch.Generator().manual_seed(0)).bfloat16()
    )
