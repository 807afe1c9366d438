"""Measure this machine.  In: the files that will be read, the product that will be used.  Out: a Machine of rates."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from zinfer.config.limits import memory_limits
from zinfer.config.machine import Compute, Machine, ProductRate, StepCost
from zinfer.config.profiles import fingerprint
from zinfer.memory.measure_links import (
    device_of,
    measure_copies,
    measure_disk,
    measure_host_copy,
    typical_seconds,
)
from zinfer.units import MIB

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
EXACT = " exact"  # marks the rates of exact mode: "BF16 exact"
ROWS = (1, 512, 8, 64, 2, 4)  # the ends first
_MAX_POOL = 1024  # matrices
_POOL_BYTES = 640 * MIB  # rotated over, so that weights come from memory and from no cache
_FEW_TOKENS, _MANY_TOKENS, _PREFILL_ROWS = 64, 1536, 512


class Product(Protocol):
    """A product as layers call it: x [T, I] times weight [O, I] gives [T, O]."""

    def __call__(self, x_TI: Tensor, weight: Tensor, *, exact: bool) -> Tensor: ...


class SmallPasses(Protocol):
    """Passes of a model so small that only fixed costs and attention count."""

    @property
    def num_ops(self) -> int:
        """Ops of a pass."""
        ...

    def attention_flops(self, rows: int, context: int) -> float:
        """Of one pass, all layers."""
        ...

    def run(self, rows: int, context: int, *, exact: bool) -> None:
        """One pass of `rows` new rows that ends at `context` tokens; blocks until it is done."""
        ...


Shape = tuple[int, int]  # [out, in] of a matrix
SHAPES: tuple[Shape, ...] = ((8192, 2048), (4096, 4096), (2048, 8192))  # of layers, where no model is named
SmallModels = Callable[[torch.device], SmallPasses]


def probe(
    paths: Sequence[Path],
    product: Product,
    small_model: SmallModels,
    *,
    dtype: str = "BF16",
    shapes: Sequence[Shape] = SHAPES,
    seconds: float = 2.0,
) -> Machine:
    """What a plan for these files needs, in about `seconds`: where `zinfer doctor` has saved nothing."""
    return measure(paths, product, small_model, dtypes=(dtype,), shapes=shapes, seconds=seconds)


def for_files(machine: Machine, paths: Sequence[Path], seconds: float = 0.5) -> Machine:
    """The machine as it is for these files: a disk other than the measured one is measured, briefly."""
    if not paths or not machine.measured or machine.disk_device == device_of(paths):
        return machine
    return machine.model_copy(update=_disk_fields(paths, seconds))


def measure(
    paths: Sequence[Path],
    product: Product,
    small_model: SmallModels,
    *,
    dtypes: Sequence[str] = tuple(DTYPES),
    shapes: Sequence[Shape] = SHAPES,
    seconds: float = 20.0,
) -> Machine:
    """This machine as the planner sees it, in about `seconds`: a quarter for the disk, the rest for computation.

    `paths` are the weight files that will be read; without any the disk's rate is a cautious guess.  `product` is
    what layers multiply with, with matrices of `shapes` (kernels differ by shape); `small_model` makes passes that
    show what an op costs beside its weights.
    """
    end_s = time.perf_counter() + seconds
    limits = memory_limits()
    disk = _disk_fields(paths, seconds / 4)
    has_gpu = torch.cuda.is_available()
    host_s = (end_s - time.perf_counter()) * (0.5 if has_gpu else 1.0)
    host = measure_compute(
        product, small_model, torch.device("cpu"), dtypes, shapes, limits.available // 4, host_s
    )
    machine = Machine(
        name=platform.node() or "this machine",
        host_bytes=limits.total,
        host=host,
        host_copy_bytes_per_s=measure_host_copy(),
        measured=True,
        fingerprint=fingerprint(),
        **disk,
    )
    if not has_gpu:
        return machine
    device = torch.device("cuda", torch.cuda.current_device())
    copies = measure_copies(device, limits.available, seconds)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    device_s = end_s - time.perf_counter()
    compute = measure_compute(product, small_model, device, dtypes, shapes, free_bytes // 4, device_s)
    return machine.model_copy(
        update={
            "device_bytes": total_bytes,
            "pinnable_bytes": copies.pinnable_bytes,
            "h2d": copies.h2d,
            "d2h": copies.d2h,
            "device": compute,
        }
    )


def measure_compute(
    product: Product,
    small_model: SmallModels,
    device: torch.device,
    dtypes: Sequence[str],
    shapes: Sequence[Shape],
    free_bytes: int,
    seconds: float,
) -> Compute:
    """Products of cold weights at decode and prefill shapes, attention, and the fixed cost of an op, in both modes."""
    end_s = time.perf_counter() + seconds
    products: dict[str, tuple[ProductRate, ...]] = {}
    steps: list[StepCost] = []

    def share_s() -> float:
        """What is left, for each series that is left; making matrices and exact mode's tests take their part."""
        return max(end_s - time.perf_counter(), 0.05) / (2 * len(dtypes) + 1 - len(products) - len(steps) / 2)

    with torch.no_grad():
        for dtype in dtypes:
            pool = _pool(DTYPES[dtype], device, shapes, min(_POOL_BYTES, free_bytes))
            for name, exact in ((dtype, False), (dtype + EXACT, True)):
                _round(
                    product, pool[: len(shapes)], 1, exact
                )  # exact mode tests itself when it meets a shape
                products[name] = _product_rates(product, pool, len(shapes), exact, share_s())
            del pool
        small = small_model(device)
        for exact in (False, True):
            for rows, context in ((1, _FEW_TOKENS), (_PREFILL_ROWS, _PREFILL_ROWS)):
                small.run(rows, context, exact=exact)  # likewise
            steps.append(_step_cost(small, exact, share_s() / 2))
    return Compute(products=products, exact=steps[1], **steps[0].model_dump())


def _disk_fields(paths: Sequence[Path], seconds: float) -> dict[str, Any]:
    disk = measure_disk(paths, seconds)
    return {
        "disk_read": disk.link,
        "disk_row_latency_s": disk.row_latency_s,
        "disk_device": device_of(paths),
    }


def _pool(dtype: torch.dtype, device: torch.device, shapes: Sequence[Shape], nbytes: int) -> list[Tensor]:
    """Weights of the shapes in turn, `nbytes` in all or more; ordinary numbers, for denormal ones are slow."""
    noise = torch.randn(65_537, generator=torch.Generator().manual_seed(0)).to(dtype)
    pool: list[Tensor] = []
    made = 0
    for shape in islice(cycle(shapes), _MAX_POOL):
        if made >= nbytes and len(pool) >= len(shapes):
            break
        size = shape[0] * shape[1]
        pool.append(noise.repeat(-(-size // noise.numel()))[:size].view(shape).to(device))
        made += size * dtype.itemsize
    return pool


def _round(product: Product, weights: Iterable[Tensor], rows: int, exact: bool) -> None:
    """One product with each weight; blocks until they are done."""
    outputs = [product(weight.new_ones(rows, weight.shape[1]), weight, exact=exact) for weight in weights]
    outputs[-1][0, 0].item()  # waits for a device


def _product_rates(
    product: Product, pool: Sequence[Tensor], num_shapes: int, exact: bool, seconds: float
) -> tuple[ProductRate, ...]:
    """Seconds per 10**9 bytes of weights, the pool taken in turn.  Out of time, what lies in between is left out."""
    rates: list[ProductRate] = []
    round_bytes = sum(weight.numel() * weight.dtype.itemsize for weight in pool[:num_shapes])
    turns = cycle(pool)
    end_s = time.perf_counter() + seconds

    def one_round(rows: int) -> None:
        _round(product, islice(turns, num_shapes), rows, exact)

    for rows in ROWS:
        if len(rates) < 2 or time.perf_counter() < end_s:
            round_s = typical_seconds(partial(one_round, rows), seconds / len(ROWS))
            rates.append(ProductRate(rows=rows, seconds_per_gb=round_s / round_bytes * 1e9))
    return tuple(sorted(rates, key=lambda rate: rate.rows))


def _step_cost(small: SmallPasses, exact: bool, seconds: float) -> StepCost:
    """Fixed cost from a decode pass over few tokens, attention from what many tokens and many rows add to it."""
    share_s = seconds / 3
    plain_s = typical_seconds(partial(small.run, 1, _FEW_TOKENS, exact=exact), share_s)

    def rate(rows: int, context: int) -> float:
        added_s = typical_seconds(partial(small.run, rows, context, exact=exact), share_s) - plain_s
        return small.attention_flops(rows, context) / max(
            added_s, 0.05 * plain_s
        )  # noise must not make it infinite

    return StepCost(
        op_overhead_s=plain_s / small.num_ops,
        attention_flops_per_s=rate(1, _MANY_TOKENS),
        prefill_attention_flops_per_s=rate(_PREFILL_ROWS, _PREFILL_ROWS),
    )
