"""Requests on their way through.  In: bodies.  Out: answers; nothing of a request is left whatever becomes of it.

The event loop reads, waits and writes.  Parsing, cutting into tokens and queueing happen on `_THREADS` threads, passes
on the queue's own.  A request that is cancelled (its client is gone) cancels its texts, wherever it is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from zinfer.config.schema import Serve
from zinfer.errors import ZinferError
from zinfer.log import logger
from zinfer.serving.access import check_key
from zinfer.serving.answers import FEW_NUMBERS, Answered, written
from zinfer.serving.asks import Ask, Kind, read_ask
from zinfer.serving.refusal import Refusal, as_refusal
from zinfer.serving.seams import TextModel, TextQueue
from zinfer.students.scheduler import Overloaded, Served
from zinfer.tokenizer import Encoded

_THREADS = 2
# A body of at most so many is parsed and cut in about a millisecond: handing it to a thread takes as long.
SHORT_BYTES = 4096
_MOST_BEFORE_S = 0.5  # of waiting for those threads: more work than that is not taken
_WINDOW = 0.1  # weight of one request in what they take
READY_SHARE = 0.9  # of the queue: fuller than that, another server should be asked
WARM_TEXT = "a text to load the model by"


@dataclass(frozen=True, slots=True)
class _Begun:
    """A request whose texts are queued."""

    ask: Ask
    texts: list[Encoded]
    future: Future[list[Served]]


class Service:
    """A model and its queue.  Used from one event loop; owns its threads and the queue until `close`.

    `is_warm` is set once a first text was answered, `is_draining` once no more requests are taken.
    """

    def __init__(self, model: TextModel, queue: TextQueue, limits: Serve) -> None:
        self.model, self.queue, self.limits = model, queue, limits
        self.is_warm = self.is_draining = False
        self.in_flight = 0
        self._room_at_s = 0.0  # when, by the last refusal, the queue should have room
        self._beginning = 0  # requests at or before those threads
        self._begin_s = 0.0  # that one takes
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="zinfer-requests")

    def warm(self) -> None:
        """Answer one text, so that weights are loaded and memory is touched.  Blocks; raises what the pass raises."""
        self.queue.submit(self.model.encode([WARM_TEXT], "right")[0]).result()
        self.is_warm = True

    def check_kind(self, kind: Kind) -> None:
        """Raises Refusal 424 ZI-1183 for /predict where there is no head."""
        if kind == "predict" and not self.model.labels:
            raise Refusal(
                424,
                "ZI-1183",
                f"{self.model.name} has no classification head",
                remedy="POST /embed gives its vectors",
            )

    def check_open(self) -> None:
        """Raises Refusal 503 while loading (ZI-2213) and while draining (ZI-2212)."""
        if self.is_draining:
            raise Refusal(
                503,
                "ZI-2212",
                "this server is ending: it answers what it has taken, and takes no more",
                remedy="ask another one",
                retry_after_s=self.limits.grace_s,
                closes=True,
            )
        if not self.is_warm:
            raise Refusal(
                503, "ZI-2213", "the model is being loaded", remedy="wait for GET /ready", retry_after_s=1
            )

    def check_room(self) -> None:
        """Raises Refusal 429 ZI-2210 until there should be room again: an overload costs no reading and no cutting."""
        if (refusal := self.lack_of_room()) is not None:
            raise refusal

    def lack_of_room(self) -> Refusal | None:
        """What `check_room` raises.

        There is no room either while more is to be parsed and cut into tokens than half a second's work.
        """
        wait_s = self._room_at_s - time.perf_counter()
        if wait_s > 0:
            return full("others were refused a moment ago", wait_s)
        before_s = self._beginning * self._begin_s / _THREADS
        if before_s > _MOST_BEFORE_S:
            return full(f"{self._beginning} requests are to be parsed first", before_s)
        return None

    def check_key(self, authorization: str | None) -> None:
        """Raises Refusal 401 ZI-1174."""
        check_key(self.limits, authorization)

    def is_ready(self) -> bool:
        """Warm, not ending, and with room in the queue."""
        is_open = self.is_warm and not self.is_draining
        return is_open and self.queue.stats().queue_tokens < READY_SHARE * self.limits.queue_tokens

    async def answer(self, raw: bytes, kind: Kind) -> tuple[Answered, bytes]:
        """What is sent back for one body.  Raises Refusal; cancelled, it leaves nothing in the queue."""
        self.check_kind(kind)
        self.check_room()  # again: others may have been quicker while this body was read
        begun = await self._begin(raw, kind)
        served = await _served(begun.future)
        answered = Answered(begun.ask, tuple(begun.texts), tuple(served))
        if answered.num_numbers <= FEW_NUMBERS:
            return answered, written(answered, self.model)
        loop = asyncio.get_running_loop()
        return answered, await loop.run_in_executor(self._pool, written, answered, self.model)

    def close(self) -> None:
        """End threads; what waits is cancelled."""
        self.queue.close()
        self._pool.shutdown(cancel_futures=True)

    async def _begin(self, raw: bytes, kind: Kind) -> _Begun:
        """Parse, cut and queue: what is short at once, else on a thread, where others may wait before it.  Cancelled
        meanwhile, what it queues is taken out again."""
        if len(raw) <= SHORT_BYTES:
            return self._queued(raw, kind)
        beginning = self._pool.submit(self._timed, raw, kind)
        self._beginning += 1
        try:
            return await asyncio.wrap_future(beginning)
        except asyncio.CancelledError:
            beginning.add_done_callback(_cancel_begun)
            raise
        finally:
            self._beginning -= 1

    def _timed(self, raw: bytes, kind: Kind) -> _Begun:
        begin_s = time.perf_counter()
        try:
            return self._queued(raw, kind)
        finally:
            seconds = time.perf_counter() - begin_s
            self._begin_s += _WINDOW * (seconds - self._begin_s)

    def _queued(self, raw: bytes, kind: Kind) -> _Begun:
        ask = read_ask(raw, kind, self.limits)
        try:
            texts = self.model.encode(ask.given, ask.truncation_direction.lower())
        except ZinferError as error:
            raise as_refusal(error) from error
        if ask.truncate is False:
            self._check_whole(texts)
        self._check_fits(texts)
        try:
            return _Begun(ask, texts, self.queue.submit_all(texts))
        except BaseException as error:
            if isinstance(error, Overloaded):
                self._room_at_s = time.perf_counter() + error.retry_after_s
                raise full(error.message, error.retry_after_s) from None
            self.check_open()
            raise

    def _check_fits(self, texts: Sequence[Encoded]) -> None:
        tokens = sum(len(text.ids) for text in texts)
        if tokens > self.limits.queue_tokens:  # to come again would not help
            raise Refusal(
                413,
                "ZI-1185",
                f"the texts have {tokens} tokens together, the queue holds {self.limits.queue_tokens}",
                remedy=f"send fewer at a time, or serve with --set serve.queue_tokens={tokens}",
            )

    def _check_whole(self, texts: Sequence[Encoded]) -> None:
        for number, text in enumerate(texts):
            if text.is_cut:
                raise Refusal(
                    413,
                    "ZI-1181",
                    f"text {number} has more than {self.model.max_tokens} tokens",
                    remedy='cut it, or send "truncate": true',
                )


def full(why: str, retry_after_s: float) -> Refusal:
    """429 ZI-2210."""
    return Refusal(
        429,
        "ZI-2210",
        f"the queue is full: {why}",
        remedy=f"ask again after {retry_after_s:.3f} s",
        retry_after_s=retry_after_s,
    )


async def _served(future: Future[list[Served]]) -> list[Served]:
    """Wait for the answers; cancelled, it cancels them.

    Raises Refusal: 503 for texts that the end of the server cancelled, 424 for a pass that failed.
    """
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        if not future.cancelled() or _is_left():
            raise
        raise Refusal(
            503,
            "ZI-2212",
            "the server ended before this was answered",
            remedy="ask another one",
            closes=True,
        ) from None
    except Exception as error:
        logger.error("a pass failed: %s", error, exc_info=error)
        raise as_refusal(error) from error


def _is_left() -> bool:
    """Whether the task that runs is being cancelled: its client has gone."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _cancel_begun(beginning: Future[_Begun]) -> None:
    if not beginning.cancelled() and beginning.exception() is None:
        beginning.result().future.cancel()
