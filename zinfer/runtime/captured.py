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


class Captured:
    """`run(x)` for x of one shape and dtype, without gradients; it may ask nothing of the device while it runs.

    Keeps its input and its outputs at fixed addresses; `pool` is memory that graphs which never run at once share.
    Calls from several threads take turns, and each gets copies of its own, ordered on the device's current stream.
    """

    def __init__(self, run: Callable[[Tensor], Outputs], example: Tensor, pool: Any = None) -> None:
        self._run, self._input = run, example.clone()
        self._turn = threading.Lock()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: Outputs = ()
        if example.device.type == "cuda":
            self._capture(pool)

    def __call__(self, x: Tensor) -> Outputs:
        """What `run(x)` gives, on the device; x may lie in host memory."""
        with self._turn, torch.no_grad():
            self._input.copy_(x)
            if self._graph is None:
                return self._run(self._input)
            self._graph.replay()
            return tuple(output.clone() for output in self._outputs)

    def _capture(self, pool: Any) -> None:
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
            torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"),
        ):
            self._outputs = self._run(self._input)


def shared_pool(device: torch.device) -> Any:
    """Memory for graphs of one device that never run at once; None where there is nothing to record."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None
