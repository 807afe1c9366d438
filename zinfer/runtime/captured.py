"""A function of tensors, recorded once and replayed.  In: the function, an input of the only shape it will see.

A CUDA graph: one launch in place of hundreds, over addresses that never change.  Without a device it is called anew
each time, on the same fixed input: the slow twin.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]
_WARM_UPS = 3  # before recording: libraries choose kernels and take workspaces on first use


class SharedPool:
    """Memory for what graphs of one device compute, and the turn that they take.

    A graph's outputs may lie where another one's intermediates do, so each is copied out before the next replays;
    whoever calls does so on the device's current stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.turn = device, threading.Lock()
        self.handle: Any = torch.cuda.graph_pool_handle() if device.type == "cuda" else None


class Captured:
    """`run(x)` for x of one shape and dtype, without gradients; it may ask nothing of the device while it runs.

    Keeps its input and its outputs at fixed addresses.  Calls from several threads take turns with all that share the
    pool, and each gets copies of its own.
    """

    def __init__(self, run: Callable[[Tensor], Outputs], example: Tensor, pool: SharedPool) -> None:
        self._run, self._input, self._pool = run, example.clone(), pool
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: Outputs = ()
        if example.device.type == "cuda":
            with pool.turn:
                self._capture()

    def __call__(self, x: Tensor) -> Outputs:
        """What `run(x)` gives, on the device; x may lie in host memory."""
        with self._pool.turn, torch.no_grad():
            self._input.copy_(x)
            if self._graph is None:
                return self._run(self._input)
            self._graph.replay()
            return tuple(output.clone() for output in self._outputs)

    def _capture(self) -> None:
        device = self._input.device
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._run(self._input)
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may copy and compute meanwhile: only this one's calls belong to the graph.
        with (
            torch.no_grad(),
            torch.cuda.device(device),
            torch.cuda.graph(self._graph, pool=self._pool.handle, capture_error_mode="thread_local"),
        ):
            self._outputs = self._run(self._input)
