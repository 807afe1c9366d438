"""Measure this machine.  In: the files that will be read, the product that will be used.  Out: a Machine of rates."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from zinfer.chunks.table import PAGE, PIECE_BYTES, Chunk, ChunkId, Read, RowTable
from zinfer.config.limits import memory_limits
from zinfer.config.machine import Compute, Link, Machine, ProductRate, StepCost
from zinfer.config.profiles import fingerprint
from zinfer.memory.links import LinkLog, Ticket
from zinfer.memory.nvme import IN_FLIGHT, Files, Reader
from zinfer.memory.rows import RowReader
from zinfer.memory.slab import HostSlab
from zinfer.units import GIB, KIB, MIB

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
EXACT = " exact"  # marks the rates of exact mode: "BF16 exact"
ROWS = (1, 512, 8, 64, 2, 4)  # the ends first
_MAX_POOL = 1024  # matrices
_POOL_BYTES = 640 * MIB  # rotated over, so that weights come from memory and from no cache
_SMALL_BYTES = 256 * KIB
_ROW_BYTES = 4 * KIB
_FEW_TOKENS, _MANY_TOKENS, _PREFILL_ROWS = 64, 1536, 512
_NO_FILE = Link(bytes_per_s=1e9, latency_s=1e-4)  # a cautious guess


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


@dataclass(frozen=True, slots=True)
class DiskRates:
    """Direct reads of real files: large pieces in flight together, the fixed cost of a piece, one row alone.

    `first_bytes_per_s` is the rate of the very first reads, which a cache behind the disk may not have helped.
    """

    link: Link
    row_latency_s: float
    first_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class CopyRates:
    """Bytes per second between host and device from page-locked memory, from pageable memory, and of page-locking."""

    h2d: Link
    d2h: Link
    pageable_bytes_per_s: float
    pinning_bytes_per_s: float


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
    if not paths or not machine.measured or machine.disk_device == _device_of(paths):
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
    """This machine as the planner sees it, in about `seconds`: a third for the disk, the rest for computation.

    `paths` are the weight files that will be read; without any the disk's rate is a cautious guess.  `product` is
    what layers multiply with, with matrices of `shapes` (kernels differ by shape); `small_model` makes passes that
    show what an op costs beside its weights.
    """
    limits = memory_limits()
    has_gpu = torch.cuda.is_available()
    share_s = seconds * (1 / 3 if has_gpu else 2 / 3)
    host = measure_compute(
        product, small_model, torch.device("cpu"), dtypes, shapes, limits.available // 4, share_s
    )
    machine = Machine(
        name=platform.node() or "this machine",
        host_bytes=limits.total,
        host=host,
        measured=True,
        fingerprint=fingerprint(),
        **_disk_fields(paths, seconds / 3),
    )
    if not has_gpu:
        return machine
    device = torch.device("cuda", torch.cuda.current_device())
    copies = measure_copies(device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    compute = measure_compute(product, small_model, device, dtypes, shapes, free_bytes // 4, share_s)
    update = {"device_bytes": total_bytes, "h2d": copies.h2d, "d2h": copies.d2h, "device": compute}
    return machine.model_copy(update=update)


def measure_disk(paths: Sequence[Path], seconds: float) -> DiskRates:
    """Read evenly spread ranges of the files by the engine's own reader, each twice; the second time counts."""
    files = Files(paths)
    reader, rows = Reader(files, LinkLog()), RowReader(files, LinkLog())
    slab = HostSlab(IN_FLIGHT * PIECE_BYTES)
    try:
        places_N = slab.bytes_N.numpy()
        slab.bytes_N.fill_(0)  # the first touch of memory is not the disk's time
        large, small = _ranges(paths, PIECE_BYTES), _ranges(paths, _SMALL_BYTES)
        first = _read_rate(reader, large, places_N, seconds / 8)
        rate = _read_rate(reader, large, places_N, seconds / 2)
        small_rate = _read_rate(reader, small, places_N, seconds / 8)
        mean_large = sum(read.nbytes for read in large) / len(large)
        mean_small = sum(read.nbytes for read in small) / len(small)
        # Two sizes give both terms of seconds = latency + bytes / rate; noise must not make either negative.
        per_byte = (mean_large / rate - mean_small / small_rate) / max(mean_large - mean_small, 1)
        latency_s = min(max(mean_large / rate - mean_large * per_byte, 0.0), 0.05 * mean_large / rate)
        bytes_per_s = mean_large / (mean_large / rate - latency_s)
        row_latency_s = _row_seconds(rows, paths)
    finally:
        rows.close()
        reader.close()
        files.close()
        slab.close()
    return DiskRates(Link(bytes_per_s=bytes_per_s, latency_s=latency_s), row_latency_s, first)


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
    products = {}
    share_s = seconds / (2 * len(dtypes) + 1)
    with torch.no_grad():
        for dtype in dtypes:
            pool = _pool(DTYPES[dtype], device, shapes, min(_POOL_BYTES, free_bytes))
            for name, exact in ((dtype, False), (dtype + EXACT, True)):
                products[name] = _product_rates(product, pool, len(shapes), exact, share_s)
            del pool
        small = small_model(device)
        fast, exact_cost = (_step_cost(small, exact, share_s / 2) for exact in (False, True))
    return Compute(products=products, exact=exact_cost, **fast.model_dump())


def measure_copies(device: torch.device, nbytes: int = 256 * MIB) -> CopyRates:
    """One large copy each way, timed on the device's clock through page-locked memory."""
    pageable = torch.zeros(nbytes, dtype=torch.uint8)
    begin_s = time.perf_counter()
    pinned = pageable.pin_memory()
    pinning_s = time.perf_counter() - begin_s
    on_device = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def seconds(copy: Callable[[], object]) -> float:
        def run() -> None:
            copy()
            torch.cuda.synchronize(device)

        return _typical(run)

    h2d_s = seconds(lambda: on_device.copy_(pinned, non_blocking=True))
    d2h_s = seconds(lambda: pinned.copy_(on_device, non_blocking=True))
    pageable_s = seconds(lambda: on_device.copy_(pageable))
    return CopyRates(
        h2d=Link(bytes_per_s=nbytes / h2d_s, latency_s=1e-5),
        d2h=Link(bytes_per_s=nbytes / d2h_s, latency_s=1e-5),
        pageable_bytes_per_s=nbytes / pageable_s,
        pinning_bytes_per_s=nbytes / pinning_s,
    )


def measure_host_copy(nbytes: int = GIB // 4) -> float:
    """Bytes per second of a copy within host memory, all threads."""
    source, target = torch.zeros(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    return nbytes / _typical(lambda: target.copy_(source))


def _disk_fields(paths: Sequence[Path], seconds: float) -> dict[str, Any]:
    disk = measure_disk(paths, seconds) if paths else DiskRates(_NO_FILE, 2e-4, _NO_FILE.bytes_per_s)
    return {
        "disk_read": disk.link,
        "disk_row_latency_s": disk.row_latency_s,
        "disk_device": _device_of(paths),
    }


def _device_of(paths: Sequence[Path]) -> str:
    """The block devices that hold the files, as the kernel numbers them."""
    numbers = {path.stat().st_dev for path in paths}
    return " ".join(sorted(f"{os.major(number)}:{os.minor(number)}" for number in numbers))


def _ranges(paths: Sequence[Path], nbytes: int) -> list[Read]:
    """PAGE-aligned ranges of at most `nbytes`, spread over all files, at most 64 of them, in a scattered order."""
    reads = []
    for file, path in enumerate(paths):
        size = path.stat().st_size // PAGE * PAGE
        count = max(min(size // nbytes, -(-64 // len(paths))), 1)
        length = min(nbytes, size)
        offsets = {int(at) // PAGE * PAGE for at in np.linspace(0, size - length, count)} if length else set()
        reads += [Read(file, offset, length, 0, length) for offset in offsets]
    order = np.random.default_rng(0).permutation(len(reads))
    return [reads[at] for at in order]


def _read_rate(reader: Reader, reads: Sequence[Read], places_N: np.ndarray, seconds: float) -> float:
    """Bytes per second with IN_FLIGHT reads under way all the time, each into a place of its own."""
    tickets: list[Ticket] = []
    done, begin_s = 0, time.perf_counter()
    for count, read in enumerate(cycle(reads)):
        if count >= IN_FLIGHT:
            tickets[count - IN_FLIGHT].wait()
            done += tickets[count - IN_FLIGHT].chunk.nbytes
            if time.perf_counter() - begin_s > seconds and count >= 2 * IN_FLIGHT:
                break
        place_N = places_N[count % IN_FLIGHT * PIECE_BYTES :][: read.nbytes]
        chunk = Chunk(ChunkId(0), (0,), (), (read,), (), read.nbytes, read.nbytes)
        tickets.append(Ticket(chunk))
        reader.begin(tickets[-1], place_N, tickets[-1].land)
    elapsed_s = time.perf_counter() - begin_s
    for ticket in tickets:
        ticket.wait()
    return done / elapsed_s


def _row_seconds(rows: RowReader, paths: Sequence[Path]) -> float:
    """One row alone, as a decode pass looks it up."""
    file = max(range(len(paths)), key=lambda at: paths[at].stat().st_size)
    num_rows = paths[file].stat().st_size // _ROW_BYTES
    table = RowTable("rows", file, 0, _ROW_BYTES, num_rows, (_ROW_BYTES // 2,), "BF16")
    draws = np.random.default_rng(0).integers(0, num_rows, size=24)
    seconds = []
    for row in draws.tolist():
        begin_s = time.perf_counter()
        rows.read(table, np.array([row]))
        seconds.append(time.perf_counter() - begin_s)
    return float(np.median(seconds))


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


def _product_rates(
    product: Product, pool: Sequence[Tensor], num_shapes: int, exact: bool, seconds: float
) -> tuple[ProductRate, ...]:
    """Seconds per 10**9 bytes of weights, the pool taken in turn.  Out of time, what lies in between is left out."""
    rates: list[ProductRate] = []
    round_bytes = sum(weight.numel() * weight.dtype.itemsize for weight in pool[:num_shapes])
    weights = cycle(pool)

    def one_round(rows: int) -> None:
        for weight in islice(weights, num_shapes):
            product(weight.new_ones(rows, weight.shape[1]), weight, exact=exact)
        if pool[0].is_cuda:
            torch.cuda.synchronize(pool[0].device)

    one_round(1)  # exact mode tests itself when it first meets a shape
    end_s = time.perf_counter() + seconds
    for rows in ROWS:
        if len(rates) < 2 or time.perf_counter() < end_s:
            cost = _typical(partial(one_round, rows), seconds / len(ROWS)) / round_bytes * 1e9
            rates.append(ProductRate(rows=rows, seconds_per_gb=cost))
    return tuple(sorted(rates, key=lambda rate: rate.rows))


def _step_cost(small: SmallPasses, exact: bool, seconds: float) -> StepCost:
    """Fixed cost from a decode pass over few tokens, attention from what many tokens and many rows add to it."""
    share_s = seconds / 3
    for rows, context in ((1, _FEW_TOKENS), (_PREFILL_ROWS, _PREFILL_ROWS)):
        small.run(rows, context, exact=exact)  # exact mode tests itself when it first meets a shape
    plain_s = _typical(partial(small.run, 1, _FEW_TOKENS, exact=exact), share_s)

    def rate(rows: int, context: int) -> float:
        added_s = _typical(partial(small.run, rows, context, exact=exact), share_s) - plain_s
        return small.attention_flops(rows, context) / max(
            added_s, 0.05 * plain_s
        )  # noise must not make it infinite

    return StepCost(
        op_overhead_s=plain_s / small.num_ops,
        attention_flops_per_s=rate(1, _MANY_TOKENS),
        prefill_attention_flops_per_s=rate(_PREFILL_ROWS, _PREFILL_ROWS),
    )


def _typical(run: Callable[[], object], seconds: float = 0.05) -> float:
    """The median of as many runs as begin within `seconds`, at least one."""
    times: list[float] = []
    begin_s = now_s = time.perf_counter()
    while now_s - begin_s < seconds or not times:
        before_s = now_s
        run()
        now_s = time.perf_counter()
        times.append(now_s - before_s)
    return median(times)
