"""Decide what the next pass carries.  In: requests, the cache's pages, a number of rows.  Out: pieces of token ids.

Integers only.  A streamed pass costs the same whatever it carries, so every pass is filled: the next token of each
running sequence first, then pieces of prompts, oldest request first (iteration-level scheduling: Orca, OSDI 2022).
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from zinfer.errors import BudgetError, InternalError, MachineError
from zinfer.kvcache.pages import PAGE_TOKENS, pages_for
from zinfer.log import logger
from zinfer.runtime.request import Request


class Pages(Protocol):
    """What scheduling must know of the cache: who holds how many tokens' worth of pages."""

    @property
    def capacity_tokens(self) -> int: ...
    @property
    def free_tokens(self) -> int: ...

    def open(self, sequence_id: int, num_tokens: int) -> None: ...

    def grow(self, sequence_id: int, num_tokens: int) -> bool: ...

    def close(self, sequence_id: int) -> None: ...

    def spill(self, sequence_id: int) -> int: ...

    def restore(self, sequence_id: int, num_tokens: int) -> bool: ...


class Piece(NamedTuple):
    """What one request feeds into a pass, or into one micro-batch of it: `ids` at its tokens `start` on."""

    request: Request
    ids: list[int]
    start: int

    @property
    def stop(self) -> int:
        """The token after the last."""
        return self.start + len(self.ids)


@dataclass(slots=True)
class Preemptions:
    """How often a running request had to give its pages away, and what became of them."""

    spilled: int = 0  # written to disk, read back later
    dropped: int = 0  # to be computed again
    damaged: int = 0  # of those spilled: could not be read back, computed again


class Scheduler:
    """Every request ends exactly once and none starves: whatever is short is taken from the youngest, and the
    oldest request finds room when all others have lost theirs.

    Waiting requests are admitted in order of arrival while fewer than `max_batch` run; pages are taken as a sequence
    grows.  `wants_spill(tokens)` says whether a sequence of so many tokens is cheaper to write and read back than to
    compute again.  At most `max_rows` rows and `max_logit_rows` rows of logits ride in a pass.
    """

    def __init__(
        self,
        pages: Pages,
        *,
        max_batch: int,
        max_rows: int,
        max_logit_rows: int | None = None,
        wants_spill: Callable[[int], bool] = lambda tokens: False,
    ) -> None:
        self.pages = pages
        self.preemptions = Preemptions()
        self.max_batch = min(max_batch, max_rows)
        self.max_rows = max_rows
        self.max_logit_rows = max(max_logit_rows or 0, self.max_batch)
        self._wants_spill = wants_spill
        self._waiting: deque[Request] = deque()
        self._preempted: list[Request] = []  # in order of arrival
        self._running: list[Request] = []  # likewise: each has pages
        self._is_spilled: set[int] = set()  # of the preempted: ids with a copy on disk

    def __len__(self) -> int:
        """Requests that have not ended."""
        return len(self._waiting) + len(self._preempted) + len(self._running)

    @property
    def num_running(self) -> int:
        """Requests with pages."""
        return len(self._running)

    @property
    def mean_lengths(self) -> tuple[int, int]:
        """Tokens of a prompt and tokens to generate, on average over the requests that have not ended; at least 1."""
        requests = [*self._waiting, *self._preempted, *self._running]
        prompt = sum(len(request.prompt_ids) for request in requests)
        generated = sum(request.max_kv_tokens - len(request.prompt_ids) for request in requests)
        return max(prompt // len(requests), 1), max(generated // len(requests), 1)

    def refuse_impossible(self, request: Request) -> None:
        """Raises BudgetError ZI-2201 for a request that the cache cannot hold even alone."""
        if request.max_kv_tokens > self.pages.capacity_tokens:
            raise BudgetError(
                "ZI-2201",
                f"request {request.id} may reach {request.max_kv_tokens} tokens, "
                f"the key-value cache of this plan holds {self.pages.capacity_tokens}",
                remedy=f"--set runtime.context={request.max_kv_tokens}, or lower max_tokens",
            )

    def submit(self, request: Request) -> None:
        """Put a request at the end of the queue.  Raises as `refuse_impossible`."""
        self.refuse_impossible(request)
        self._waiting.append(request)

    def compose(self, rows: int) -> list[Piece]:
        """The pieces of the next pass: about `rows` rows, more where more sequences decode; empty when idle."""
        room = _Room(min(max(rows, 1), self.max_rows), self.max_logit_rows)
        pieces = list(self._decoding(room))
        pieces += self._prefilling(room)
        pieces += self._joining(room)
        if not pieces and len(self):
            raise InternalError("ZI-2203", f"{len(self)} requests wait and none can be fed")
        return pieces

    def finish(self, request: Request) -> None:
        """A request has ended, or nobody wants it any more: its pages are free."""
        if request in self._running:
            self._running.remove(request)
            self.pages.close(request.id)
        elif request in self._preempted:
            self._preempted.remove(request)
            self._forget_spill(request)
        else:
            self._waiting.remove(request)

    def preempt_all(self) -> None:
        """Take every running request's pages away (the cache is about to change); all are computed again."""
        while self._running:
            self._preempt(self._running[-1], may_spill=False)
        for request in self._preempted:
            self._forget_spill(request)

    def follow(self, pages: Pages, max_batch: int) -> None:
        """Another cache and another number at once; nobody holds pages (`preempt_all`) if the cache is another."""
        self.pages = pages
        self.max_batch = min(max_batch, self.max_rows)
        self.max_logit_rows = max(self.max_logit_rows, self.max_batch)

    def check(self) -> None:
        """No request stands in two places.  Raises InternalError ZI-2204."""
        ids = [request.id for request in (*self._waiting, *self._preempted, *self._running)]
        if len(ids) != len(set(ids)):
            raise InternalError("ZI-2204", f"the scheduler's books are wrong: requests {ids}")

    def _decoding(self, room: _Room) -> Iterator[Piece]:
        """One token of every running sequence that has nothing else to feed, oldest first."""
        for at, request in enumerate(list(self._running)):
            if at >= len(self._running):
                return  # the youngest have lost their pages: from here on all
            if not request.is_decoding:
                continue
            while not self.pages.grow(request.id, request.num_committed + 1):
                victim = self._running[-1]
                self._preempt(victim)
                if victim is request:
                    break
            else:
                room.take(1, 1)
                yield Piece(request, request.next_ids(1), request.num_committed)

    def _prefilling(self, room: _Room) -> Iterator[Piece]:
        for request in self._running:
            if not request.is_decoding and (piece := self._piece(request, room)):
                yield piece

    def _joining(self, room: _Room) -> Iterator[Piece]:
        """Preempted requests first, then those that wait, while sequences, rows and pages are free."""
        growth = sum(map(_next_page, self._running)) if self._preempted or self._waiting else 0
        while len(self._running) < self.max_batch and room.rows > 0:
            queue = self._preempted or self._waiting
            if not queue or not self._admit(queue[0], growth):
                return
            request = self._preempted.pop(0) if queue is self._preempted else self._waiting.popleft()
            growth += _next_page(request)
            insort(self._running, request, key=lambda other: other.id)
            if request.is_decoding:
                room.take(1, 1)
                yield Piece(request, request.next_ids(1), request.num_committed)
            elif piece := self._piece(request, room):
                yield piece

    def _admit(self, request: Request, growth: int) -> bool:
        """Open pages for what the request must feed before it samples; False when they lack.

        While others run, each keeps a page to grow into as long as it may still grow, `growth` pages in all: a request
        that joins only to be preempted has gained nothing.
        """
        pages = pages_for(request.num_tokens)
        if self._running:
            pages += growth + _next_page(request)
        if pages * PAGE_TOKENS > self.pages.free_tokens:
            return False
        if request.id in self._is_spilled:
            self._is_spilled.remove(request.id)
            if self.pages.restore(request.id, request.num_tokens):
                return True
            self.preemptions.damaged += 1
            request.num_committed = 0
        self.pages.open(request.id, request.num_tokens)
        return True

    def _piece(self, request: Request, room: _Room) -> Piece | None:
        """As much of what the request still has to feed as rows, rows of logits and pages allow."""
        limit = room.limit(request)
        ids = request.next_ids(limit) if limit > 0 else []
        if not ids or not self.pages.grow(request.id, request.num_committed + len(ids)):
            return None
        piece = Piece(request, ids, request.num_committed)
        room.take(len(ids), _places(request, piece.start, piece.stop))
        return piece

    def _preempt(self, request: Request, *, may_spill: bool = True) -> None:
        self._running.remove(request)
        insort(self._preempted, request, key=lambda other: other.id)
        if may_spill and request.num_committed and self._wants_spill(request.num_committed):
            try:
                self.pages.spill(request.id)
            except MachineError as error:
                logger.warning("a sequence is computed again, its cache could not be written: %s", error)
            else:
                self._is_spilled.add(request.id)
                self.preemptions.spilled += 1
                return
        self.pages.close(request.id)
        self.preemptions.dropped += 1
        request.num_committed = 0

    def _forget_spill(self, request: Request) -> None:
        if request.id in self._is_spilled:
            self._is_spilled.remove(request.id)
            self.pages.close(request.id)
            request.num_committed = 0


def _next_page(request: Request) -> int:
    """1 where the request may need another page before it ends, else 0."""
    return int(pages_for(request.max_kv_tokens) > pages_for(request.num_tokens))


def _places(request: Request, start: int, stop: int) -> int:
    """Rows of logits that tokens start .. stop - 1 want, or branches that they belong to if those are more: a plan
    counts with as many sequences as rows of logits."""
    return max(request.num_logit_rows(start, stop), sum(1 for _ in request.parts(start, stop)))


@dataclass(slots=True)
class _Room:
    """What a pass can still take."""

    rows: int
    logit_rows: int

    def take(self, rows: int, logit_rows: int) -> None:
        self.rows -= rows
        self.logit_rows -= logit_rows

    def limit(self, request: Request) -> int:
        """The most rows of a prompt that fit."""
        start = request.num_committed
        limit = min(self.rows, request.num_tokens - start)
        while limit > 0 and (excess := _places(request, start, start + limit) - max(self.logit_rows, 0)) > 0:
            limit -= excess
        return limit
