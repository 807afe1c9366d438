"""What a server counts.  In: requests as they end, gauges to ask.  Out: Prometheus text, one line for people."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import Counter as Counted
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.registry import Collector

from zinfer.serving.answers import Answered
from zinfer.students.scheduler import SchedulerStats

__all__ = ["CONTENT_TYPE", "Meters", "resident_bytes"]
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_GAUGES = {
    "zinfer_queue_texts": "Texts that wait.",
    "zinfer_queue_tokens": "Their tokens.",
    "zinfer_in_flight": "Requests that are being handled.",
    "zinfer_busy_share": "Share of the last 30 s in which passes ran.",
    "zinfer_students_now": "Students that the next pass would use.",
    "zinfer_cancelled_texts": "Texts that were taken out of the queue, clients having left.",
    "process_resident_memory_bytes": "Resident memory.",
}
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Histogram(Collector):
    """A histogram that takes many equal observations at once.  Used from one thread, so it needs no lock."""

    def __init__(self, name: str, what: str, bounds: Sequence[float], registry: CollectorRegistry) -> None:
        self.name, self.what, self.bounds = name, what, tuple(map(float, bounds))
        self.counts, self.total = [0] * (len(self.bounds) + 1), 0.0
        registry.register(self)

    def observe(self, value: float, times: int = 1) -> None:
        """`value` came so many times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """As Prometheus has it: how many were at most each bound."""
        names = [*map(str, self.bounds), "+Inf"]
        buckets = list(zip(names, accumulate(self.counts), strict=True))
        yield HistogramMetricFamily(self.name, self.what, buckets=buckets, sum_value=self.total)


class Meters:
    """Counters of one server, in a registry of its own.  Used from the event loop's thread."""

    def __init__(self, most_students: int) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "zinfer_requests", "Requests that ended.", ["path", "status"], registry=self.registry
        )
        self.rejected = Counter(
            "zinfer_rejected", "Requests refused for load.", ["reason"], registry=self.registry
        )
        self.disconnects = Counter(
            "zinfer_disconnects", "Clients that left before their answer.", registry=self.registry
        )
        self.texts = Counter("zinfer_texts", "Texts answered.", registry=self.registry)
        self.tokens = Counter(
            "zinfer_tokens", "Tokens of texts answered, special ones included.", registry=self.registry
        )
        self.deferred = Counter("zinfer_deferred", "Texts that the teacher answered.", registry=self.registry)
        self.students = Histogram(
            "zinfer_students",
            "Students behind each text's answer.",
            range(1, max(most_students, 1) + 1),
            self.registry,
        )
        self.latency = Histogram(
            "zinfer_request_seconds", "Seconds of answered requests.", _SECONDS, self.registry
        )
        self.waited = Histogram("zinfer_queue_seconds", "Seconds that texts waited.", _SECONDS, self.registry)
        gauges = {name: Gauge(name, what, registry=self.registry) for name, what in _GAUGES.items()}
        self._gauges = gauges

    def answered(self, what: Answered) -> None:
        """A request's texts were answered."""
        self.texts.inc(len(what.served))
        self.tokens.inc(what.tokens)
        self.deferred.inc(what.num_deferred)
        same = Counted(
            (one.num_students, one.queue_s) for one in what.served
        )  # of a pass: they came together
        for (num_students, queue_s), times in same.items():
            self.students.observe(num_students, times)
            self.waited.observe(queue_s, times)

    def asked(self, stats: SchedulerStats, in_flight: int) -> None:
        """Take down what is true at this moment, for the `text` that follows."""
        now = {
            "zinfer_queue_texts": stats.queue_texts,
            "zinfer_queue_tokens": stats.queue_tokens,
            "zinfer_in_flight": in_flight,
            "zinfer_busy_share": stats.busy_share,
            "zinfer_students_now": stats.num_students,
            "zinfer_cancelled_texts": stats.cancelled,
            "process_resident_memory_bytes": resident_bytes(),
        }
        for name, value in now.items():
            self._gauges[name].set(value)

    def text(self) -> bytes:
        """Everything in the text format 0.0.4."""
        return generate_latest(self.registry)


def resident_bytes() -> float:
    """Resident memory of this process, bytes."""
    return float(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
