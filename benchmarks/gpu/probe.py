"""What this machine can do: the limits that every other block is measured against.

Copies between host and device by size, from page-locked and pageable memory, alone and while products run; reads of the
checkpoint's own file; products at decode and prefill shapes; device memory's rate.  No engine takes part.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from clock import Timer, matrices, pinned
from setting import Bench, block

PREFILL_ROWS = 16384


def copies(bench: Bench, timer: Timer) -> list[dict[str, Any]]:
    """Bytes per second by size, direction and kind of host memory."""
    rows = []
    for nbytes in bench.size.copies:
        on_device = torch.empty(nbytes, dtype=torch.uint8, device=timer.device)
        for is_pinned in (True, False):
            with pinned(nbytes, timer.is_cuda and is_pinned) as host:
                for way, target, source in (("h2d", on_device, host), ("d2h", host, on_device)):
                    seconds = timer.median(lambda t=target, s=source: t.copy_(s, non_blocking=True))
                    rows.append(
                        {"way": way, "bytes": nbytes, "pinned": is_pinned, "bytes_per_s": nbytes / seconds}
                    )
    return rows


def beside_products(bench: Bench, timer: Timer) -> dict[str, float]:
    """A large page-locked copy up while products run on another stream; and what the products lose by it."""
    nbytes = bench.size.copies[-1]
    weight = matrices(bench, timer.device)[0]
    x = torch.randn(min(4096, 16 * weight.shape[1]), weight.shape[1], dtype=weight.dtype, device=timer.device)
    on_device = torch.empty(nbytes, dtype=torch.uint8, device=timer.device)
    with pinned(nbytes, timer.is_cuda) as host:

        def products() -> None:
            for _ in range(4):
                torch.mm(x, weight.t())

        alone_s = timer.median(products)
        copy_s, products_s = timer.side_by_side(
            lambda: on_device.copy_(host, non_blocking=True), products, alone_s
        )
    return {"h2d_beside_products": nbytes / copy_s, "products_beside_copies": products_s / alone_s}


def products(bench: Bench, timer: Timer) -> dict[str, float]:
    """Matrices of one layer in turn: bytes of weights per second at one row, FLOP/s at a full prefill pass."""
    weights = matrices(bench, timer.device)
    rows = 64 if bench.is_dry else PREFILL_ROWS
    pool = weights * max(1, (0 if bench.is_dry else 4 * 10**9) // sum(w.nbytes for w in weights))
    pool = [weight.clone() for weight in pool]  # more than any cache holds

    def one_row(count: int) -> Callable[[], None]:
        inputs = {w.shape[1]: torch.randn(count, w.shape[1], dtype=w.dtype, device=w.device) for w in weights}

        def run() -> None:
            for weight in pool if count == 1 else weights:
                torch.mm(inputs[weight.shape[1]], weight.t())

        return run

    decode_s, prefill_s = timer.median(one_row(1)), timer.median(one_row(rows))
    nbytes, numel = sum(w.nbytes for w in pool), sum(w.numel() for w in weights)
    source = torch.empty(sum(w.nbytes for w in weights), dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    memory_s = timer.median(lambda: target.copy_(source))
    return {
        "gemv_bytes_per_s": nbytes / decode_s,
        "gemm_flops_per_s": 2 * numel * rows / prefill_s,
        "device_memory_bytes_per_s": 2 * source.nbytes / memory_s,
    }


def run(bench: Bench) -> None:
    """Measure, write."""
    from conditions import weight_files
    from harness import direct_read_rate

    timer = Timer(bench.torch_device, bench.size.repeats)
    model = bench.checkpoint()
    rows = copies(bench, timer)
    best = {
        f"{way}{'' if kind else '_pageable'}": max(
            row["bytes_per_s"] for row in rows if row["way"] == way and row["pinned"] is kind
        )
        for way in ("h2d", "d2h")
        for kind in (True, False)
    }
    figures: dict[str, float | None] = {f"{name}_bytes_per_s": rate for name, rate in best.items()}
    figures |= beside_products(bench, timer) | products(bench, timer)
    figures["disk_bytes_per_s"] = direct_read_rate(weight_files(model))
    bench.profile(model)
    bench.record(figures, rows, is_right=True, config={"model": model.name})


main = block(__doc__, "probe", run, 300)

if __name__ == "__main__":
    sys.exit(main())
