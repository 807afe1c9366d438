"""Products that do not spin while weights are read.  In: readers that come and go.  Out: idle cores for them.

The threads of a product wait for each other at its end by spinning, milliseconds long where one has lost its core to a
reader, and a core that spins finds no pages and takes no interrupts of the disk.  libgomp spins a hundred rounds
instead once there are more threads in teams than cores (`gomp_throttled_spin_count_var`; docs of GOMP_SPINCOUNT): a
team that does nothing makes it so, and its end undoes it.  No sum is added in another order.
"""

from __future__ import annotations

import threading
import time

import torch

_FEW_CORES = 8  # on more, what readers take is little and waking a team takes longer
_LINGER_S = 0.05  # after the last read: longer than a chunk takes, short beside a small model's answer
_PAUSES = 1.5  # so many times as long without a read: steps so large are worth a new team, and others wait for no reads
_ELEMENTS = 2**20  # of a sum that is shared among threads


class Crowd:
    """An idle team of threads beside the team of the products, from `enter` until nothing has been read for a while.

    Where reads follow each other in somewhat larger steps, as in passes that products bind, it stays for twice the last
    step: a team that ends and begins again with every chunk costs more than it spares.  A load's last steps may be half
    a second, and what decodes after it wants its threads to spin.

    Every `hold` is ended by `let_go`; the last one ends the threads.  Used from any thread; for all readers of the
    process there is one.
    """

    def __init__(self, linger_s: float = _LINGER_S) -> None:
        self._linger_s = self._stay_s = linger_s
        self._lock = threading.Lock()
        self._holders = 0
        self._read_s = 0.0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def is_there(self) -> bool:
        """Whether there is such a team."""
        with self._lock:
            return self._thread is not None

    @property
    def stay_s(self) -> float:
        """How long it stays after the last read so far."""
        return self._stay_s

    def hold(self) -> None:
        """There is a reader from now on."""
        with self._lock:
            self._holders += 1

    def let_go(self) -> None:
        """It has ended."""
        with self._lock:
            self._holders -= 1
            thread = None if self._holders else self._thread
            if thread is not None:
                self._ended.set()
        if thread is not None:
            thread.join()

    def enter(self) -> None:
        """Something is read from now on, or soon; never blocks."""
        now_s = time.monotonic()
        pause_s, self._read_s = now_s - self._read_s, now_s
        is_stream = pause_s < _PAUSES * self._linger_s
        self._stay_s = max(self._linger_s, 2 * pause_s if is_stream else 0.0)
        thread = self._thread
        if thread is not None or not _has_few_cores():
            return
        with self._lock:
            if self._thread is None and self._holders:
                self._ended.clear()
                self._thread = threading.Thread(target=self._stay, name="zinfer-crowd", daemon=True)
                self._thread.start()

    def _stay(self) -> None:
        """A sum makes this thread's team; it lasts as long as the thread."""
        torch.ones(_ELEMENTS).sum()
        while not self._ended.wait(self._stay_s):
            with self._lock:
                if time.monotonic() - self._read_s >= self._stay_s:
                    break
        with self._lock:
            self._thread = None


def _has_few_cores() -> bool:
    """Whether readers and products want the same cores, and torch's threads are of a kind that spins."""
    has_openmp: bool = torch.backends.openmp.is_available()  # type: ignore[no-untyped-call]
    return has_openmp and 1 < torch.get_num_threads() <= _FEW_CORES


CROWD = Crowd()
