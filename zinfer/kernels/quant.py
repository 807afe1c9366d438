"""Products with a quantised weight.  In: rows of activations, a QuantWeight.  Out: rows, in the same dtype.

Two paths, which agree within bf16's rounding: the packed bytes, by the compiled kernel or torch's int4 one, where
this processor has either, and a slot into which a piece of the matrix is unpacked, to be multiplied as any other.  The
first costs the same for every row, the second much before the first one.  Both multiply in bf16, whatever the
model's dtype.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from zinfer.kernels import fused_quant, served
from zinfer.kernels.choice import agreeing_sizes, cover, device_clock, fastest, one_thread, pad_rows
from zinfer.kernels.native.calls import Kernels, kernels
from zinfer.kernels.panels import QuantWeight, dequantise, pack_nibbles
from zinfer.kernels.products import SIZES, cancelling, linear, row_sizes
from zinfer.kernels.remembered import remembered
from zinfer.log import logger
from zinfer.spec.quant import GPU_SLOT_BYTES, GROUP, PANELS, SLOT_BYTES, slot_outputs
from zinfer.spec.records import ModelSpec
from zinfer.units import round_up

_CROSSINGS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # row counts at which the two paths are compared
_TIMED_OUTPUTS = 2048
_NATIVE_PANEL = 32  # the compiled kernel takes 16 octets at a time
_CLOSE = 0.02


def quant_linear(x_TI: Tensor, weight: QuantWeight, bias: Tensor | None = None, *, exact: bool) -> Tensor:
    """x [T, I] times the transposed weight [O, I], plus bias [O]: [T, O] in x's dtype; no gradients.

    With `exact` a row depends on nothing but the row: it is multiplied packed, or int8 where no kernel was compiled
    unpacked, whatever T is.  Without, whichever was faster at T rows, which is measured once per shape and machine:
    packed or unpacked, on a GPU fused or unpacked.
    """
    x = x_TI.to(torch.bfloat16).contiguous()  # the int4 kernel asks for that
    device = x.device.type
    is_packed = has_kernel(weight.panel, device)
    if exact and is_packed and _native(weight.panel):
        y = packed(x, weight)
    elif exact and is_packed and weight.weights == "int4":
        y = _packed_exact(x, weight)
    elif not exact and is_packed and x.shape[0] <= packed_rows(*_case(weight), torch.get_num_threads()):
        y = packed(x, weight)
    elif not exact and x.shape[0] <= fused_rows(*_case(weight), device):
        y = fused_quant.fused(x, weight)
    else:
        y = unpacked(x, weight, exact=exact)
    y = y.to(x_TI.dtype)
    return y if bias is None else y + bias


def prepare(spec: ModelSpec, device: str, *, exact: bool) -> None:
    """Make all choices for quantised products now, as `products.prepare` does for the others."""
    if reason := _unread_layout(spec, device):
        logger.warning(reason)
    for op in spec.program:
        nibbles = next((part for part in op.stored if part.role == "nibbles"), None)
        if nibbles is None or op.matrix is None:
            continue
        _, inputs, half = nibbles.shape
        panel, outputs = 2 * half, op.matrix.shape[1 if op.transposed else 0]
        threads = torch.get_num_threads()
        if exact and has_kernel(panel, device) and _native(panel):
            continue
        if exact and spec.weights == "int4" and has_kernel(panel, device):
            packed_sizes(panel, outputs, inputs, threads)
        elif exact:
            step = slot_outputs(inputs, panel, _slot_bytes(device))
            for piece in {min(step, outputs), outputs % step} - {0}:
                width = round_up(piece, panel)
                row_sizes(torch.bfloat16, device, width, inputs + inputs // GROUP, True, False, threads)
        elif has_kernel(panel, device):
            packed_rows(spec.weights, panel, outputs, inputs, threads)
        else:
            fused_rows(spec.weights, panel, outputs, inputs, device)


def _unread_layout(spec: ModelSpec, device: str) -> str:
    """What to say where this processor has a kernel, but for another layout than the store's."""
    halves = {part.shape[2] for op in spec.program for part in op.stored if part.role == "nibbles"}
    if not halves:
        return ""
    native = native_layout()
    if device != "cpu" or not has_kernel(PANELS[native], device) or halves <= {PANELS[native] // 2}:
        return ""
    return f"the store is for another processor's kernel: zinfer shard STORE --out DIR lays it out for {native!r}"


def packed(x_TI: Tensor, weight: QuantWeight) -> Tensor:
    """On the packed bytes, by the compiled kernel, else by torch's for int4: bf16 [T, O]."""
    if native := _native(weight.panel):
        return native.quant(x_TI, weight)
    if weight.low is None:
        y = _int4(x_TI, weight.nibbles, weight.scales)
    else:
        y = _int4(16 * x_TI, weight.nibbles, weight.scales) + _int4(x_TI, weight.low, weight.scales)
    return y[:, : weight.outputs]


def unpacked(x_TI: Tensor, weight: QuantWeight, *, exact: bool) -> Tensor:
    """Through the slot: [T, O].

    The slot holds weights less their groups' zeros, [I, n], and below them the zeros, [I / GROUP, n]; the latter meet
    the sums of x over each group.
    """
    rows, inputs = x_TI.shape
    sums = x_TI.view(rows, inputs // GROUP, GROUP).sum(2)
    x_extended = torch.cat((x_TI, sums), 1)
    step = slot_outputs(inputs, weight.panel, _slot_bytes(x_TI.device.type))
    y_TO = x_TI.new_empty(rows, weight.outputs)
    for start in range(0, weight.outputs, step):
        part = weight.rows(start, min(start + step, weight.outputs))
        piece = linear(x_extended, _fill_slot(part), exact=exact, transposed=True)
        y_TO[:, start : start + part.outputs] = piece[:, : part.outputs]
    return y_TO


def _native(panel: int) -> Kernels | None:
    """The compiled kernels, where they read panels of that width."""
    found = kernels()
    return found if found is not None and found.has_products and panel % _NATIVE_PANEL == 0 else None


@cache
def has_kernel(panel: int, device: str) -> bool:
    """Whether this processor's int4 kernel reads panels of that width: a self-test, for torch promises nothing."""
    if device != "cpu":
        return False
    draw = torch.Generator().manual_seed(0)
    values = torch.randint(0, 16, (2 * panel, 2 * GROUP), generator=draw, dtype=torch.uint8)
    scales = torch.randn(2, 2 * panel, 2, generator=draw).to(torch.bfloat16)
    weight = QuantWeight(pack_nibbles(values, panel), scales, None, 2 * panel)
    x = torch.randn(3, 2 * GROUP, generator=draw).to(torch.bfloat16)
    try:
        y = packed(x, weight).float()
    except (AttributeError, RuntimeError):
        return False
    want = x.float() @ dequantise(weight).t()
    return bool((y - want).abs().max() <= _CLOSE * want.abs().max())


def native_layout() -> str:
    """The layout id that this machine's kernel reads; the first where it has none, for unpacking takes any."""
    return next((name for name, panel in PANELS.items() if has_kernel(panel, "cpu")), next(iter(PANELS)))


@cache
def packed_rows(weights: str, panel: int, outputs: int, inputs: int, num_threads: int) -> int:
    """The most rows at which the packed path is the faster one; 0 where it never is."""

    def find() -> int:
        weight = made_up(weights, panel, min(outputs, _TIMED_OUTPUTS), inputs)
        best = 0
        with torch.no_grad(), one_thread():
            for rows in _CROSSINGS:
                x = torch.randn(rows, inputs).to(torch.bfloat16)
                paths: dict[str, Callable[[], object]] = {
                    "packed": partial(packed, x, weight),
                    "unpacked": partial(unpacked, x, weight, exact=False),
                }
                if fastest(paths) != "packed":
                    break
                best = rows
        return best

    case = (weights, panel, outputs, inputs, num_threads, _native(panel) is not None)
    return int(remembered(f"packed rows {case}", lambda rows: rows in (0, *_CROSSINGS), find))


@cache
def fused_rows(weights: str, panel: int, outputs: int, inputs: int, device: str) -> int:
    """The most rows at which a GPU multiplies the packed bytes faster than it unpacks them; 0 where it never does."""
    if not served.serves(device):
        return 0

    def find() -> int:
        weight = made_up(weights, panel, outputs, inputs).to(torch.device(device))
        best = 0
        with torch.no_grad():
            for rows in _CROSSINGS[: _CROSSINGS.index(fused_quant.MOST_ROWS) + 1]:
                x = torch.ones(rows, inputs, dtype=torch.bfloat16, device=device)
                paths: dict[str, Callable[[], object]] = {
                    "fused": partial(fused_quant.fused, x, weight),
                    "unpacked": partial(unpacked, x, weight, exact=False),
                }
                if fastest(paths, device_clock(device)) != "fused":
                    break
                best = rows
        return best

    case = (served.device_name(device), weights, panel, outputs, inputs)
    return int(remembered(f"fused rows {case}", lambda rows: rows in (0, *_CROSSINGS), find))


@cache
def packed_sizes(panel: int, outputs: int, inputs: int, num_threads: int) -> tuple[int, ...]:
    """Row counts at which the int4 kernel gives a row the same bits: a self-test, as `products.row_sizes`."""

    def find() -> list[int]:
        x_PI, noise_OI = cancelling(outputs, inputs, torch.bfloat16, "cpu")
        values = ((3 * noise_OI.float()).round().clamp(-7, 7) + 8).to(torch.uint8)
        values = torch.nn.functional.pad(values, (0, 0, 0, -outputs % panel), value=8)
        scales = torch.zeros(inputs // GROUP, values.shape[0], 2, dtype=torch.bfloat16)
        scales[..., 0] = 1
        weight = QuantWeight(pack_nibbles(values, panel), scales, None, outputs)
        with torch.no_grad():
            return list(agreeing_sizes(lambda x: packed(x, weight), x_PI, SIZES))

    def is_answer(sizes: object) -> bool:
        return isinstance(sizes, list) and bool(sizes) and set(sizes) <= set(SIZES)

    case = (panel, outputs, inputs, num_threads, _native(panel) is not None)
    return tuple(remembered(f"packed sizes {case}", is_answer, find))


def made_up(weights: str, panel: int, outputs: int, inputs: int) -> QuantWeight:
    """Random numbers in the stored form, to be timed."""
    draw = torch.Generator().manual_seed(0)
    panels = -(-outputs // panel)
    count = panels * inputs * (panel // 2)
    octets = torch.randint(0, 256, (min(count, 65_537),), generator=draw, dtype=torch.uint8)
    nibbles = octets.repeat(-(-count // octets.numel()))[:count].view(panels, inputs, panel // 2)
    scales = torch.randn(inputs // GROUP, panels * panel, 2, generator=draw).to(torch.bfloat16)
    return QuantWeight(nibbles, scales, nibbles.clone() if weights == "int8" else None, outputs)


def _packed_exact(x_TI: Tensor, weight: QuantWeight) -> Tensor:
    sizes = packed_sizes(weight.panel, weight.outputs, weight.inputs, torch.get_num_threads())
    y_TO = x_TI.new_empty(x_TI.shape[0], weight.outputs)
    for start, stop, size in cover(x_TI.shape[0], sizes):
        y_TO[start:stop] = packed(pad_rows(x_TI[start:stop], size), weight)[: stop - start]
    return y_TO


def _int4(x_TI: Tensor, nibbles: Tensor, scales: Tensor) -> Tensor:
    panels, inputs, half = nibbles.shape
    weight = nibbles.view(panels * 2 * half, inputs // 2)
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x_TI, weight, GROUP, scales)
    return product


class _Slots(threading.local):
    """Each thread's slot, which every product fills anew: allocating one costs more than filling it."""

    octets: Tensor | None = None

    def take(self, nbytes: int, device: torch.device) -> Tensor:
        if self.octets is None or self.octets.numel() < nbytes or self.octets.device != device:
            self.octets = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return self.octets[:nbytes]


_SLOTS = _Slots()


def _fill_slot(weight: QuantWeight) -> Tensor:
    """bf16 [I + I / GROUP, P * panel]."""
    panels, inputs, half = weight.nibbles.shape
    groups, width = inputs // GROUP, panels * 2 * half
    numel, scratch = (inputs + groups) * width, panels * inputs * half
    is_fused = served.serves(weight.nibbles.device.type)
    octets = _SLOTS.take(2 * numel + (0 if is_fused else 2 * scratch), weight.nibbles.device)
    slot = octets[: 2 * numel].view(torch.bfloat16).view(-1, width)
    if is_fused:
        fused_quant.fill_slot(weight, slot)
        return slot
    halves = slot[:inputs].view(inputs, panels, 2, half).permute(2, 1, 0, 3)  # [2, P, I, panel / 2]
    one, two = octets[2 * numel :].view(2, panels, inputs, half).unbind()
    for upper in (False, True):
        _signed(weight, upper, one, two)
        halves[int(upper)].copy_(one.view(torch.int8))
    scale, zero = weight.scales[..., 0].contiguous(), weight.scales[..., 1]
    slot[:inputs].view(groups, GROUP, width).mul_(scale[:, None])
    slot[inputs:] = zero if weight.low is None else (17 * zero.float() - 8 * scale.float())
    return slot


def _signed(weight: QuantWeight, upper: bool, one: Tensor, two: Tensor) -> None:
    """Into `one`, as int8: the integers of each panel's lower or upper half, less 8 (int4) or less 128 (int8)."""
    if weight.low is None:
        if upper:
            torch.bitwise_right_shift(weight.nibbles, 4, out=one)
        else:
            torch.bitwise_and(weight.nibbles, 15, out=one)
        one.view(torch.int8).sub_(8)
        return
    if upper:
        torch.bitwise_and(weight.nibbles, 240, out=one)
        torch.bitwise_right_shift(weight.low, 4, out=two)
    else:
        torch.bitwise_left_shift(weight.nibbles, 4, out=one)
        torch.bitwise_and(weight.low, 15, out=two)
    one.bitwise_or_(two).bitwise_xor_(128)


def _slot_bytes(device: str) -> int:
    return GPU_SLOT_BYTES if device == "cuda" else SLOT_BYTES


def _case(weight: QuantWeight) -> tuple[str, int, int, int]:
    return weight.weights, weight.panel, weight.outputs, weight.inputs
