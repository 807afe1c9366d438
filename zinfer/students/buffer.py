"""What waits for a pass.  In: texts and their lengths, as they come.  Out: texts of similar length, the oldest first.

Integers and seconds only.  Bins of length are the length-aware buffer of student parallelism (arXiv 2408.12526):
texts of one length share an attention call, and short texts do not wait for long ones.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import merge
from itertools import takewhile
from typing import Generic, TypeVar

BINS = (16, 32, 64, 128, 256, 512)  # tokens up to which a text belongs to a bin; longer ones share the last
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Waiting(Generic[T]):
    """One text: what the caller knows it by, its tokens, and when it came."""

    item: T
    tokens: int
    since_s: float


def bin_of(tokens: int) -> int:
    """The bin of a text of that length."""
    return bisect_left(BINS, tokens)


class LengthBuffer(Generic[T]):
    """Texts in the order in which they came, by bins of length.

    `take` always begins with the oldest, so nothing starves: a text waits for at most as many passes as older ones
    were there when it came.  Used under the caller's lock.
    """

    def __init__(self) -> None:
        self._bins: list[OrderedDict[int, Waiting[T]]] = [OrderedDict() for _ in range(len(BINS) + 1)]
        self._next = 0
        self._last_s = float("-inf")
        self.tokens = 0

    def __len__(self) -> int:
        return sum(map(len, self._bins))

    def put(self, item: T, tokens: int, now_s: float) -> int:
        """Add a text; the number it can be discarded by.  Time never runs backwards here."""
        assert tokens > 0, "a text has at least one token"
        number, self._next = self._next, self._next + 1
        self._last_s = max(self._last_s, now_s)
        self._bins[bin_of(tokens)][number] = Waiting(item, tokens, self._last_s)
        self.tokens += tokens
        return number

    def discard(self, number: int) -> bool:
        """Forget a text; False where it has been taken or discarded already."""
        for waiting in self._bins:
            if number in waiting:
                self.tokens -= waiting.pop(number).tokens
                return True
        return False

    def oldest_since_s(self) -> float | None:
        """When the oldest came; None when nothing waits."""
        numbers = [next(iter(waiting)) for waiting in self._bins if waiting]
        return self._find(min(numbers)).since_s if numbers else None

    def take(
        self, max_tokens: int, max_texts: int, now_s: float, overdue_s: float = float("inf")
    ) -> list[Waiting[T]]:
        """Texts of one pass, at most `max_tokens` together (a longer one goes alone) and `max_texts`.

        First the oldest and all that came with it, whose caller waits for the last of them; then all that have waited
        for `overdue_s` by age, then those of the oldest's bin and of its two neighbours, nearest bin first.
        """
        taken: dict[int, Waiting[T]] = {}
        tokens = 0
        for number, one in self._order(max_tokens, now_s, overdue_s):
            if len(taken) == max_texts or (taken and tokens >= max_tokens):
                break
            if number not in taken and (not taken or tokens + one.tokens <= max_tokens):
                taken[number] = one
                tokens += one.tokens
        for number in taken:
            self.discard(number)
        return list(taken.values())

    def _order(self, max_tokens: int, now_s: float, overdue_s: float) -> Iterator[tuple[int, Waiting[T]]]:
        """Texts in the order in which a pass wants them, some of them twice; a bin that never fits is passed over."""
        heads = [next(iter(waiting.items())) for waiting in self._bins if waiting]
        if not heads:
            return
        first = min(heads)
        yield first
        since_s = first[1].since_s

        def is_next(came_s: float) -> bool:
            return came_s <= since_s or now_s - came_s >= overdue_s

        # In a bin the oldest come first, so those that are next stand together at its head.
        late = [takewhile(lambda entry: is_next(entry[1].since_s), waiting.items()) for waiting in self._bins]
        yield from merge(*late)
        home, room = bin_of(first[1].tokens), max_tokens - first[1].tokens
        for at in (home, home - 1, home + 1):
            if 0 <= at < len(self._bins) and (BINS[at - 1] if at else 0) < room:
                yield from self._bins[at].items()

    def _find(self, number: int) -> Waiting[T]:
        return next(waiting[number] for waiting in self._bins if number in waiting)
