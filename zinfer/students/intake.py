"""Who is served next.  In: texts as they come.  Out: for an idle worker a pass: how many students, and which texts.

Integers and seconds only: the threads around it are those of `scheduler`, in tests a simulated clock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from zinfer.errors import BudgetError
from zinfer.students.buffer import LengthBuffer, Waiting
from zinfer.students.controller import Controller

T = TypeVar("T")
Clock = Callable[[], float]
UNKNOWN_S = 1.0  # to come again after, where no pass has been seen yet
LEAST_S = 0.001
_WINDOW = 0.2  # weight of one pass in the measured rate


class Overloaded(BudgetError):  # noqa: N818  # what is wrong is the moment, not the text
    """ZI-2205: as much waits as may.  `retry_after_s`: when there should be room, from what waits and is served."""

    def __init__(self, queue_tokens: int, max_queue_tokens: int, retry_after_s: float) -> None:
        super().__init__(
            "ZI-2205",
            f"{queue_tokens} tokens wait, {max_queue_tokens} may",
            remedy=f"the same request after {retry_after_s:.3f} s",
        )
        self.retry_after_s = retry_after_s


class Intake(Generic[T]):
    """A bounded buffer, the controller's choice and the measured rate.  Used under the caller's lock.

    `objective_s` None: no text is ever overdue.  Without a controller every pass has `num_students`.
    """

    def __init__(
        self,
        *,
        num_students: int,
        objective_s: float | None,
        max_queue_tokens: int,
        pass_tokens: int,
        pass_texts: int,
        controller: Controller | None,
        workers: int = 1,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.buffer: LengthBuffer[T] = LengthBuffer()
        self.num_students, self.controller = num_students, controller
        self.overdue_s = float("inf") if objective_s is None else objective_s / 2
        self.max_queue_tokens, self.pass_texts, self.workers = max_queue_tokens, pass_texts, workers
        self.pass_tokens = pass_tokens
        self.clock = clock
        self.token_s: float | None = None  # seconds of a token in recent passes
        self.rejected = 0
        self._ends: deque[float] = deque(maxlen=workers)  # when the latest passes should have ended

    def put(self, item: T, tokens: int) -> int:
        """Queue a text; its number.  Raises as `put_all`."""
        return self.put_all([(item, tokens)])[0]

    def put_all(self, texts: Sequence[tuple[T, int]]) -> list[int]:
        """Queue (item, tokens) of several texts, all or none of them; their numbers.

        Raises Overloaded ZI-2205 where the queue is full, or so long that even the fewest students would answer the
        last of them too late; BudgetError ZI-2206 for what no queue of this size can hold.
        """
        tokens = sum(size for _, size in texts)
        if tokens > self.max_queue_tokens:
            raise BudgetError(
                "ZI-2206",
                f"{_so_many(texts)} of {tokens} tokens {'was' if len(texts) == 1 else 'were'} given, the queue holds "
                f"{self.max_queue_tokens}",
                remedy=f"max_queue_tokens={tokens}",
            )
        most = self.most_tokens()
        if self.buffer.tokens and self.buffer.tokens + tokens > most:
            self.rejected += 1
            raise Overloaded(self.buffer.tokens, most, self.retry_after_s(tokens))
        now_s = self.clock()
        if self.controller is not None:
            self.controller.arrived(tokens, now_s)
        return [self.buffer.put(item, size, now_s) for item, size in texts]

    def most_tokens(self) -> int:
        """How many may wait now: what the queue holds, and with a controller no more than is answered in time."""
        if self.controller is None:
            return self.max_queue_tokens
        busy_s = 0.0
        if len(self._ends) == self.workers:
            busy_s = max(min(self._ends) - self.clock(), 0.0)
        return min(self.max_queue_tokens, self.controller.most_tokens(busy_s))

    def take(self) -> tuple[int, list[Waiting[T]]]:
        """(number of students, texts) of the next pass; no texts where none wait."""
        oldest_s = self.buffer.oldest_since_s()
        if oldest_s is None:
            return self.num_students, []
        now_s, num_students = self.clock(), self.num_students
        if self.controller is not None:
            num_students = self.controller.decide(self.buffer.tokens, now_s - oldest_s, now_s)
        texts = self.buffer.take(self._room(num_students), self.pass_texts, now_s, self.overdue_s)
        if self.controller is not None:
            tokens = sum(one.tokens for one in texts)
            self._ends.append(now_s + self.controller.seconds(num_students, tokens))
        return num_students, texts

    def _room(self, num_students: int) -> int:
        """Tokens of a pass."""
        if self.controller is None:
            return self.pass_tokens
        return min(self.pass_tokens, self.controller.full[num_students])

    def served(self, num_students: int, tokens: int, seconds: float) -> None:
        """A pass has ended."""
        if self.controller is not None:
            self.controller.observe(num_students, tokens, seconds)
        was, now = self.token_s, seconds / tokens
        self.token_s = now if was is None else (1 - _WINDOW) * was + _WINDOW * now

    def retry_after_s(self, tokens: int) -> float:
        """Seconds until so many tokens should have room: what is too much, at the measured rate."""
        excess = self.buffer.tokens + tokens - self.most_tokens()
        if self.token_s is None:
            return UNKNOWN_S
        return max(excess * self.token_s / self.workers, LEAST_S)


def _so_many(texts: Sequence[object]) -> str:
    return "a text" if len(texts) == 1 else f"{len(texts)} texts"
