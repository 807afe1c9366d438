"""A few threads that compute side by side.  In: functions.  Out: their results, in order; one core each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


class Lanes:
    """Threads that share no product among cores, so that they do not wait for each other.  Owns them until `close`."""

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, "zinfer-student", initializer=_alone)
        # All threads begin now: what they set also holds for threads that begin later, and is set back here.
        num_threads = torch.get_num_threads()
        together = threading.Barrier(count)
        for begun in [self._pool.submit(together.wait) for _ in range(count)]:
            begun.result()
        torch.set_num_threads(num_threads)

    def run(self, functions: Sequence[Callable[[], T]]) -> list[T]:
        """Call all of them; the first exception is raised when all have ended."""
        futures = [self._pool.submit(function) for function in functions]
        for future in futures:
            future.exception()
        return [future.result() for future in futures]

    def close(self) -> None:
        """End the threads; may be called again."""
        self._pool.shutdown()


def _alone() -> None:
    """One core for this thread; gradients are off here as they are with the caller."""
    torch.get_num_threads()  # torch takes the process's number on first use: this is it
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
