"""What passes of a planned batch take.  In: a simulated pass, a curve.  Out: seconds by rows, and how many suit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from zinfer.config.machine import Overlap
from zinfer.plan.curve import Curve
from zinfer.plan.queue import QueueRun, run_queue
from zinfer.plan.records import Workload
from zinfer.plan.shares import DISK, link_seconds
from zinfer.plan.simulate import PassRun

_WORTH = 0.98  # fuller passes keep decoding sequences waiting: they must make the job this much shorter
_FILLS = (1, 2, 4, 8)  # times T*, then as many rows as a pass may carry


@dataclass(frozen=True, slots=True)
class PassSeconds:
    """Seconds of a steady pass by its rows, on the pattern of a simulated pass in which `batch` sequences decode.

    `stream_s` is what the busiest link takes by itself; where it is the disk and the processor computes, both slow
    each other by `overlap`.
    """

    curve: Curve
    stream_s: float
    overlap: Overlap
    steady_s: float
    batch: int

    @classmethod
    def of(cls, steady: PassRun, curve: Curve, overlap: Overlap, batch: int) -> PassSeconds:
        """From a simulated decode pass of `batch` sequences."""
        alone = steady.busy_s | {DISK: steady.busy_s.get(DISK, 0.0) / steady.disk_slowdown}
        return cls(curve, link_seconds(alone), overlap, steady.seconds, batch)

    def __call__(self, rows: int) -> float:
        """The simulated pass, stretched where more rows make computation bind."""
        return self.steady_s * self._longer_s(rows) / max(self._longer_s(self.batch), 1e-12)

    def _longer_s(self, rows: int) -> float:
        return max(self.overlap.at_once(self.stream_s, self.curve.at(rows)))


def best_fill(
    workload: Workload, token_rows: int, pass_s: PassSeconds, objective: str
) -> tuple[int, QueueRun]:
    """How many rows a pass of this job should carry, and how the queue then goes.

    Up to T* (`token_rows`) rows are free.  A job with an end may still be shorter with fuller passes: every pass
    reads all weights from memory whatever it carries, and so many fewer of them compute and read at once.
    """
    best, run = 0, None
    for rows in _fills(workload, token_rows):
        tried = run_queue(workload, rows, pass_s)
        if run is None or _cost(tried, objective) < _WORTH * _cost(run, objective):
            best, run = rows, tried
    assert run is not None, "a pass carries at least T* rows"
    return best, run


def _fills(workload: Workload, token_rows: int) -> Iterator[int]:
    most = max(workload.prefill_rows, token_rows)
    if workload.logit_rows and workload.logit_share:  # no pass scores more than that
        most = min(most, max(int(workload.logit_rows / workload.logit_share), workload.batch))
    if workload.num_requests is None or workload.is_whole:
        yield min(token_rows, most)
        return
    yield from sorted({min(token_rows * fill, most) for fill in _FILLS} | {most})


def _cost(run: QueueRun, objective: str) -> float:
    return run.mean_finish_s if objective == "latency" else run.seconds
