"""What a server has done lately.  In: its counters.  Out: one line per so many seconds, none where nothing happened."""

from __future__ import annotations

import os
from typing import Any

from zinfer.serving.metrics import Meters
from zinfer.serving.service import Service


class Shift:
    """The counters as they were when the last line was written."""

    def __init__(self, meters: Meters, service: Service) -> None:
        self.meters, self.service = meters, service
        self._since_s: float | None = None
        self._before: dict[str, float] = {}

    def line(self, now_s: float) -> str:
        """The line if it is due, else nothing."""
        if self._since_s is None:
            self._since_s, self._before = now_s, self._counts()
        seconds = now_s - self._since_s
        if seconds < self.service.limits.access_s:
            return ""
        counts, before = self._counts(), self._before
        self._since_s, self._before = now_s, counts
        new = {name: value - before.get(name, 0.0) for name, value in counts.items()}
        said = [f"{round(new[name])}×{name}" for name in sorted(new) if name.isdecimal() and new[name]]
        if not said:
            return ""
        mean_ms = 1000 * new["seconds"] / new["answered"] if new["answered"] else 0.0
        stats = self.service.queue.stats()
        return (
            f"{seconds:.0f} s: requests by status: {', '.join(said)}; "
            f"mean {mean_ms:.1f} ms; {stats.queue_texts} texts wait; students {stats.num_students}"
        )

    def about(self) -> dict[str, Any]:
        """What a script wants to know of the server that is ready."""
        model = self.service.model
        return {"model": model.name, "students": model.num_students, "pid": os.getpid()}

    def _counts(self) -> dict[str, float]:
        found: dict[str, float] = {"seconds": 0.0, "answered": 0.0}
        for family in self.meters.registry.collect():
            for sample in family.samples:
                if sample.name == "zinfer_requests_total":
                    status = sample.labels["status"]
                    found[status] = found.get(status, 0.0) + sample.value
                elif sample.name == "zinfer_request_seconds_sum":
                    found["seconds"] = sample.value
                elif sample.name == "zinfer_request_seconds_count":
                    found["answered"] = sample.value
        return found
