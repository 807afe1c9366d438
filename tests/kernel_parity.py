"""Every device kernel against its twin: one set of cases for the interpreter on the CPU and for a real GPU."""

import pytest
import torch

from zinfer.kernels import quant, rows
from zinfer.kernels.fused_quant import fill_slot, fused
from zinfer.kernels.paged import PageRows, paged_decode, paged_decode_twin
from zinfer.kernels.panels import dequantise
from zinfer.kernels.quantise import quantise
from zinfer.kvcache.pages import PAGE_TOKENS
from zinfer.kvcache.planes import make_planes
from zinfer.layers import mlp, norm, rotary
from zinfer.layers.mlp import close_gate, open_gate
from zinfer.layers.norm import layer_norm, rms_norm
from zinfer.layers.rotary import rotate

WORDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
WRONG_ROWS = (  # kernel, the function's name, what reads one thing wrongly: each must be seen
    ("rotate", "rotate", lambda run: lambda x, cos, sin: run(x, cos, -sin)),
    ("rotate", "rotate", lambda run: lambda x, cos, sin: run(x, cos[:, :-1], sin[:, :-1])),
    ("gate", "gated", lambda run: lambda gate, up, *table: run(up, gate, *table)),
    ("norm", "norm", lambda run: lambda x, weight, eps: run(x, weight.flip(0), eps)),
)
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def interprets():
    """Whether Triton's kernels run here without a device."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)


def pages_case(device, dtype, lengths, *, heads=4, kv_heads=2, dim=16, page_tokens=16, is_int8=False, seed=0):
    """Queries, the planes of one layer with pages in a random order, and the table over them."""
    draw = torch.Generator().manual_seed(seed)
    counts = [-(-length // page_tokens) for length in lengths]
    num_pages = sum(counts) + 3
    order = torch.randperm(num_pages, generator=draw).tolist()
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for row, count in enumerate(counts):
        table[row, :count] = torch.tensor([order.pop() for _ in range(count)])
    # Planes are counted in pages of the cache's own size.
    num_cells = -(-num_pages * page_tokens // PAGE_TOKENS)
    planes = make_planes(1, kv_heads, dim, num_cells, "INT8" if is_int8 else WORDS[dtype])
    slots = torch.arange(num_pages * page_tokens)
    for kind in (0, 1):
        planes.write(0, kind, slots, torch.randn(len(slots), kv_heads, dim, generator=draw).to(dtype))
    q = torch.randn(len(lengths), heads, dim, generator=draw).to(dtype)
    pages = PageRows(
        table.to(device), torch.tensor(lengths, dtype=torch.int32, device=device), max(lengths), page_tokens
    )
    return q.to(device), [plane[0].to(device) for plane in planes.tensors], pages


def paged_error(device, dtype, lengths, *, splits=None, window=None, cap=0.0, native=None, **shape):
    """Largest difference between the kernel, Triton's or the compiled one (`native`), and its twin."""
    q, planes, pages = pages_case(device, dtype, lengths, **shape)
    options = {"scale": 0.25, "window": window, "cap": cap}
    if native is None:
        found = paged_decode(q, planes, pages, splits=splits, **options)
    else:
        where = pages.table, pages.lengths, pages.page_tokens
        found = native.attend(q, *planes[0].unbind(), *where, **options)
    assert found.dtype == dtype
    want = paged_decode_twin(q, planes, pages, **options)
    assert want.float().abs().max() > 0.1
    return float((found.float() - want.float()).abs().max())


def quant_case(device, dtype, weights, rows, outputs, inputs, panel=64):
    """Rows and a quantised weight with a scale and zero of its own per group."""
    draw = torch.Generator().manual_seed(rows)
    matrix = torch.randn(outputs, inputs, generator=draw) * torch.rand(outputs, 1, generator=draw) + 0.3
    x = torch.randn(rows, inputs, generator=draw).to(dtype)
    return x.to(device), quantise(matrix, weights, panel).to(torch.device(device))


def fused_error(device, dtype, weights, rows, outputs, inputs, *, splits=None, panel=64):
    """Relative error of the fused product against fp32 from the dequantised weight."""
    x, weight = quant_case(device, dtype, weights, rows, outputs, inputs, panel)
    found = fused(x, weight, splits=splits)
    assert found.dtype == dtype
    want = x.float() @ dequantise(weight).t()
    assert found.shape == want.shape
    return float((found.float() - want).norm() / want.norm())


def slot_difference(device, weights, outputs, inputs, panel=64):
    """How many elements of the unpacked slot differ from the torch code's.

    The interpreter cuts bf16 off where devices round, so there the slot is fp32 and torch rounds.
    """
    _, weight = quant_case(device, torch.bfloat16, weights, 1, outputs, inputs, panel)
    want = quant._fill_slot(weight.to(torch.device("cpu")))
    dtype = torch.float32 if interprets() else torch.bfloat16
    slot = torch.full(want.shape, float("nan"), dtype=dtype, device=device)
    fill_slot(weight, slot)
    return int((slot.cpu().bfloat16() != want).sum())


ROWS_CLOSE = {
    torch.float32: 1e-6,
    torch.bfloat16: 1.6e-2,
    torch.float16: 2e-3,
}  # the interpreter cuts bf16 off

FUSED = {
    mlp: ("device_kernels", "host_kernels"),
    norm: ("row_kernels", "host_kernels"),
    rotary: ("row_kernels",),
}


def twin(function, *args, **options):
    """What a layer computes where nothing is fused."""
    with pytest.MonkeyPatch.context() as patch:
        for layer, kinds in FUSED.items():
            for kind in kinds:
                patch.setattr(layer, kind, lambda *tensors: None)
        return function(*args, **options)


def rows_error(device, dtype, kernel, kernels=rows):
    """Largest difference of a fused row kernel from its twin, relative to the values' size where that is above 1."""
    draw = torch.Generator().manual_seed(3)
    wide = torch.randn(5, 6 * 48 + 2, generator=draw).to(device, dtype)
    match kernel:
        case "norm":
            weight = torch.rand(290, generator=draw).to(device, dtype)
            found, want = kernels.norm(wide, weight, 1e-5), twin(rms_norm, wide, weight, 1e-5)
        case "layer norm":
            weight, bias = torch.rand(2, 290, generator=draw).to(device, dtype)
            found = kernels.layer_norm(wide, weight, bias, 1e-5)
            want = twin(layer_norm, wide, weight, bias, 1e-5)
        case "rotate":
            heads = wide[:, 1:-1].unflatten(1, (6, 48))[
                :, 1:
            ]  # five heads of a fused product, of which 2 * 20 turn
            angles = torch.rand(5, 20, generator=draw) * 6
            cos, sin = (part.to(device, dtype) for part in (angles.cos(), angles.sin()))
            found, want = kernels.rotate(heads, cos, sin), twin(rotate, heads, cos, sin)
        case "gate":
            gate, up = wide.chunk(2, -1)
            opened = twin(open_gate, gate, "silu", exact=False)
            table = () if kernels is rows else (mlp.table("silu"),)
            found, want = kernels.gated(gate, up, *table), twin(close_gate, opened, up, "silu")
        case "one row":
            weight = torch.randn(77, 290, generator=draw).to(device, dtype) * 0.06
            bias = torch.randn(77, generator=draw).to(device, dtype)
            found = rows.one_row(wide[:1], weight, bias)
            want = torch.nn.functional.linear(wide[:1], weight, bias)
    assert found.dtype == dtype
    assert found.shape == want.shape
    assert float(want.float().abs().max()) > 0.5
    return float(((found.float() - want.float()).abs() / want.float().abs().clamp(min=1)).max())
