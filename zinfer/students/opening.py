"""Open a scheduler.  In: an answerer and a latency objective.  Out: passes measured, a controller, threads at work."""

from __future__ import annotations

import time
from statistics import median
from typing import Protocol, runtime_checkable

from zinfer.errors import BudgetError, UsageError
from zinfer.students.controller import MOST_LOAD, SHARE, Controller, ServiceTable, isotonic
from zinfer.students.intake import Clock
from zinfer.students.scheduler import PASS_TOKENS, Answerer, Defers, TextScheduler
from zinfer.tokenizer import Encoded

TOKENS = (16, 64, 256, 1024)  # passes that are measured, beside the largest
TYPICAL = 64  # tokens of a text in them
REPEATS, LONG_S = 3, 0.1


@runtime_checkable
class Warms(Protocol):
    """An answerer that has something to do before it serves: recording passes on a device, say."""

    def warm_up(self) -> None:
        """Once, before the first text."""
        ...


def sample_texts(tokens: int, max_tokens: int) -> list[Encoded]:
    """Texts of `tokens` together, of a typical length; what they say does not change the time of a pass."""
    length = min(TYPICAL, max_tokens, tokens)
    lengths = [length] * (tokens // length) + [tokens % length] * (tokens % length > 0)
    return [Encoded((0,) * one, (0,) * one, is_cut=False) for one in lengths]


def measured(
    answerer: Answerer, pass_tokens: int, objective_s: float, clock: Clock = time.perf_counter
) -> ServiceTable:
    """Seconds of a pass by students and tokens, up to passes that alone take longer than the objective.

    What takes longer with fewer students is not tried with more: it takes more by as much as there are more.
    """
    sizes = sorted({one for one in TOKENS if one < pass_tokens} | {pass_tokens})
    seconds: list[list[float]] = []
    for num_students in range(1, answerer.num_students + 1):
        row: list[float] = []
        for at, tokens in enumerate(sizes):
            if seconds and seconds[-1][at] > objective_s:
                row.append(seconds[-1][at] * num_students / (num_students - 1))
                continue
            row.append(_typical_s(answerer, tokens, num_students, clock))
            if not seconds and row[-1] > objective_s:
                del sizes[at + 1 :]
                break
        seconds.append(row)
    return isotonic(sizes, seconds)


def _typical_s(answerer: Answerer, tokens: int, num_students: int, clock: Clock) -> float:
    """The median of three after one that is not counted; a pass that is long enough is measured once."""
    texts = sample_texts(tokens, answerer.max_tokens)
    _seconds(answerer, texts, num_students, clock)
    found = [_seconds(answerer, texts, num_students, clock)]
    while len(found) < REPEATS and found[0] < LONG_S:
        found.append(_seconds(answerer, texts, num_students, clock))
    return median(found)


def _seconds(answerer: Answerer, texts: list[Encoded], num_students: int, clock: Clock) -> float:
    begin_s = clock()
    answerer.answer(texts, num_students)
    return clock() - begin_s


def open_scheduler(
    answerer: Answerer,
    *,
    objective_s: float | None = None,
    max_queue_tokens: int = 65_536,
    pass_tokens: int = PASS_TOKENS,
    least: int = 1,
    workers: int = 1,
    is_adaptive: bool = True,
    deferral: Defers | None = None,
    table: ServiceTable | None = None,
    most_load: float = MOST_LOAD,
) -> TextScheduler:
    """A scheduler whose controller knows what passes take here; without an objective all students always answer.

    `table` is what an earlier one measured of the same answerer: it is then not measured again.  `most_load` is of what
    passes carry: above it fewer students answer.

    Raises UsageError ZI-1162 for an objective that is no duration, ZI-1163 for a least number of students that there
    are not, BudgetError ZI-2207 for an objective shorter than the smallest pass of the fewest students.
    """
    try:
        controller = _controller(
            answerer,
            objective_s,
            pass_tokens=pass_tokens,
            least=least,
            workers=workers,
            is_adaptive=is_adaptive,
            table=table,
            most_load=most_load,
        )
    except BaseException:
        if deferral is not None:  # it was to be the scheduler's own
            deferral.close()
        raise
    return TextScheduler(
        answerer,
        objective_s=objective_s,
        max_queue_tokens=max_queue_tokens,
        pass_tokens=pass_tokens,
        controller=controller,
        workers=workers,
        deferral=deferral,
    )


def _controller(
    answerer: Answerer,
    objective_s: float | None,
    *,
    pass_tokens: int,
    least: int,
    workers: int,
    is_adaptive: bool,
    table: ServiceTable | None,
    most_load: float,
) -> Controller | None:
    """Check what was asked, let the answerer get ready, measure it."""
    if not 1 <= least <= answerer.num_students:
        raise UsageError(
            "ZI-1163",
            f"at least {least} students were asked for, there are {answerer.num_students}",
            remedy=f"least={answerer.num_students}",
        )
    if objective_s is not None and not 0 < objective_s < float("inf"):
        raise UsageError(
            "ZI-1162", f"an objective of {objective_s} s is no duration", remedy="objective_s=0.05"
        )
    if isinstance(answerer, Warms):
        answerer.warm_up()
    if objective_s is None or not is_adaptive:
        return None
    table = table or measured(answerer, pass_tokens, objective_s)
    smallest_s = table.at(least, table.tokens[0])
    if smallest_s > SHARE * objective_s:
        raise BudgetError(
            "ZI-2207",
            f"a pass of {table.tokens[0]} tokens takes {smallest_s:.4f} s with {least} of {answerer.num_students} "
            f"students, the objective is {objective_s:.4f} s",
            remedy=f"objective_s={max(2 * smallest_s, 0.0001):.4f}",
        )
    return Controller(
        table, objective_s, pass_tokens=pass_tokens, least=least, workers=workers, most_load=most_load
    )
