"""What every mover of bytes shares: tickets, the log of the links, and a clock that slows a link down."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from zinfer.chunks.table import Chunk
from zinfer.config.machine import Link
from zinfer.errors import MachineError


def started_pool(num_threads: int, name: str, enter: Callable[[], None] | None = None) -> ThreadPoolExecutor:
    """A pool whose threads run already; `enter` is what each does first.

    Starting one maps its stack, which waits for every page fault of the process that is under way: in the first pass,
    while weights land in fresh memory, tens of milliseconds each.
    """
    pool = ThreadPoolExecutor(num_threads, name, initializer=enter)
    gate = threading.Barrier(num_threads + 1)
    for _ in range(num_threads):
        pool.submit(gate.wait)
    gate.wait()
    return pool


class Ticket:
    """A transfer in flight.  Landed exactly once, by whichever thread finishes it; waited for by any."""

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self.error: BaseException | None = None
        self.is_cancelled = False
        self.arrival: Any = None  # the device's own mark of readiness, if it has one
        self._begin_s = self._end_s = time.perf_counter()
        self._landed = threading.Event()

    @property
    def done(self) -> bool:
        """Whether it has landed, with or without an error."""
        return self._landed.is_set()

    @property
    def seconds(self) -> float:
        """From begin to landing; until then, so far."""
        return (self._end_s if self.done else time.perf_counter()) - self._begin_s

    def cancel(self) -> None:
        """What has not begun will not; the ticket still lands."""
        self.is_cancelled = True

    def refuse_if_cancelled(self) -> None:
        """Raises MachineError ZI-5301 when nobody wants the bytes any more."""
        if self.is_cancelled:
            raise MachineError(
                "ZI-5301", f"the fetch of chunk {self.chunk.id} was cancelled", remedy="run it again"
            )

    def land(self, error: BaseException | None = None) -> None:
        """The bytes are there, or will not be.

        The error is kept without the frames that it came through: they refer to the trip, the trip to its place and
        to this ticket, and a closed engine's memory would be held until the collector finds that ring.
        """
        self.error = None if error is None else error.with_traceback(None)
        self._end_s = time.perf_counter()
        self._landed.set()

    def join(self) -> None:
        """Block until landed, whatever became of it."""
        self._landed.wait()

    def wait(self) -> None:
        """Block until landed.  Raises what went wrong."""
        self.join()
        if self.error is not None:
            raise self.error


@dataclass(frozen=True, slots=True)
class Movement:
    """One stretch of one link's work, perf_counter seconds; chunk None: embedding rows."""

    link: str
    chunk: int | None
    nbytes: int
    begin_s: float
    end_s: float


class LinkLog:
    """Bytes per link, and the latest movements; written by the workers, read by anyone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes: Counter[str] = Counter()
        self._movements: deque[Movement] = deque(maxlen=65536)

    def add(self, movement: Movement, *, is_counted: bool = False) -> None:
        """Count it, unless its bytes are counted already."""
        if not is_counted:
            self.count(movement.link, movement.nbytes)
        with self._lock:
            self._movements.append(movement)

    def count(self, link: str, nbytes: int) -> None:
        """Bytes whose movement is told when it has ended."""
        with self._lock:
            self._bytes[link] += nbytes

    @property
    def num_bytes(self) -> dict[str, int]:
        """Link -> bytes so far."""
        with self._lock:
            return dict(self._bytes)

    def drain(self) -> list[Movement]:
        """The movements since the last call, at most 65536."""
        with self._lock:
            movements = list(self._movements)
            self._movements.clear()
            return movements


class Pace:
    """A link's clock, to slow a fast one down to a machine's rate: transfers queue, their latencies overlap."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._free_s = 0.0
        self._lock = threading.Lock()

    def reserve(self, nbytes: int, begin_s: float | None = None) -> float:
        """When a transfer of `nbytes` that is issued now, or can begin at `begin_s`, would end."""
        begin_s = time.perf_counter() if begin_s is None else begin_s
        with self._lock:
            self._free_s = max(self._free_s, begin_s) + nbytes / self._link.bytes_per_s
            return self._free_s + self._link.latency_s


def sleep_until(due_s: float) -> None:
    """Wait for a moment of perf_counter's clock."""
    remaining_s = due_s - time.perf_counter()
    if remaining_s > 0:
        time.sleep(remaining_s)
