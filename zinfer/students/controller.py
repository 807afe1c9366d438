"""How many students answer.  In: what waits, how old, how fast it comes.  Out: a number that holds the objective.

Integers and seconds only, on the caller's clock.  Adaptive pruning of student parallelism (arXiv 2408.12526): under
load fewer students answer, and because students are slices of the bank nothing is loaded or moved.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

RATE_S = 0.25  # time constant of the arrival rate
RAISE_S = 1.0  # how long one student more must have fitted before it answers
SHARE, MOST_LOAD = 0.8, 0.9  # of the objective; of what passes can carry
PASS_SHARE = 0.3  # of the objective: a text waits for the pass in progress, then for its own
LEAST_ROOM = 256  # tokens; what a smaller pass costs is mostly that it is one
_DRIFT = 0.1  # weight of one pass in what measured seconds are corrected by
_MOST_DRIFT = 8.0


@dataclass(frozen=True, slots=True)
class ServiceTable:
    """Seconds of a pass: `seconds[m - 1][i]` with m students and `tokens[i]` token rows, never less with more."""

    tokens: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    @property
    def num_students(self) -> int:
        """The most that were measured."""
        return len(self.seconds)

    def at(self, num_students: int, tokens: int) -> float:
        """Seconds of a pass: linear between what was measured, beyond the last point in proportion."""
        row, points = self.seconds[num_students - 1], self.tokens
        if tokens <= points[0]:
            return row[0]
        if tokens >= points[-1]:
            return row[-1] * tokens / points[-1]
        high = bisect_left(points, tokens)
        low = high - 1
        slope = (row[high] - row[low]) / (points[high] - points[low])
        return min(row[low] + slope * (tokens - points[low]), row[high])  # rounding must not break the order

    def tokens_within(self, num_students: int, seconds: float, most: int) -> int:
        """The largest pass up to `most` tokens that takes at most `seconds`; 1 where none does."""
        low, high = 1, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.at(num_students, middle) <= seconds else (low, middle - 1)
        return low


def isotonic(tokens: Sequence[int], seconds: Sequence[Sequence[float]]) -> ServiceTable:
    """A table of what was measured, made non-decreasing in both arguments.

    The mean of the smallest such table above the points and the largest below them; points in order stay as they are.
    """
    rows, columns = len(seconds), len(tokens)
    above = [[0.0] * columns for _ in range(rows)]
    below = [[0.0] * columns for _ in range(rows)]
    for m in range(rows):
        for i in range(columns):
            above[m][i] = max(max(row[: i + 1]) for row in seconds[: m + 1])
            below[m][i] = min(min(row[i:]) for row in seconds[m:])
    mean = tuple(
        tuple((high + low) / 2 for high, low in zip(*both, strict=True))
        for both in zip(above, below, strict=True)
    )
    return ServiceTable(tuple(tokens), mean)


class Controller:
    """Picks the largest m in [least, K] for which both hold: the oldest text and all that waits are answered within
    0.8 of the objective, and what comes is at most `most_load` of what full passes carry.

    Lowers at once; raises by one after each second in which m + 1 would have held both.  Load is judged at a full
    pass, so the choice never grows with what waits.  `full[m]` are the tokens of a full pass of m students: no more
    than take 0.3 of the objective as passes are now, so that whoever comes meanwhile does not wait for long.
    `observe` corrects the measured table by what passes take.  Used under the caller's lock, with the caller's
    clock.
    """

    def __init__(
        self,
        table: ServiceTable,
        objective_s: float,
        *,
        pass_tokens: int,
        least: int = 1,
        most: int | None = None,
        workers: int = 1,
        most_load: float = MOST_LOAD,
    ) -> None:
        self.table, self.objective_s, self.workers, self.most_load = table, objective_s, workers, most_load
        self.least, self.most = least, most or table.num_students
        assert 1 <= least <= self.most <= table.num_students, "the table has a row for every choice"
        self._pass_tokens, self._drift = pass_tokens, 1.0
        self._roomiest = self._rooms()
        self.full = self._roomiest
        self.num_students = self.most
        self._rate, self._rate_at_s = 0.0, -math.inf
        self._fits_since_s: float | None = None  # since when one student more has fitted

    def arrived(self, tokens: int, now_s: float) -> None:
        """A text came."""
        self._rate = self.rate(now_s) + tokens / RATE_S
        self._rate_at_s = now_s

    def rate(self, now_s: float) -> float:
        """Tokens per second that come, the recent ones counting most."""
        return self._rate * math.exp(-max(now_s - self._rate_at_s, 0.0) / RATE_S)

    def observe(self, num_students: int, tokens: int, seconds: float) -> None:
        """A pass took so long: other work on the machine makes all passes slower than they were at start-up."""
        ratio = seconds / max(self.table.at(num_students, tokens), 1e-9)
        drift = (1 - _DRIFT) * self._drift + _DRIFT * min(ratio, _MOST_DRIFT)
        self._drift = max(drift, 1.0)
        self.full = {m: max(room, min(self._roomiest[m], LEAST_ROOM)) for m, room in self._rooms().items()}

    def _rooms(self) -> dict[int, int]:
        """Tokens of the largest pass that takes its share of the objective, by number of students."""
        most_s = PASS_SHARE * self.objective_s / self._drift
        return {
            m: self.table.tokens_within(m, most_s, self._pass_tokens)
            for m in range(self.least, self.most + 1)
        }

    def seconds(self, num_students: int, tokens: int) -> float:
        """What a pass is expected to take now."""
        return self._drift * self.table.at(num_students, tokens)

    def fits(self, num_students: int, queue_tokens: int, age_s: float, rate: float) -> bool:
        """Whether both conditions hold with that many students."""
        full = self.full[num_students]
        pass_s = self.seconds(num_students, min(queue_tokens, full))
        drain_s = self.seconds(num_students, full) * queue_tokens / full / self.workers
        is_in_time = max(age_s + pass_s, drain_s) <= SHARE * self.objective_s
        return is_in_time and rate * self.seconds(num_students, full) / full <= self.most_load * self.workers

    def most_tokens(self, busy_s: float = 0.0) -> int:
        """How many may wait so that the fewest students answer the last of them within 0.8 of the objective, at least
        1; the workers are busy for `busy_s` more."""
        full, left_s = self.full[self.least], SHARE * self.objective_s - busy_s
        return max(int(full * left_s * self.workers / self.seconds(self.least, full)), 1)

    def largest(self, queue_tokens: int, age_s: float, rate: float) -> int:
        """The choice without a memory: never grows with any of the three."""
        fitting = (m for m in range(self.most, self.least, -1) if self.fits(m, queue_tokens, age_s, rate))
        return next(fitting, self.least)

    def decide(self, queue_tokens: int, age_s: float, now_s: float) -> int:
        """How many students the next pass has; `queue_tokens` wait, the oldest since `age_s`."""
        fitting = self.largest(queue_tokens, age_s, self.rate(now_s))
        if fitting <= self.num_students:
            self.num_students, self._fits_since_s = fitting, None
            return fitting
        if self._fits_since_s is None:
            self._fits_since_s = now_s
        while self.num_students < fitting and now_s - self._fits_since_s >= RAISE_S:
            self.num_students += 1
            self._fits_since_s += RAISE_S
        return self.num_students
