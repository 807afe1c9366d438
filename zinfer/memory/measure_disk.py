"""Measure the disk that holds the weights.  In: the files that will be read, what was known.  Out: rates of reads."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import cycle, pairwise
from math import exp, hypot, log
from pathlib import Path
from statistics import fmean, median

import numpy as np

from zinfer.chunks.table import HUGE_PAGE, PAGE, PIECE_BYTES, Chunk, ChunkId, Read, RowTable
from zinfer.config.machine import Link
from zinfer.memory.links import LinkLog, Ticket
from zinfer.memory.measure_links import lasting, typical_seconds
from zinfer.memory.nvme import IN_FLIGHT, Files, Reader
from zinfer.memory.rows import RowReader
from zinfer.memory.slab import HostSlab
from zinfer.units import KIB

_SMALL_BYTES = 256 * KIB
_ROW_BYTES = 4 * KIB
_NUM_ROWS = 24
_NOISE = 0.15  # of a twentieth of a second of reads, as a share of what the seconds that follow bring
_LONGER = 4  # times as long is looked again where the first look is far off
_LESS_NOISE = 0.08  # of that look
_DRIFT = 0.08  # of a disk that others use, from one minute to another


@dataclass(frozen=True, slots=True)
class DiskRates:
    """Direct reads of real files: large pieces, several in flight, the fixed cost of a piece, and one row alone."""

    link: Link
    row_latency_s: float


NO_FILE = DiskRates(Link(bytes_per_s=1e9, latency_s=1e-4), 2e-4)  # a cautious guess


class ReadLoad:
    """The engine's own readers at work on the files, into huge pages that have been touched.

    Each read in flight has a place of its own, or (fewer `num_places`) shares one: nobody looks at what was read, and
    fresh memory may take longer than the reads.
    """

    def __init__(self, paths: Sequence[Path], num_places: int = IN_FLIGHT) -> None:
        self._paths = paths
        self._num_places = num_places
        self._closing = ExitStack()

    def __enter__(self) -> ReadLoad:
        files = Files(self._paths)
        self._closing.callback(files.close)
        self._reader, self._rows = Reader(files, LinkLog()), RowReader(files, LinkLog())
        self._closing.callback(self._reader.close)
        self._closing.callback(self._rows.close)
        slab = HostSlab(self._num_places * PIECE_BYTES)
        self._closing.callback(slab.close)
        slab.bytes_N[::HUGE_PAGE].fill_(0)  # the first touch of memory is not the disk's time
        self._places_N = slab.bytes_N.numpy()
        return self

    def __exit__(self, *_error: object) -> None:
        self._closing.close()

    def round_seconds(self, reads: Sequence[Read], seconds: float) -> list[float]:
        """What each IN_FLIGHT reads in turn took, as many of them under way all the time.

        The first ones are not counted: they open files and find the disk idle.  One round at least.
        """
        tickets: list[Ticket] = []
        landed_s: list[float] = []
        begin_s = time.perf_counter()
        for count, read in enumerate(cycle(reads)):
            if count >= IN_FLIGHT:
                tickets[count - IN_FLIGHT].wait()
                landed_s.append(time.perf_counter())
                if landed_s[-1] - begin_s > seconds and count >= 2 * IN_FLIGHT:
                    break
            chunk = Chunk(ChunkId(0), (0,), (), (read,), (), read.nbytes, read.nbytes)
            tickets.append(Ticket(chunk))
            place_N = self._places_N[count % self._num_places * PIECE_BYTES :][: read.nbytes]
            self._reader.begin(tickets[-1], place_N, tickets[-1].land)
        for ticket in tickets[len(landed_s) :]:
            ticket.wait()
            landed_s.append(time.perf_counter())
        return [later - earlier for earlier, later in pairwise(landed_s[IN_FLIGHT - 1 :: IN_FLIGHT])]

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
    """Read evenly spread ranges of the files by the engine's own readers."""
    large, small = ranges(paths, PIECE_BYTES), ranges(paths, _SMALL_BYTES)
    if not large:
        return NO_FILE
    with ReadLoad(paths) as load:
        large_s = lasting(load.round_seconds(large, seconds * 0.7)) / IN_FLIGHT
        small_s = lasting(load.round_seconds(small, seconds / 8)) / IN_FLIGHT
        row_s = load.row_seconds(seconds / 8)
    large_bytes, small_bytes = _mean_bytes(large), _mean_bytes(small)
    # Two sizes give both terms of latency + bytes / rate; noise must not make the latency negative or absurd.
    slope = (large_s - small_s) / max(large_bytes - small_bytes, 1)
    latency_s = min(max(large_s - large_bytes * slope, 0.0), 0.05 * large_s)
    return DiskRates(Link(bytes_per_s=large_bytes / (large_s - latency_s), latency_s=latency_s), row_s)


def link_now(paths: Sequence[Path], known: Link, seconds: float) -> Link:
    """The link that was measured earlier, on the same disk, with its rate as it is now."""
    reads = ranges(paths, PIECE_BYTES)
    if not reads:
        return known
    with ReadLoad(paths, num_places=1) as load:

        def look(look_s: float) -> float:
            piece_s = lasting(load.round_seconds(reads, look_s)) / IN_FLIGHT
            return _mean_bytes(reads) / max(piece_s - known.latency_s, piece_s / 2)

        return known.model_copy(update={"bytes_per_s": rate_now(known.bytes_per_s, look, seconds)})


def rate_now(known: float, look: Callable[[float], float], seconds: float) -> float:
    """Bytes per second to expect, by what a look of so many seconds sees.

    A moment is off by more than the disk drifts: neither is believed alone (`likely_rate`), and where they disagree
    by more than both explain, a look of `_LONGER` times as long counts in its place: a fresh process may start slowly.
    """
    seen = look(seconds)
    if _is_far(log(seen / known), _NOISE):
        return likely_rate(known, look(_LONGER * seconds), _LESS_NOISE)
    return likely_rate(known, seen, _NOISE)


def likely_rate(known: float, seen: float, noise: float) -> float:
    """Bytes per second to expect of a disk that did `known` once, over seconds, and `seen` in a moment just now.

    The mean of both logarithms, weighed by their variances: of the moment `noise` squared, of the drift since _DRIFT
    squared, or, where the two are too far from each other for that, what their distance shows beyond the noise.
    """
    off = log(seen / known)
    drift = off**2 - noise**2 if _is_far(off, noise) else _DRIFT**2
    return known * exp(off * drift / (drift + noise**2))


def _is_far(off: float, noise: float) -> bool:
    return abs(off) > 2 * hypot(noise, _DRIFT)


def device_of(paths: Sequence[Path]) -> str:
    """The block devices that hold the files, as the kernel numbers them."""
    numbers = {path.stat().st_dev for path in paths}
    return " ".join(sorted(f"{os.major(number)}:{os.minor(number)}" for number in numbers))


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


def _mean_bytes(reads: Sequence[Read]) -> float:
    return fmean(read.nbytes for read in reads)
