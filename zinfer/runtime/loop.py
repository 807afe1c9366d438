"""The one generation loop.  In: requests, at any time.  Out: events, a pass at a time.

Prefill pieces, decode tokens and rows to be scored ride together; offline jobs, streams and servers all feed this loop.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zinfer.errors import BudgetError
from zinfer.kvcache.cache import PagedKv
from zinfer.log import logger
from zinfer.memory.faults import FULL, TOO_FULL, explained
from zinfer.memory.upload import indices
from zinfer.plan.tokens import TokenBudget
from zinfer.runtime.batch import pack_rows, split_rows, view_of
from zinfer.runtime.executor import Executor
from zinfer.runtime.request import Request
from zinfer.runtime.scheduler import Piece, Scheduler
from zinfer.runtime.text import TextState
from zinfer.sampling.sample import Draw, Drawn, collect, draw


@dataclass(frozen=True, slots=True)
class Event:
    """What one pass gave one request: a token, the text that is now certain, and whether it has ended.

    `token_id` is None where a request that samples nothing has ended.
    """

    request: Request
    token_id: int | None
    text: str
    is_finished: bool


class Loop:
    """Carries requests through passes until each has ended; `budget` says how many rows a pass should carry.

    Used by one thread at a time.  When a pass raises, nothing of it counts: every request is where it was.
    """

    def __init__(
        self,
        executor: Executor,
        kv: PagedKv,
        scheduler: Scheduler,
        budget: TokenBudget,
        *,
        micro_rows: int | None = None,
    ) -> None:
        self.executor = executor
        self.kv = kv
        self.scheduler = scheduler
        self.budget = budget
        self._micro_rows = micro_rows or scheduler.max_rows
        self._num_begun = 0  # micro-batches of the pass that count
        self._texts: dict[int, TextState] = {}

    def submit(self, request: Request, text: TextState) -> None:
        """Queue a request.  Raises BudgetError ZI-2201 when the cache cannot hold it even alone."""
        self.scheduler.submit(request)
        request.arrival_s = time.perf_counter()
        self._texts[request.id] = text

    def drop(self, request: Request) -> None:
        """Nobody wants this request any more; one that has ended already is no matter."""
        if self._texts.pop(request.id, None) is not None:
            self.scheduler.finish(request)

    def step(self) -> list[Event]:
        """One pass, and what it gave; nothing is left to do when there are no requests."""
        begin_s = time.perf_counter()
        pieces = self.scheduler.compose(self.budget.rows)
        if not pieces:
            return []
        events = self._pass_with_room(pieces)
        self.executor.results_are_here()
        last = self.executor.stats.passes[-1]
        if not last.is_first:
            self.budget.observe(last.rows, last.group_s, last.wait_s, last.seconds)
        last.schedule_s = time.perf_counter() - begin_s - last.seconds
        return events

    def _pass_with_room(self, pieces: Sequence[Piece]) -> list[Event]:
        """The pass; where the device runs out of memory in it, the same pass in smaller micro-batches.

        Another process may have taken what the plan counted with.  Until logits are there nothing of a pass counts, so
        it can be run again; the rows stay as small as they had to become.
        """
        while True:
            try:
                return list(self._pass(pieces))
            except RuntimeError as error:
                if typed := explained(error, "while tokens were drawn"):
                    raise typed from error
                raise
            except BudgetError as error:
                if error.code != FULL or self._num_begun:
                    raise
                reason = error.message
            self._shrink(sum(len(piece.ids) for piece in pieces), reason)

    def _shrink(self, rows: int, reason: str) -> None:
        """Half as many rows at once.  Raises BudgetError ZI-2404 where one is too many."""
        at_once = min(self._micro_rows, rows)
        if at_once == 1:
            raise BudgetError(
                TOO_FULL,
                f"not one row fits in what is left of the device's memory: {reason}",
                remedy="nvidia-smi   # who else uses it?  Then --device-mem with less than is free",
            )
        self._micro_rows = at_once // 2
        logger.warning("%s: going on with %d rows at once instead of %d", reason, self._micro_rows, at_once)
        gc.collect()  # the failed pass's activations hang on its traceback
        if self.executor.manager.device.type == "cuda":
            torch.cuda.empty_cache()

    def _pass(self, pieces: Sequence[Piece]) -> Iterator[Event]:
        self._num_begun = 0
        micros = split_rows(pieces, self._micro_rows)
        batches = [pack_rows(micro) for micro in micros]
        views = [view_of(self.kv, micro, batch) for micro, batch in zip(micros, batches, strict=True)]
        outputs = self.executor.run(list(zip(batches, views, strict=True)))
        self._num_begun = len(views)
        for view in views:
            view.commit()
        drawn = [self._draw(micro, logits_RV) for micro, logits_RV in zip(micros, outputs, strict=True)]
        for micro, logits_RV, draws in zip(micros, outputs, collect(drawn), strict=True):
            yield from self._took(micro, logits_RV, draws)

    def _took(
        self, pieces: Sequence[Piece], logits_RV: Tensor, draws_of_micro: Sequence[Draw]
    ) -> Iterator[Event]:
        """Advance the requests of one micro-batch; its logits lie in the order of its pieces."""
        draws = iter(draws_of_micro)
        for piece, rows in _logit_rows(pieces):
            is_sampling = piece.request.is_sampling_at(piece.stop)
            piece.request.num_committed = piece.stop
            if is_sampling:
                yield self._advance(piece.request, next(draws))
            elif piece.request.on_logits is not None:
                yield from self._scored(piece.request, logits_RV[rows])

    def _draw(self, pieces: Sequence[Piece], whole_RV: Tensor) -> Drawn:
        """A token per request that samples now, on the logits' device; no copy where no row belongs to a score."""
        found = [
            (piece.request, rows.start)
            for piece, rows in _logit_rows(pieces)
            if piece.request.is_sampling_at(piece.stop)
        ]
        is_whole = len(found) == len(whole_RV)
        logits_SV = whole_RV if is_whole else whole_RV[indices([row for _, row in found], whole_RV.device)]
        return draw(logits_SV, [request for request, _ in found], self.executor.spec.eos_ids)

    def _scored(self, request: Request, logits_nV: Tensor) -> Iterator[Event]:
        assert request.on_logits is not None, "only a request that wants logits is scored"
        if len(logits_nV):
            request.on_logits(request.num_committed - len(logits_nV), logits_nV)
            request.logits_from = request.num_committed  # a row that was handed over is not handed over again
        if request.num_committed == len(request.prompt_ids):
            request.finish_reason = "length"
            self.drop(request)
            yield Event(request, None, "", True)

    def _advance(self, request: Request, draw: Draw) -> Event:
        request.output_ids.append(draw.token_id)
        request.token_s.append(time.perf_counter())
        if draw.logprobs is not None:
            request.logprobs.append(draw.logprobs)
        delta = self._texts[request.id].push(draw.token_id)
        is_finished = request.finish_reason is not None
        if is_finished:
            self.drop(request)
        return Event(request, draw.token_id, delta, is_finished)


def _logit_rows(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, slice]]:
    """The pieces of a micro-batch, each with its rows among the logits, as they are when it is asked for."""
    stop = 0
    for piece in pieces:
        start, stop = stop, stop + piece.request.num_logit_rows(piece.start, piece.stop)
        yield piece, slice(start, stop)
