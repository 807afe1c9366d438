"""Record what each engine and link did when.  In: spans.  Out: a Chrome/Perfetto trace file, a lane per engine."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zinfer.whole import written_whole


@dataclass(frozen=True, slots=True)
class Span:
    """One stretch of work; seconds on the perf_counter clock."""

    lane: str
    name: str
    begin_s: float
    end_s: float


_UNTIMED = nullcontext()  # one for all: a pass opens hundreds


class Recorder:
    """Collects spans.  The default one keeps nothing: a measured run differs in the recorder, not in the loop."""

    is_recording = False

    def span(self, _lane: str, _name: str) -> AbstractContextManager[None]:
        """Time the body on `lane`."""
        return _UNTIMED

    def add(self, spans: Iterable[Span]) -> None:
        """Take spans that were timed elsewhere (a link's worker)."""


class TraceRecorder(Recorder):
    """Keeps every span; safe to call from several threads."""

    is_recording = True

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.spans: list[Span] = []

    @contextmanager
    def span(self, lane: str, name: str) -> Iterator[None]:
        """Time the body on `lane`."""
        begin_s = time.perf_counter()
        try:
            yield
        finally:
            self.add([Span(lane, name, begin_s, time.perf_counter())])

    def add(self, spans: Iterable[Span]) -> None:
        """Take spans that were timed elsewhere."""
        with self._lock:
            self.spans.extend(spans)

    def save(self, path: Path) -> None:
        """Write Chrome's trace event format (microseconds; one thread id per lane).  Raises MachineError ZI-5931."""
        start_s = min((span.begin_s for span in self.spans), default=0.0)
        lanes = {lane: i for i, lane in enumerate(sorted({span.lane for span in self.spans}))}
        events: list[dict[str, Any]] = [
            {"ph": "M", "pid": 0, "tid": tid, "name": "thread_name", "args": {"name": lane}}
            for lane, tid in lanes.items()
        ]
        events += [
            {
                "ph": "X",
                "pid": 0,
                "tid": lanes[span.lane],
                "name": span.name,
                "ts": round((span.begin_s - start_s) * 1e6, 1),
                "dur": round((span.end_s - span.begin_s) * 1e6, 1),
            }
            for span in sorted(self.spans, key=lambda span: span.begin_s)
        ]
        with written_whole(path) as file:
            file.write(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode())
