"""The practical 100 % line: the plainest streamer that a person would write by hand, on the same shapes.

One page-locked slab with all layers, two buffers on the device, one copy stream, an event per layer, wrapping round
from the last layer to the first.  One row goes through every matrix.  The answer is compared with that of the same
layers computed from where they lie.
"""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from clock import Timer, layer_shapes, pinned
from setting import Bench, block
from torch import Tensor


def views(place: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    """The matrices of a layer where its bytes lie."""
    found, at = [], 0
    for rows, width in shapes:
        found.append(place[at : at + 2 * rows * width].view(torch.bfloat16).view(rows, width))
        at += 2 * rows * width
    return found


def forward(x: Tensor, weights: list[Tensor]) -> Tensor:
    """One row through four products: enough to read every weight once."""
    qkv, out, up, down = weights
    x = torch.mm(torch.mm(x, qkv.t())[:, : out.shape[1]], out.t())
    return torch.nn.functional.normalize(
        torch.mm(torch.mm(x, up.t())[:, : down.shape[1]], down.t()).float()
    ).to(x)


class Streamer:
    """Two buffers, filled in turn."""

    def __init__(self, timer: Timer, slab: Tensor, layers: int, shapes: list[tuple[int, int]]) -> None:
        self.timer, self.slab, self.layers, self.shapes = timer, slab, layers, shapes
        self.layer_bytes = len(slab) // layers
        self.buffers = [
            torch.empty(self.layer_bytes, dtype=torch.uint8, device=timer.device) for _ in range(2)
        ]
        self.stream = torch.cuda.Stream() if timer.is_cuda else None
        self.arrived: list[Any] = [None, None]
        self.read: list[Any] = [None, None]
        self.next = 0

    def fetch(self) -> None:
        """Begin the next layer's copy, behind the last reader of its buffer."""
        at, layer = self.next % 2, self.next % self.layers
        self.next += 1
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            if self.read[at] is not None:
                self.stream.wait_event(self.read[at])
            source = self.slab[layer * self.layer_bytes : (layer + 1) * self.layer_bytes]
            self.buffers[at].copy_(source, non_blocking=True)
            self.arrived[at] = self.stream.record_event() if self.stream else None

    def one_pass(self, x: Tensor) -> Tensor:
        """All layers; the first ones are on their way already."""
        for _ in range(self.layers):
            at = self.next % 2  # the older of the two
            if self.stream:
                torch.cuda.current_stream().wait_event(self.arrived[at])
            x = forward(x, views(self.buffers[at], self.shapes))
            self.read[at] = torch.cuda.current_stream().record_event() if self.stream else None
            self.fetch()
        return x


def run(bench: Bench) -> None:
    """Measure, check, write."""
    timer, shapes = Timer(bench.torch_device, bench.size.repeats), layer_shapes(bench)
    layers = 4 if bench.is_dry else bench.options.layers or 32
    layer_bytes = sum(2 * rows * width for rows, width in shapes)
    x = torch.randn(1, shapes[0][1], dtype=torch.bfloat16, device=timer.device)
    with pinned(layers * layer_bytes, timer.is_cuda) as slab:
        noise = torch.randn(layer_bytes // 2).div_(shapes[0][1] ** 0.5).bfloat16().view(torch.uint8)
        for layer in range(layers):
            slab[layer * layer_bytes : (layer + 1) * layer_bytes] = noise.roll(2 * layer)
        streamer, seconds = Streamer(timer, slab, layers, shapes), []
        streamer.fetch(), streamer.fetch()
        for number in range(4 if bench.is_dry else 12):
            start = time.perf_counter()
            answer = streamer.one_pass(x)
            answer.sum().item()  # the answer is what a pass is waited for
            if number >= 2:
                seconds.append(time.perf_counter() - start)
        wanted = x
        for layer in range(layers):
            wanted = forward(
                wanted, views(slab[layer * layer_bytes :][:layer_bytes].to(timer.device), shapes)
            )
        timer.wait()
    bench.record(
        {"pass_s": median(seconds), "bytes_per_s": layers * layer_bytes / median(seconds)},
        [{"pass_s": seconds}],
        is_right=bool(torch.equal(answer, wanted)),
        config={"layers": layers, "layer_bytes": layer_bytes},
    )


main = block(__doc__, "streamer", run, 180)

if __name__ == "__main__":
    sys.exit(main())
