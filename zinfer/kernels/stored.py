"""Products with whatever a store holds.  In: rows of activations, an op's views by role.  Out: rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from torch import Tensor

from zinfer.kernels import lossless, quant
from zinfer.kernels.exponents import LosslessWeight, lossless_weight
from zinfer.kernels.lossless import lossless_linear
from zinfer.kernels.panels import QuantWeight, quant_weight
from zinfer.kernels.products import linear
from zinfer.kernels.quant import native_layout, quant_linear
from zinfer.spec.lossless import LAYOUT, LOSSLESS
from zinfer.spec.records import ModelSpec
from zinfer.spec.stored import PARTS

StoredWeight: TypeAlias = QuantWeight | LosslessWeight


def is_stored(parts: Mapping[str, Tensor]) -> bool:
    """Whether the views of an op hold its matrix in a store's format."""
    return not PARTS.keys().isdisjoint(parts)


def stored_weight(parts: Mapping[str, Tensor], outputs: int) -> StoredWeight:
    """Compose the views of one op, by role."""
    return lossless_weight(parts, outputs) if "rest" in parts else quant_weight(parts, outputs)


def any_linear(
    x_TI: Tensor,
    weight: Tensor | StoredWeight,
    bias: Tensor | None = None,
    *,
    exact: bool,
    into_TO: Tensor | None = None,
) -> Tensor:
    """x [T, I] times the transposed weight [O, I], plus bias [O]: [T, O], whichever form the weight has.

    In `into_TO` where that is given, unless the weight is quantised.
    """
    if isinstance(weight, LosslessWeight):
        return lossless_linear(x_TI, weight, bias, exact=exact, into_TO=into_TO)
    if isinstance(weight, QuantWeight):
        return quant_linear(x_TI, weight, bias, exact=exact)
    return linear(x_TI, weight, bias, exact=exact, into_TO=into_TO)


def prepare(spec: ModelSpec, device: str, *, exact: bool) -> None:
    """Make all choices for products with stored weights now, as `products.prepare` does for the others."""
    of = lossless if spec.weights == LOSSLESS else quant
    of.prepare(spec, device, exact=exact)


def layout_here(weights: str) -> str:
    """The layout id of a format that this machine's kernel reads."""
    return LAYOUT if weights == LOSSLESS else native_layout()
