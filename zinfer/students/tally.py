"""What a scheduler has done.  In: passes as they end.  Out: counts, and percentiles over a window."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field

WINDOW_S = 30.0
MOST = 8192  # answers in the window


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Counts since the start; percentiles (None before the first answer) and `busy_share` over the last 30 s.

    `answers` is by number of students; a text that a teacher answered is counted under the students that deferred it,
    and in `deferred`.  `rows` are token rows computed: the sum of the texts' lengths, since nothing is padded.
    """

    queue_texts: int
    queue_tokens: int
    num_students: int  # of the next pass, as things stand
    answers: dict[int, int]
    passes: int
    rows: int
    failed: int
    cancelled: int
    rejected: int
    deferred: int
    kept: int  # of the students, though a teacher was wanted: it failed or had no room
    busy_share: float
    queue_p50_s: float | None
    queue_p99_s: float | None
    service_p50_s: float | None
    service_p99_s: float | None


def percentile(values: Sequence[float], share: float) -> float | None:
    """The nearest-rank percentile: the smallest value that at least `share` of all do not exceed."""
    if not values:
        return None
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


@dataclass(slots=True)
class Tally:
    """Written under the scheduler's lock, read from a copy."""

    workers: int
    clock: Callable[[], float]
    answers: Counter[int] = field(default_factory=Counter)
    passes: int = 0
    rows: int = 0
    failed: int = 0
    cancelled: int = 0
    deferred: int = 0
    kept: int = 0
    _recent: deque[tuple[float, float, float]] = field(default_factory=lambda: deque(maxlen=MOST))
    _spans: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=MOST))
    _begin_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._begin_s = self.clock()

    def add(
        self,
        num_students: int,
        tokens: int,
        waits: Iterable[float],
        span: tuple[float, float],
        *,
        is_failed: bool,
    ) -> None:
        """A pass over texts that had waited so long."""
        begin_s, end_s = span
        queued = list(waits)
        self.passes += 1
        self.rows += tokens
        self._spans.append(span)
        if is_failed:
            self.failed += len(queued)
            return
        self.answers[num_students] += len(queued)
        self._recent.extend((end_s, wait_s, end_s - begin_s) for wait_s in queued)

    def frozen(self) -> Tally:
        """The books as they stand, to be read without the lock: sorting a window takes longer than a small pass."""
        twin = copy(self)
        twin.answers, twin._recent, twin._spans = (
            Counter(self.answers),
            self._recent.copy(),
            self._spans.copy(),
        )
        return twin

    def stats(
        self, *, queue_texts: int, queue_tokens: int, num_students: int, rejected: int
    ) -> SchedulerStats:
        """What the books say."""
        now_s = self.clock()
        since_s = max(now_s - WINDOW_S, self._begin_s)
        recent = [entry for entry in self._recent if entry[0] >= since_s]
        queued, service = [entry[1] for entry in recent], [entry[2] for entry in recent]
        busy_s = sum(max(end_s - max(begin_s, since_s), 0.0) for begin_s, end_s in self._spans)
        return SchedulerStats(
            queue_texts=queue_texts,
            queue_tokens=queue_tokens,
            num_students=num_students,
            answers=dict(sorted(self.answers.items())),
            passes=self.passes,
            rows=self.rows,
            failed=self.failed,
            cancelled=self.cancelled,
            rejected=rejected,
            deferred=self.deferred,
            kept=self.kept,
            busy_share=min(busy_s / max((now_s - since_s) * self.workers, 1e-9), 1.0),
            queue_p50_s=percentile(queued, 0.5),
            queue_p99_s=percentile(queued, 0.99),
            service_p50_s=percentile(service, 0.5),
            service_p99_s=percentile(service, 0.99),
        )
