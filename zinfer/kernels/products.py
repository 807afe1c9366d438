"""Products with a weight.  In: rows of activations and a weight view.  Out: rows, in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from zinfer.kernels import served
from zinfer.kernels.choice import agreeing_sizes, cover, device_clock, fastest, one_thread, pad_rows
from zinfer.kernels.native.calls import MOST_INPUTS, Kernels, is_noting, kernels
from zinfer.kernels.remembered import remembered
from zinfer.kernels.row_kernels import wants_gradient
from zinfer.kernels.rows import one_row
from zinfer.kernels.served import device_name
from zinfer.spec.cost import EXACT_SIZES, MOST_ROWS
from zinfer.spec.records import ModelSpec

SIZES = EXACT_SIZES
FEW = (2, 4, 8, 16, 32, 64, 128, 256)  # rows at which the compiled kernel is timed against torch
_SAMPLE_ROWS = 5
_TIMED_BYTES = 16 * 2**20  # of a weight: measured in a few milliseconds
_FEW_TIMED_BYTES = 4 * 2**20  # the same for a few rows, of which there are several numbers to try
_COLD_BYTES = 64 * 2**20  # weights that are timed in turn: a pass finds none of its weights in a cache
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def linear(
    x_TI: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    exact: bool,
    transposed: bool = False,
    into_TO: Tensor | None = None,
) -> Tensor:
    """x [T, I] times weight [O, I] ([I, O] when `transposed`), plus bias [O]: [T, O].

    Where it is given `into_TO` is filled and handed back: columns of a wider matrix, or numbers that are as exact in a
    wider format.

    With `exact` a row of the result depends on nothing but that row of x, whatever T is: the compiled kernel is so by
    itself, and libraries are at row counts that agree (`row_sizes`).  Without, a lone row goes through the kernel that
    was fastest for it (`row_kernel`), and so do a few (`few_rows`).  Gradients flow through libraries alone.
    """
    weight_OI = weight.t() if transposed else weight
    outputs, inputs = weight_OI.shape
    case = (weight.dtype, weight.device.type, outputs, inputs, transposed, bias is not None)
    num_rows = x_TI.shape[0]
    is_trained = wants_gradient((x_TI, weight, bias))
    found = compiled(*case[:2], inputs, transposed or not weight.is_contiguous())
    if exact and found is not None and not is_trained:
        return found.dense(x_TI, weight_OI, bias, into_TO)
    if not exact and num_rows <= MOST_ROWS and not is_trained:
        kernel = _few(num_rows, case)
        if kernel is _native and found is not None:
            return found.dense(x_TI, weight_OI, bias, into_TO)
        return _put(kernel(x_TI, weight_OI, bias), into_TO)
    sizes = row_sizes(*case, torch.get_num_threads()) if exact else (MOST_ROWS,)
    for start, stop, size in cover(num_rows, sizes):
        rows = stop - start
        piece = F.linear(pad_rows(x_TI[start:stop], size if exact else rows), weight_OI, bias)
        if len(piece) == num_rows:
            return _put(piece, into_TO)
        # Into its place at once: all pieces beside the whole, or rows that nobody wants, would be a pass's peak.
        into_TO = piece.new_empty(num_rows, outputs) if into_TO is None else into_TO
        into_TO[start:stop] = piece[:rows]
        del piece
    assert into_TO is not None, "a product needs rows"
    return into_TO


def _put(y_TO: Tensor, into_TO: Tensor | None) -> Tensor:
    """A result that could not be written where it belongs."""
    return y_TO if into_TO is None else into_TO.copy_(y_TO)


def _few(num_rows: int, case: tuple[torch.dtype, str, int, int, bool, bool]) -> Product:
    if num_rows == 1:  # on a tape the compiled kernel costs no call
        return _native if is_noting() else KERNELS[row_kernel(*case)]
    return _native if is_noting() or _are_few(num_rows, few_rows(*case)) else F.linear


def _are_few(num_rows: int, most: int) -> bool:
    """More than are timed are multiplied in blocks of so many, which the matrix unit does as fast as the library."""
    if num_rows <= most or most < FEW[-1]:
        return num_rows <= most
    found = kernels()
    return found is not None and found.has_amx


def prepare(spec: ModelSpec, device: str, *, exact: bool) -> None:
    """Make all choices for a model's products now: before its weights take the memory, and before anything runs.

    Needs twice the memory of the largest matrix, or 64 MiB, for a moment.  What is not prepared is chosen on first use.
    """
    for op in spec.program:
        weights = {weight.role: weight for weight in op.weights}
        if "matrix" in weights and not op.stored:
            outputs, inputs = weights["matrix"].shape[:: -1 if op.transposed else 1]
            case = (_DTYPES[spec.dtype], device, outputs, inputs, op.transposed, "bias" in weights)
            is_compiled = compiled(*case[:2], inputs, False) is not None  # transposed ones too, as columns
            if not exact and not (op.transposed and is_compiled):
                row_kernel(*case)
                few_rows(*case)
            elif exact and not is_compiled:
                row_sizes(*case, torch.get_num_threads())


def with_product_sizes(spec: ModelSpec, device: str) -> ModelSpec:
    """The spec with the row counts that exact products of its plain matrices may have here, for the plan to count;
    none where any will do."""
    sizes: dict[str, tuple[int, ...]] = {}
    for op in spec.program:
        weights = {weight.role: weight for weight in op.weights}
        if "matrix" in weights and not op.stored:
            outputs, inputs = weights["matrix"].shape[:: -1 if op.transposed else 1]
            case = (_DTYPES[spec.dtype], device, outputs, inputs, op.transposed, "bias" in weights)
            is_free = compiled(*case[:2], inputs, False) is not None
            found = () if is_free else row_sizes(*case, torch.get_num_threads())
            # Blocks of one matrix may differ: what pads more counts.
            sizes[op.kind] = min(found, sizes.get(op.kind, found), key=len)
    return replace(spec, product_sizes=tuple(sizes.items()))


@cache
def row_sizes(
    dtype: torch.dtype,
    device: str,
    outputs: int,
    inputs: int,
    transposed: bool,
    has_bias: bool,
    num_threads: int,
) -> tuple[int, ...]:
    """Row counts that agree bit for bit for this weight shape: a self-test on made-up numbers, once per process.

    Libraries share a product among threads in ways that differ, so `num_threads` is the number in force.
    """

    def find() -> list[int]:
        x_PI, weight_OI = cancelling(outputs, inputs, dtype, device)
        weight_OI = _laid_out(weight_OI, transposed)
        bias = torch.full((outputs,), 2.0**-20, dtype=dtype, device=device) if has_bias else None
        with torch.no_grad():
            return list(agreeing_sizes(lambda x: F.linear(x, weight_OI, bias), x_PI, SIZES))

    def is_answer(sizes: object) -> bool:
        return isinstance(sizes, list) and bool(sizes) and set(sizes) <= set(SIZES)

    case = (dtype, device, outputs, inputs, transposed, has_bias, num_threads)
    return tuple(remembered(f"row sizes {case}", is_answer, find))


@cache
def row_kernel(
    dtype: torch.dtype, device: str, outputs: int, inputs: int, transposed: bool, has_bias: bool
) -> str:
    """The name of the fastest of KERNELS for one row: timed on made-up numbers, once per process.

    Only half precision has kernels that differ: on the CPU with and without oneDNN by up to 2 in either direction,
    depending on the machine, and kernels that are level on a weight in the cache differ by 2 on one that is not.
    """
    candidates = _candidates(dtype, device, inputs, transposed)
    if len(candidates) == 1 or dtype == torch.float32:
        return "linear"
    outputs = max(1, min(outputs, _TIMED_BYTES // (inputs * dtype.itemsize)))

    def find() -> str:
        turns, bias = _cold(dtype, device, outputs, inputs, transposed, has_bias)
        x = _noise((1, inputs), dtype, device)
        with torch.no_grad(), one_thread():
            runs = {name: partial(_run_next, KERNELS[name], x, turns, bias) for name in candidates}
            return fastest(runs, device_clock(device))

    case = (dtype, device_name(device), outputs, inputs, transposed, has_bias)
    question = f"one-row kernel, cold, of {', '.join(candidates)} {case}"
    return str(remembered(question, lambda name: isinstance(name, str) and name in candidates, find))


@cache
def few_rows(
    dtype: torch.dtype, device: str, outputs: int, inputs: int, transposed: bool, has_bias: bool
) -> int:
    """The most rows, of FEW, that the compiled kernel multiplies as fast as torch; 1 where it never does."""
    if compiled(dtype, device, inputs, transposed) is None:
        return 1
    outputs = max(1, min(outputs, _FEW_TIMED_BYTES // (inputs * dtype.itemsize)))

    def find() -> int:
        turns, bias = _cold(dtype, device, outputs, inputs, transposed, has_bias)
        best = 1
        with torch.no_grad(), one_thread():
            for rows in FEW:
                x = _noise((rows, inputs), dtype, device)
                products: dict[str, Product] = {"native": _native, "torch": F.linear}
                runs = {name: partial(_run_next, run, x, turns, bias) for name, run in products.items()}
                if fastest(runs) != "native":
                    break
                best = rows
        return best

    case = (dtype, outputs, inputs, has_bias)
    return int(
        remembered(
            f"few rows, packed once, cold, of up to {FEW[-1]} {case}", lambda rows: rows in (1, *FEW), find
        )
    )


def _cold(
    dtype: torch.dtype, device: str, outputs: int, inputs: int, transposed: bool, has_bias: bool
) -> tuple[Iterator[Tensor], Tensor | None]:
    """Weights, one after the other, more than a cache holds; and a bias."""
    count = max(_COLD_BYTES // (outputs * inputs * dtype.itemsize), 1)
    pool = _noise((count, outputs, inputs), dtype, device)
    bias = torch.zeros(outputs, dtype=dtype, device=device) if has_bias else None
    return cycle([_laid_out(weight_OI, transposed) for weight_OI in pool]), bias


def _run_next(run: Product, x_TI: Tensor, turns: Iterator[Tensor], bias: Tensor | None) -> Tensor:
    return run(x_TI, next(turns), bias)


def _vector(x_1I: Tensor, weight_OI: Tensor, bias: Tensor | None) -> Tensor:
    x_I = x_1I[0]
    return (torch.mv(weight_OI, x_I) if bias is None else torch.addmv(bias, weight_OI, x_I))[None]


def _linear_without_onednn(x_TI: Tensor, weight_OI: Tensor, bias: Tensor | None) -> Tensor:
    with _onednn_off():
        return F.linear(x_TI, weight_OI, bias)


def _vector_without_onednn(x_1I: Tensor, weight_OI: Tensor, bias: Tensor | None) -> Tensor:
    with _onednn_off():
        return _vector(x_1I, weight_OI, bias)


def _native(x_TI: Tensor, weight_OI: Tensor, bias: Tensor | None) -> Tensor:
    """The compiled kernel, where it takes such a weight."""
    found = compiled(
        weight_OI.dtype, weight_OI.device.type, weight_OI.shape[1], not weight_OI.is_contiguous()
    )
    return F.linear(x_TI, weight_OI, bias) if found is None else found.dense(x_TI, weight_OI, bias)


def compiled(dtype: torch.dtype, device: str, inputs: int, transposed: bool) -> Kernels | None:
    """The compiled kernels, where they multiply with such a weight."""
    if device != "cpu" or dtype != torch.bfloat16 or transposed or inputs > MOST_INPUTS:
        return None
    found = kernels()
    return found if found is not None and found.has_products else None


KERNELS: dict[str, Product] = {
    "native": _native,  # first: where others are level it waits for no core that is busy
    "linear": F.linear,
    "vector": _vector,
    "linear without oneDNN": _linear_without_onednn,
    "vector without oneDNN": _vector_without_onednn,
    "triton": one_row,
}


def _candidates(dtype: torch.dtype, device: str, inputs: int, transposed: bool) -> list[str]:
    """The names in KERNELS that are worth timing on a device; the first is taken unless another is clearly faster."""
    if device == "cpu":
        left_out = {"triton"} if compiled(dtype, device, inputs, transposed) else {"triton", "native"}
        return [name for name in KERNELS if name not in left_out]
    return ["linear", "triton"] if served.serves(device) and not transposed else ["linear"]


@contextmanager
def _onednn_off() -> Iterator[None]:
    """As torch.backends.mkldnn.flags(enabled=False), which also touches TF32 settings and warns about them."""
    was_on = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(was_on)


def _laid_out(weight_OI: Tensor, transposed: bool) -> Tensor:
    """The same numbers, in memory as [I, O] when `transposed`."""
    return weight_OI.t().contiguous().t() if transposed else weight_OI


def cancelling(outputs: int, inputs: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """x and weight whose products cancel in pairs far apart: what is left is rounding, other for every order.

    With ordinary numbers two orders of adding mostly round to the same bfloat16, and a test would miss them.
    """
    half, shift = inputs // 2, inputs // 5
    x_PI = torch.zeros(_SAMPLE_ROWS, inputs, dtype=dtype, device=device)
    weight_OI = torch.zeros(outputs, inputs, dtype=dtype, device=device)
    for rows_NI, scale, sign in ((x_PI, 16, 1), (weight_OI, 1, -1)):
        noise = _noise((rows_NI.shape[0], half), dtype, device)
        rows_NI[:, :half] = noise
        rows_NI[:, half : 2 * half].copy_(noise.roll(shift, 1)).mul_(sign)
        rows_NI.mul_(scale)
    return x_PI, weight_OI


def _noise(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Fixed numbers; a short piece is repeated, since drawing a whole weight takes longer than the test."""
    count = torch.Size(shape).numel()
    piece = torch.randn(min(count, 65_537), generator=torch.Generator().manual_seed(0)).to(dtype)
    return piece.repeat(-(-count // piece.numel()))[:count].view(shape).to(device)
