"""What a server counts.  In: requests as they end, gauges to ask.  Out: Prometheus text, one line for people."""

from __future__ import annotations

import os
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE

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
            buckets=range(1, max(most_students, 1) + 1),
            registry=self.registry,
        )
        self.latency = Histogram(
            "zinfer_request_seconds",
            "Seconds of answered requests.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.waited = Histogram(
            "zinfer_queue_seconds", "Seconds that texts waited.", buckets=_SECONDS, registry=self.registry
        )
        gauges = {name: Gauge(name, what, registry=self.registry) for name, what in _GAUGES.items()}
        self._gauges = gauges

    def answered(self, what: Answered) -> None:
        """A request's texts were answered."""
        self.texts.inc(len(what.served))
        self.tokens.inc(what.tokens)
        self.deferred.inc(what.num_deferred)
        for one in what.served:
            self.students.observe(one.num_students)
            self.waited.observe(one.queue_s)

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
