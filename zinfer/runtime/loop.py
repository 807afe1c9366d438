"""The one generation loop.  In: requests.  Out: events, a pass at a time.  Prefill pieces and decode ride together."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zinfer.errors import BudgetError
from zinfer.kvcache.cache import PagedKv
from zinfer.runtime.batch import pack_rows
from zinfer.runtime.executor import Executor
from zinfer.runtime.request import Request
from zinfer.runtime.text import TextState
from zinfer.sampling.sample import Draw, sample


@dataclass(frozen=True, slots=True)
class Event:
    """What one pass gave one request: a token, the text that is now certain, and whether it has ended."""

    request: Request
    token_id: int
    text: str
    is_finished: bool


class Loop:
    """Feeds requests through passes until each has ended.

    Requests wait in arrival order.  A pass carries the running ones' next token and, while fewer than `max_rows`
    rows are taken and the cache has pages, pieces of waiting prompts.  A request's pages are taken whole on
    admission, so that a running request never lacks one.
    """

    def __init__(self, executor: Executor, kv: PagedKv, *, max_rows: int, max_batch: int) -> None:
        self._executor = executor
        self._kv = kv
        self._max_rows = max_rows
        self._max_batch = max_batch

    def run(self, requests: Sequence[Request], texts: Sequence[TextState]) -> Generator[Event, None, None]:
        """Yield an event per sampled token; closing the iterator early gives all pages back."""
        for request in requests:
            self._refuse_impossible(request)
        waiting = deque(zip(requests, texts, strict=True))
        running: list[tuple[Request, TextState]] = []
        try:
            while waiting or running:
                self._admit(waiting, running)
                if not running:
                    raise BudgetError(
                        "ZI-2202",
                        f"request {waiting[0][0].id} finds no cache pages: another generation holds them",
                        remedy="let it end first, or raise runtime.max_batch",
                    )
                yield from self._pass(running)
                for request, _ in running:
                    if request.finish_reason is not None:
                        self._kv.close(request.id)
                running = [pair for pair in running if pair[0].finish_reason is None]
        finally:
            for request, _ in running:
                self._kv.close(request.id)

    def logits(self, request: Request) -> Tensor:
        """fp32 logits [T, V] of every token of the prompt, in pieces of at most `max_rows` rows."""
        self._refuse_impossible(request)
        self._kv.open(request.id, request.max_kv_tokens)
        pieces = []
        try:
            while request.num_committed < len(request.prompt_ids):
                piece = request.next_ids(self._max_rows)
                pieces.append(self._run([(request, piece)], all_logits=True))
        finally:
            self._kv.close(request.id)
        return torch.cat(pieces)

    def _refuse_impossible(self, request: Request) -> None:
        if request.max_kv_tokens > self._kv.capacity_tokens:
            raise BudgetError(
                "ZI-2201",
                f"request {request.id} may reach {request.max_kv_tokens} tokens, "
                f"the key-value cache of this plan holds {self._kv.capacity_tokens}",
                remedy=f"--set runtime.context={request.max_kv_tokens}, or lower max_tokens",
            )

    def _admit(
        self, waiting: deque[tuple[Request, TextState]], running: list[tuple[Request, TextState]]
    ) -> None:
        while waiting and len(running) < self._max_batch:
            if not self._kv.has_room(waiting[0][0].max_kv_tokens):
                return
            pair = waiting.popleft()
            self._kv.open(pair[0].id, pair[0].max_kv_tokens)
            running.append(pair)

    def _pass(self, running: Sequence[tuple[Request, TextState]]) -> Iterator[Event]:
        pieces, rows_left = [], self._max_rows
        for request, _ in sorted(running, key=lambda pair: len(pair[0].prompt_ids) > pair[0].num_committed):
            ids = request.next_ids(rows_left)  # decode first: every running request advances
            if ids:
                pieces.append((request, ids))
                rows_left -= len(ids)
        sampling = [request for request, ids in pieces if request.is_sampling_after(len(ids))]
        logits_SV = self._run(pieces)
        draws = sample(logits_SV, sampling, self._executor.spec.eos_ids) if sampling else []
        text_of = {request.id: text for request, text in running}
        for request, draw in zip(sampling, draws, strict=True):
            yield self._advance(request, text_of[request.id], draw)

    def _run(self, pieces: Sequence[tuple[Request, Sequence[int]]], *, all_logits: bool = False) -> Tensor:
        batch = pack_rows(pieces, all_logits=all_logits)
        view = self._kv.view([request.id for request, _ in pieces], batch.bounds)
        (logits,) = self._executor.run([(batch, view)])
        view.commit()
        for request, ids in pieces:
            request.num_committed += len(ids)
        return logits

    def _advance(self, request: Request, text: TextState, draw: Draw) -> Event:
        request.output_ids.append(draw.token_id)
        if draw.logprobs is not None:
            request.logprobs.append(draw.logprobs)
        delta = text.push(draw.token_id)
        return Event(request, draw.token_id, delta, request.finish_reason is not None)
