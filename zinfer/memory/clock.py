"""How long computation took, by kind of work.  In: laps.  Out: seconds per kind, without waiting for anything."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Protocol

import torch


class Clock(Protocol):
    """Laps of one pass: `start` marks a beginning, `lap` books what came since the last mark."""

    def start(self) -> None: ...

    def lap(self, kind: str) -> None: ...

    def read(self) -> dict[str, float]:
        """Seconds by kind since the last read; of what the device has not yet done, nothing.  Starts anew."""
        ...


class HostClock:
    """Where computation is over when it returns."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._mark_s = 0.0

    def start(self) -> None:
        """Begin here."""
        self._mark_s = time.perf_counter()

    def lap(self, kind: str) -> None:
        """Book the time since the last mark."""
        now_s = time.perf_counter()
        self._seconds[kind] += now_s - self._mark_s
        self._mark_s = now_s

    def read(self) -> dict[str, float]:
        """Everything booked."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds


class CudaClock:
    """Events in the computation's own stream, made once and recorded anew in every pass.

    They are read when the pass's results are on the host: by then the device has passed all of them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []
        self._kinds: list[str | None] = []  # of the stretch that ends at each event; None: begins one

    def start(self) -> None:
        """Begin here."""
        self._record(None)

    def lap(self, kind: str) -> None:
        """Book the time since the last mark."""
        self._record(kind)

    def read(self) -> dict[str, float]:
        """Everything booked, if the last of it has been done; else nothing."""
        seconds: defaultdict[str, float] = defaultdict(float)
        count = len(self._kinds)
        if count and self._events[count - 1].query():  # type: ignore[no-untyped-call]
            for at, kind in enumerate(self._kinds):
                if kind is not None and at:
                    seconds[kind] += self._events[at - 1].elapsed_time(self._events[at]) / 1e3
        self._kinds.clear()
        return dict(seconds)

    def _record(self, kind: str | None) -> None:
        if len(self._kinds) == len(self._events):
            self._events.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        self._events[len(self._kinds)].record(torch.cuda.current_stream(self._device))
        self._kinds.append(kind)
