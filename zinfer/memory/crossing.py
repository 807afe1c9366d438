"""What crosses a CUDA device's link beside weights.  In: activations, rows.  Out: copies ordered by events alone."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from zinfer.memory.links import LinkLog, Movement
from zinfer.memory.parking import Parking


@dataclass(frozen=True, slots=True)
class _Leaving:
    """A device tensor that is being copied down; it must live until computation stands behind the copy."""

    x: Tensor
    end: torch.cuda.Event
    turn: int


class Crossing:
    """A stream up and a stream down, both beside the one for weights, whose copies would go first.

    Memory that a copy up fills, and a copy down reads, belongs to the computation's stream in torch's allocator: it
    hands such memory out again as soon as nobody refers to it, in the order of that stream.  So a copy up waits for a
    mark behind what was issued before; and a tensor that goes down is referred to here until the computation's stream
    has been told to wait for the copy, which is put off until the next one parks: by then it has ended.
    """

    def __init__(self, device: torch.device, log: LinkLog, parking_bytes: int = 0) -> None:
        self.device = device
        self.parking = Parking(parking_bytes)
        self._log = log
        self._up = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._down = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        for stream in (self._up, self._down):
            stream.wait_stream(torch.cuda.current_stream(device))
        self._leaving: deque[_Leaving] = deque()
        self._ends: dict[int, torch.cuda.Event] = {}  # of copies down, by address of the parked tensor
        self._turn = 0
        self._retirer = ThreadPoolExecutor(1, "zinfer-crossing")

    def to_device(self, x: Tensor) -> Tensor:
        """A copy on the device for what is computed next.  From pageable memory the caller waits for the copy."""
        target = torch.empty_like(x, device=self.device, memory_format=torch.contiguous_format)
        compute = torch.cuda.current_stream(self.device)
        self._up.wait_event(_mark(compute))
        if x.data_ptr() in self._ends:
            self._up.wait_event(self._ends[x.data_ptr()])
        end = self._copy("h2d", self._up, target, x.contiguous())
        compute.wait_event(end)
        return target

    def to_host(self, x: Tensor) -> Tensor:
        """A copy that the host may read when this returns: it waits for the computation that led to `x`."""
        source = x.contiguous()
        self._down.wait_event(_mark(torch.cuda.current_stream(self.device)))
        target = torch.empty(x.shape, dtype=x.dtype)
        self._copy("d2h", self._down, target, source).synchronize()
        return target

    def park(self, x: Tensor) -> Tensor:
        """A copy in host memory for `unpark` alone: it may not be there yet, and nobody waits."""
        self._let_go(self._turn)
        source, target = x.contiguous(), self.parking.take(x)
        self._down.wait_event(_mark(torch.cuda.current_stream(self.device)))
        end = self._copy("d2h", self._down, target, source)
        self._ends[target.data_ptr()] = end
        self._leaving.append(_Leaving(source, end, self._turn))
        return target

    def unpark(self, x: Tensor) -> Tensor:
        """The way back; the place of `x` is free for the next one that parks."""
        self._turn += 1
        target = self.to_device(x)
        self._ends.pop(x.data_ptr(), None)
        self._down.wait_event(_mark(self._up))
        self.parking.give_back(x)
        return target

    def forget(self) -> None:
        """Nobody will come for what is parked."""
        self._let_go(self._turn + 1)
        self._ends.clear()
        self.parking.clear()

    def close(self) -> None:
        """End the worker, and with it the last copy; then give the memory back."""
        self._retirer.shutdown()
        self._leaving.clear()
        self._ends.clear()
        self.parking.close()

    def _let_go(self, turn: int) -> None:
        compute = torch.cuda.current_stream(self.device)
        while self._leaving and self._leaving[0].turn < turn:
            compute.wait_event(self._leaving.popleft().end)

    def _copy(self, link: str, stream: torch.cuda.Stream, target: Tensor, source: Tensor) -> torch.cuda.Event:
        begin = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            begin.record(stream)
            target.copy_(source, non_blocking=True)
            end.record(stream)
        self._log.count(link, source.nbytes)
        self._retirer.submit(self._retire, link, source.nbytes, begin, end)
        return end

    def _retire(self, link: str, nbytes: int, begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
        end.synchronize()
        end_s, seconds = time.perf_counter(), begin.elapsed_time(end) / 1e3
        self._log.add(Movement(link, None, nbytes, end_s - seconds, end_s), is_counted=True)


def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
