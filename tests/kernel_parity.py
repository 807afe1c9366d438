"""Every device kernel against its twin: one set of cases for the interpreter on the CPU and for a real GPU."""

import torch

from zinfer.kernels.paged import PageRows, paged_decode, paged_decode_twin
from zinfer.kvcache.planes import make_planes

WORDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
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
    planes = make_planes(1, kv_heads, dim, num_pages, "INT8" if is_int8 else WORDS[dtype])
    slots = torch.arange(num_pages * page_tokens)
    for kind in (0, 1):
        planes.write(0, kind, slots, torch.randn(len(slots), kv_heads, dim, generator=draw).to(dtype))
    q = torch.randn(len(lengths), heads, dim, generator=draw).to(dtype)
    pages = PageRows(
        table.to(device), torch.tensor(lengths, dtype=torch.int32, device=device), max(lengths), page_tokens
    )
    return q.to(device), [plane[0].to(device) for plane in planes.tensors], pages


def paged_error(device, dtype, lengths, *, splits=None, window=None, cap=0.0, **shape):
    """Largest difference between the kernel and its twin."""
    q, planes, pages = pages_case(device, dtype, lengths, **shape)
    options = {"scale": 0.25, "window": window, "cap": cap}
    found = paged_decode(q, planes, pages, splits=splits, **options)
    assert found.dtype == dtype
    want = paged_decode_twin(q, planes, pages, **options)
    assert want.float().abs().max() > 0.1
    return float((found.float() - want.float()).abs().max())
