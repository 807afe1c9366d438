"""Measure the links of memory.  In: a device.  Out: rates of copies within host memory, and to a device and back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import torch

from zinfer.config.machine import Link
from zinfer.memory.slab import HostSlab
from zinfer.units import GIB, MIB

_COPY_LATENCY_S = 1e-5
_STALL = 4  # times the median: a round that somebody else held up
_OWN_SPEEDS = 1.5  # between a machine's own two speeds; what took longer was somebody else's doing


@dataclass(frozen=True, slots=True)
class CopyRates:
    """Links between page-locked host memory and a device, and how much could be page-locked (None: no limit met)."""

    h2d: Link
    d2h: Link
    pinnable_bytes: int | None


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


def typical_seconds(run: Callable[[], object], seconds: float = 0.05) -> float:
    """`typical` of as many runs as begin within `seconds`, at least one."""
    return typical(_timed(run, seconds))


def lasting_seconds(run: Callable[[], object], seconds: float) -> float:
    """`lasting` of likewise many."""
    return lasting(_timed(run, seconds))


def _timed(run: Callable[[], object], seconds: float) -> list[float]:
    times: list[float] = []
    begin_s = now_s = time.perf_counter()
    while now_s - begin_s < seconds or not times:
        before_s = now_s
        run()
        now_s = time.perf_counter()
        times.append(now_s - before_s)
    return times


def lasting(times: Sequence[float]) -> float:
    """The mean of all rounds but stalls: a pass meets the slow ones as well, which `typical` leaves out."""
    most = _STALL * median(times)
    return fmean(seconds for seconds in times if seconds <= most)


def typical(times: Sequence[float]) -> float:
    """The mean of those that took at most half as long again as the lowest decile.

    What other processes take away comes and goes, and is left out; but a machine may have two speeds of its own that
    change within seconds (a clock, another guest's thread on the same core), and a pass meets both.
    """
    usual = _OWN_SPEEDS * sorted(times)[len(times) // 10]
    return fmean(seconds for seconds in times if seconds <= usual)


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
