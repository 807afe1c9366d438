"""Products with weights that are published as [inputs, outputs].  In: rows and a weight view.  Out: rows.

The compiled kernel reads such a weight as it lies.  Its twin is `zinfer.kernels.products.linear`, which serves where
there is none, and many rows where that was seen to be faster.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from zinfer.kernels.choice import fastest, one_thread
from zinfer.kernels.native.calls import is_noting, kernels
from zinfer.kernels.products import linear
from zinfer.kernels.remembered import remembered
from zinfer.kernels.row_kernels import host_kernels
from zinfer.spec.records import ModelSpec

FEW = (8, 32, 128)  # rows at which the two are timed
_TIMED_BYTES = 4 * 2**20  # of a weight


def column_linear(x_TI: Tensor, weight_IO: Tensor, bias: Tensor | None = None, *, exact: bool) -> Tensor:
    """x [T, I] times weight [I, O], plus bias [O]: [T, O].

    With `exact` a row of the result depends on nothing but that row of x: the compiled kernel is so by itself.
    """
    found = host_kernels(x_TI, weight_IO, bias)
    is_served = found is not None and found.has_products and weight_IO.is_contiguous()
    if found is None or not is_served or not (exact or _is_few(len(x_TI), weight_IO)):
        return linear(x_TI, weight_IO, bias, exact=exact, transposed=True)
    return found.columns(x_TI, weight_IO, bias)


def prepare(spec: ModelSpec, device: str, *, exact: bool) -> None:
    """Make all choices for such products now, as `products.prepare` does for the others."""
    found = kernels() if device == "cpu" and spec.dtype == "BF16" else None
    if found is not None and found.has_products and not exact:
        for op in spec.program:
            if op.transposed and op.matrix is not None and not op.stored:
                few_columns(*op.matrix.shape)


def _is_few(num_rows: int, weight_IO: Tensor) -> bool:
    return num_rows == 1 or is_noting() or num_rows <= few_columns(*weight_IO.shape)


@cache
def few_columns(inputs: int, outputs: int) -> int:
    """The most rows, of FEW, that the compiled kernel multiplies as fast as torch; 1 where it never does.

    One row always: torch reads such a weight at half the speed of memory.
    """
    outputs = max(1, min(outputs, _TIMED_BYTES // (2 * inputs)))

    def find() -> int:
        found, best = kernels(), 1
        assert found is not None, "asked only where it was compiled"
        draw = torch.Generator().manual_seed(0)
        weight_IO = torch.randn(inputs, outputs, generator=draw).to(torch.bfloat16)
        with torch.no_grad(), one_thread():
            for rows in FEW:
                x = weight_IO[:1].new_ones(rows, inputs)
                runs = {
                    "native": lambda x=x: found.columns(x, weight_IO),
                    "torch": lambda x=x: F.linear(x, weight_IO.t()),
                }
                if fastest(runs) != "native":
                    break
                best = rows
        return best

    return int(remembered(f"few columns {(inputs, outputs)}", lambda rows: rows in (1, *FEW), find))
