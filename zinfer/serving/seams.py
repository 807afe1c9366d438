"""What serving needs from below: a model that cuts texts into tokens, and a queue that answers them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from zinfer.students.scheduler import SchedulerStats, Served
from zinfer.tokenizer import Encoded, Text


class TextModel(Protocol):
    """An encoder as requests see it.  `labels` are empty where there is no head; `num_students` is 1 for one model."""

    @property
    def name(self) -> str:
        """The folder's own name."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes."""
        ...

    @property
    def scoring(self) -> str:
        """How logits become scores: "softmax", "sigmoid" each, or "none"."""
        ...

    @property
    def max_tokens(self) -> int:
        """Tokens of a text at most, special ones included."""
        ...

    @property
    def num_students(self) -> int:
        """The most that answer."""
        ...

    def encode(self, texts: Sequence[Text], direction: str) -> list[Encoded]:
        """Token ids, cut at the `direction` end ("left" or "right").  Called from several threads."""
        ...

    def about(self) -> dict[str, Any]:
        """More fields for /info."""
        ...


class TextQueue(Protocol):
    """`students.scheduler.TextScheduler`, or a double of it."""

    def submit(self, text: Encoded) -> Future[Served]:
        """Queue a text.  Raises Overloaded with `retry_after_s`; a future cancelled in time is never computed."""
        ...

    def submit_all(self, texts: Sequence[Encoded]) -> Future[list[Served]]:
        """Queue the texts of one request, all or none; they are answered together."""
        ...

    def drain(self, timeout_s: float | None = None) -> bool:
        """Take no more, wait for what was taken; False where time ran out."""
        ...

    def close(self) -> None:
        """Cancel what waits, end threads."""
        ...

    def stats(self) -> SchedulerStats:
        """What waits and what was done."""
        ...
