"""Timing on a device, or on a CPU in its stead.  In: what to run.  Out: seconds, once it has really ended."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from setting import ROOT, TINY, Bench
from torch import Tensor

WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Timer:
    """Median seconds of `repeats` runs, each waited for; two runs before them do not count."""

    device: str
    repeats: int

    @property
    def is_cuda(self) -> bool:
        """Whether there is a device to wait for."""
        return self.device.startswith("cuda")

    def wait(self) -> None:
        """Until everything that was asked of the device has ended."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def median(self, run: Callable[[], object]) -> float:
        """Seconds of one run."""
        times = []
        for number in range(WARM_UP + self.repeats):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            if number >= WARM_UP:
                times.append(time.perf_counter() - start)
        return median(times)

    def side_by_side(
        self, copy: Callable[[], object], work: Callable[[], object], work_s: float
    ) -> tuple[float, float]:
        """Seconds of one copy while work never ends, and of one piece of work while copies never end."""
        if not self.is_cuda:
            return self.median(copy), self.median(work)
        up, compute = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
        alone_s = self.median(copy)
        ends = {}
        self.wait()
        for stream, what, count in (
            (compute, work, max(round(0.4 / work_s), 4)),
            (up, copy, max(round(0.4 / alone_s), 4)),
        ):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            with torch.cuda.stream(stream):
                begin.record(stream)
                for _ in range(count):
                    what()
                end.record(stream)
            ends[stream] = (begin, end, count)
        self.wait()
        seconds = [begin.elapsed_time(end) / 1e3 / count for begin, end, count in ends.values()]
        return seconds[1], seconds[0]


@contextmanager
def pinned(nbytes: int, is_pinned: bool) -> Iterator[Tensor]:
    """Host memory, touched, page-locked as it is (no rounding to powers of two) where that is wanted."""
    host = torch.zeros(nbytes, dtype=torch.uint8)
    runtime = torch.cuda.cudart() if is_pinned else None
    if runtime is not None and int(runtime.cudaHostRegister(host.data_ptr(), nbytes, 1)):
        raise RuntimeError(f"{nbytes} bytes cannot be page-locked")
    try:
        yield host
    finally:
        if runtime is not None:
            runtime.cudaHostUnregister(host.data_ptr())


def layer_shapes(bench: Bench) -> list[tuple[int, int]]:
    """[out, in] of a layer's matrices, as the engine cuts them: q, k and v together, gate and up together."""
    text = (ROOT / f"configs/shapes/{bench.options.shape}.json").read_text()
    config = TINY if bench.is_dry else json.loads(text)
    width, inner = config["hidden_size"], config["intermediate_size"]
    head = width // config["num_attention_heads"]
    qkv = width + 2 * config["num_key_value_heads"] * head
    return [(qkv, width), (width, width), (2 * inner, width), (width, inner)]


def matrices(bench: Bench, device: str) -> list[Tensor]:
    """One layer's, random."""
    return [
        torch.randn(shape, dtype=torch.bfloat16, device=device) / shape[1] ** 0.5
        for shape in layer_shapes(bench)
    ]
