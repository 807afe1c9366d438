"""Measure the ways bytes take.  In: the files that will be read, a device.  Out: rates of disk, host memory, links."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch

from zinfer.chunks.table import HUGE_PAGE, PAGE, PIECE_BYTES, Chunk, ChunkId, Read, RowTable
from zinfer.config.machine import Link
from zinfer.memory.links import LinkLog, Ticket, started_pool
from zinfer.memory.nvme import IN_FLIGHT, Files, Reader
from zinfer.memory.rows import RowReader
from zinfer.memory.slab import HostSlab
from zinfer.units import GIB, KIB, MIB

_SMALL_BYTES = 256 * KIB
_ROW_BYTES = 4 * KIB
_NUM_ROWS = 24
_COPY_LATENCY_S = 1e-5
_OWN_SPEEDS = 1.5  # between a machine's own two speeds; what took longer was somebody else's doing


@dataclass(frozen=True, slots=True)
class DiskRates:
    """Direct reads of real files: large pieces, several in flight, the fixed cost of a piece, and one row alone."""

    link: Link
    row_latency_s: float


NO_FILE = DiskRates(Link(bytes_per_s=1e9, latency_s=1e-4), 2e-4)  # a cautious guess


@dataclass(frozen=True, slots=True)
class CopyRates:
    """Links between page-locked host memory and a device, and how much could be page-locked (None: no limit met)."""

    h2d: Link
    d2h: Link
    pinnable_bytes: int | None


class ReadLoad:
    """The engine's own readers at work on the files, into huge pages that have been touched."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._closing = ExitStack()

    def __enter__(self) -> ReadLoad:
        files = Files(self._paths)
        self._closing.callback(files.close)
        self._reader, self._rows = Reader(files, LinkLog()), RowReader(files, LinkLog())
        self._closing.callback(self._reader.close)
        self._closing.callback(self._rows.close)
        slab = HostSlab(IN_FLIGHT * PIECE_BYTES)
        self._closing.callback(slab.close)
        slab.bytes_N.fill_(0)  # the first touch of memory is not the disk's time
        self._places_N = slab.bytes_N.numpy()
        return self

    def __exit__(self, *_error: object) -> None:
        self._closing.close()

    def piece_seconds(self, reads: Sequence[Read], seconds: float) -> float:
        """Mean seconds per read with IN_FLIGHT of them under way all the time, each into a place of its own."""
        tickets: list[Ticket] = []
        begin_s = time.perf_counter()
        for count, read in enumerate(cycle(reads)):
            if count >= IN_FLIGHT:
                tickets[count - IN_FLIGHT].wait()
                if time.perf_counter() - begin_s > seconds and count >= 2 * IN_FLIGHT:
                    break
            chunk = Chunk(ChunkId(0), (0,), (), (read,), (), read.nbytes, read.nbytes)
            tickets.append(Ticket(chunk))
            place_N = self._places_N[count % IN_FLIGHT * PIECE_BYTES :][: read.nbytes]
            self._reader.begin(tickets[-1], place_N, tickets[-1].land)
        for ticket in tickets:
            ticket.wait()
        return (time.perf_counter() - begin_s) / len(tickets)

    def row_seconds(self, seconds: float) -> float:
        """One row alone, as a decode pass looks it up: of the first _NUM_ROWS, those that begin in time."""
        sizes = [path.stat().st_size for path in self._paths]
        file = sizes.index(max(sizes))
        table = RowTable("rows", file, 0, _ROW_BYTES, sizes[file] // _ROW_BYTES, (_ROW_BYTES // 2,), "BF16")
        drawn = np.random.default_rng(0).integers(0, table.num_rows, size=_NUM_ROWS)
        end_s, times = time.perf_counter() + seconds, []
        for at in range(_NUM_ROWS):
            times.append(typical_seconds(partial(self._rows.read, table, drawn[at : at + 1]), 0))
            if time.perf_counter() > end_s:
                break
        return median(times)


def measure_disk(paths: Sequence[Path], seconds: float) -> DiskRates:
    """Read evenly spread ranges of the files by the engine's own readers.

    The first reads are not counted: decode passes come to the same bytes again and again.
    """
    large, small = ranges(paths, PIECE_BYTES), ranges(paths, _SMALL_BYTES)
    if not large:
        return NO_FILE
    with ReadLoad(paths) as load:
        load.piece_seconds(small, seconds / 8)
        large_s = load.piece_seconds(large, seconds / 2)
        small_s = load.piece_seconds(small, seconds / 8)
        row_s = load.row_seconds(seconds / 8)
    large_bytes = sum(read.nbytes for read in large) / len(large)
    small_bytes = sum(read.nbytes for read in small) / len(small)
    # Two sizes give both terms of latency + bytes / rate; noise must not make the latency negative or absurd.
    slope = (large_s - small_s) / max(large_bytes - small_bytes, 1)
    latency_s = min(max(large_s - large_bytes * slope, 0.0), 0.05 * large_s)
    return DiskRates(Link(bytes_per_s=large_bytes / (large_s - latency_s), latency_s=latency_s), row_s)


def measure_host_copy(nbytes: int = GIB // 8) -> float:
    """Bytes per second of a copy within host memory, all threads."""
    source, target = torch.zeros(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    return nbytes / typical_seconds(lambda: target.copy_(source))


def measure_copies(
    device: torch.device, free_bytes: int, seconds: float, nbytes: int = 256 * MIB
) -> CopyRates:
    """Large copies each way, and page-locking in steps of 1 GiB for a quarter of `seconds`, all undone again."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    slab = HostSlab(nbytes)
    slab.bytes_N.fill_(0)
    slab.pin([0, nbytes], runtime, is_quiet=True).settle()
    on_device = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def copy_seconds(target: torch.Tensor, source: torch.Tensor) -> float:
        def run() -> None:
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize(device)

        run()
        return typical_seconds(run)

    try:
        up_s, down_s = copy_seconds(on_device, slab.bytes_N), copy_seconds(slab.bytes_N, on_device)
    finally:
        slab.close()
    return CopyRates(
        h2d=Link(bytes_per_s=nbytes / up_s, latency_s=_COPY_LATENCY_S),
        d2h=Link(bytes_per_s=nbytes / down_s, latency_s=_COPY_LATENCY_S),
        pinnable_bytes=_pinnable_bytes(free_bytes, seconds / 4),
    )


def device_of(paths: Sequence[Path]) -> str:
    """The block devices that hold the files, as the kernel numbers them."""
    numbers = {path.stat().st_dev for path in paths}
    return " ".join(sorted(f"{os.major(number)}:{os.minor(number)}" for number in numbers))


def typical_seconds(run: Callable[[], object], seconds: float = 0.05) -> float:
    """`typical` of as many runs as begin within `seconds`, at least one."""
    times: list[float] = []
    begin_s = now_s = time.perf_counter()
    while now_s - begin_s < seconds or not times:
        before_s = now_s
        run()
        now_s = time.perf_counter()
        times.append(now_s - before_s)
    return typical(times)


def typical(times: Sequence[float]) -> float:
    """The mean of those that took at most half as long again as the lowest decile.

    What other processes take away comes and goes, and is left out; but a machine may have two speeds of its own that
    change within seconds (a clock, another guest's thread on the same core), and a pass meets both.
    """
    usual = _OWN_SPEEDS * sorted(times)[len(times) // 10]
    return fmean(seconds for seconds in times if seconds <= usual)


def measure_fresh(seconds: float, nbytes: int = 256 * MIB) -> float:
    """Bytes per second at which memory that nobody has used gets its pages from as many threads as read into it.

    A virtual machine finds and clears each page at its first use, at a rate that depends on who had it before.
    """
    slab = HostSlab(nbytes)
    places_N = slab.bytes_N.numpy()
    steps = iter(range(0, nbytes, HUGE_PAGE))
    begin_s = time.perf_counter()

    def find(_thread: int) -> int:
        found = 0
        for begin in steps:  # shared: each takes what comes next
            stored_N = places_N[begin : begin + HUGE_PAGE : PAGE]
            stored_N[:] = 0  # without the interpreter's lock, as there are that many
            found += len(stored_N) * PAGE
            if time.perf_counter() - begin_s > seconds:
                break
        return found

    try:
        with started_pool(IN_FLIGHT, "zinfer-fresh") as pool:
            begin_s = time.perf_counter()
            return sum(pool.map(find, range(IN_FLIGHT))) / (time.perf_counter() - begin_s)
    finally:
        slab.close()


def ranges(paths: Sequence[Path], nbytes: int) -> list[Read]:
    """PAGE-aligned ranges of at most `nbytes`, spread over all files, about 64 of them, in a scattered order."""
    reads = []
    for file, path in enumerate(paths):
        size = path.stat().st_size // PAGE * PAGE
        length = min(nbytes, size)
        count = max(min(size // nbytes, -(-64 // len(paths))), 1)
        offsets = {int(at) // PAGE * PAGE for at in np.linspace(0, size - length, count)} if length else set()
        reads += [Read(file, offset, length, 0, length) for offset in sorted(offsets)]
    order = np.random.default_rng(0).permutation(len(reads))
    return [reads[at] for at in order]


def _pinnable_bytes(free_bytes: int, seconds: float) -> int | None:
    """How much host memory the driver page-locks before it refuses; None when time or memory ended first."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    held: list[HostSlab] = []
    end_s = time.perf_counter() + seconds
    try:
        while (len(held) + 1) * GIB < free_bytes // 2 and time.perf_counter() < end_s:
            held.append(HostSlab(GIB))
            locked = held[-1].pin([0, GIB], runtime, is_quiet=True).settle()
            if locked.nbytes < GIB:
                return (len(held) - 1) * GIB
        return None
    finally:
        for slab in held:
            slab.close()
