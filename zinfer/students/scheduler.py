"""Texts of many callers in shared passes.  In: encoded texts.  Out: futures of what was answered, and by how many.

A worker that is idle takes work at once; there is no timer that fills a batch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Protocol

from torch import Tensor

from zinfer.errors import MachineError, ZinferError
from zinfer.log import logger
from zinfer.students.buffer import Waiting
from zinfer.students.controller import Controller
from zinfer.students.intake import Clock, Intake, Overloaded
from zinfer.students.tally import SchedulerStats, Tally
from zinfer.tokenizer import Encoded

__all__ = ["Answerer", "Overloaded", "SchedulerStats", "Served", "TextScheduler"]
PASS_TOKENS, PASS_TEXTS = 2048, 64


class Answerer(Protocol):
    """What answers: a group of students of which the first few can, or one model (`num_students` is 1).

    `labels` are empty where there is no classification head; `max_tokens` is the longest text that is taken.
    """

    num_students: int
    max_tokens: int

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes."""
        ...

    def answer(self, texts: Sequence[Encoded], num_students: int) -> tuple[Tensor, Tensor | None]:
        """(representations [S, D], logits [S, C] or None), fp32 on the host, in the order of the texts.

        Safe to call from several threads.
        """
        ...


@dataclass(frozen=True, slots=True)
class Served:
    """One text's answer: fp32 on the host, who gave it, how long it waited and how long its pass took.

    `is_deferred`: a teacher gave it, after `num_students` were not sure; the seconds are those of both.
    """

    representation_D: Tensor
    logits_C: Tensor | None
    num_students: int
    queue_s: float
    service_s: float
    is_deferred: bool = False


class Defers(Protocol):
    """What a scheduler asks of the way to a teacher; `cascade.Deferral` is one."""

    def wanted(self, logits_SC: Tensor) -> list[bool]:
        """Which texts of a pass the teacher should see."""
        ...

    def submit(self, text: Encoded) -> Future[Served]:
        """Ask the teacher.  Raises a ZinferError where it cannot be asked now."""
        ...

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait for all that was asked."""
        ...

    def close(self) -> None:
        """End its threads."""
        ...


@dataclass(slots=True)
class _Parcel:
    """Texts of one caller on their way; the last answer sends it off.  Read and written under the scheduler's lock."""

    future: Future[Any]
    is_single: bool
    jobs: list[_Job] = field(default_factory=list)
    answers: dict[int, Served] = field(default_factory=dict)
    queued: int = 0
    is_claimed: bool = False  # its caller can no longer leave
    is_wanted: bool = True  # neither cancelled nor failed

    def claim(self) -> bool:
        """Whether its caller still waits, who from now on cannot leave."""
        if not self.is_claimed:
            self.is_claimed, self.is_wanted = True, self.future.set_running_or_notify_cancel()
        return self.is_wanted

    def send(self) -> None:
        """Hand the answers over; not under the lock, for callers may do as they like."""
        found = [self.answers[at] for at in range(len(self.jobs))]
        self.future.set_result(found[0] if self.is_single else found)


@dataclass(slots=True)
class _Job:
    text: Encoded
    parcel: _Parcel
    at: int
    number: int = 0  # in the queue


class TextScheduler:
    """A bounded queue before an answerer, and the threads that empty it.

    `objective_s` is the latency that is to hold: a text older than half of it is in the next pass.  `controller` says
    how many students answer (None: all).  What `deferral` wants a teacher to see is answered by the teacher; where that
    fails or has no room, by the students all the same, and counted in `stats().kept`.  Safe to call from several
    threads.  Owns its threads and the deferral until `close`.
    """

    def __init__(
        self,
        answerer: Answerer,
        *,
        objective_s: float | None,
        max_queue_tokens: int,
        pass_tokens: int,
        controller: Controller | None,
        workers: int = 1,
        pass_texts: int = PASS_TEXTS,
        deferral: Defers | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.answerer, self.clock, self._deferral = answerer, clock, deferral
        self._intake: Intake[_Job] = Intake(
            num_students=answerer.num_students,
            objective_s=objective_s,
            max_queue_tokens=max_queue_tokens,
            pass_tokens=pass_tokens,
            pass_texts=pass_texts,
            controller=controller,
            workers=workers,
            clock=clock,
        )
        self._tally = Tally(workers, clock)
        self._change = threading.Condition()
        self._is_open = True
        self._at_work = 0
        self._threads = [
            threading.Thread(target=self._work, name=f"zinfer-texts-{at}", daemon=True)
            for at in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, text: Encoded) -> Future[Served]:
        """Queue a text, as `submit_all`."""
        return self._submit([text], is_single=True)

    def submit_all(self, texts: Sequence[Encoded]) -> Future[list[Served]]:
        """Queue the texts of a caller, all or none: one pass takes them together where they fit into one.

        A future that is cancelled leaves the queue at once, and what was not yet in a pass is never computed; once
        all of its texts are in passes it cannot be cancelled.  A pass that raises fails it.

        Raises Overloaded ZI-2205 where the queue is full, BudgetError ZI-2206 for texts that it never holds,
        MachineError ZI-5341 once `drain` or `close` was called.
        """
        return self._submit(texts, is_single=False)

    def _submit(self, texts: Sequence[Encoded], *, is_single: bool) -> Future[Any]:
        assert texts, "a caller has at least one text"
        parcel = _Parcel(Future(), is_single)
        parcel.jobs = [_Job(text, parcel, at) for at, text in enumerate(texts)]
        with self._change:
            if not self._is_open:
                raise MachineError(
                    "ZI-5341",
                    "the scheduler takes no more texts: it is being closed",
                    remedy="another server",
                )
            numbers = self._intake.put_all([(job, len(job.text.ids)) for job in parcel.jobs])
            for job, number in zip(parcel.jobs, numbers, strict=True):
                job.number = number
            parcel.queued = len(texts)
            self._change.notify(len(texts))
        parcel.future.add_done_callback(partial(self._leave, parcel))
        return parcel.future

    def drain(self, timeout_s: float | None = None) -> bool:
        """Take no more texts and wait until all that were taken are answered; False where time ran out."""
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        with self._change:
            self._is_open = False
            self._change.notify_all()
            is_empty = self._change.wait_for(
                lambda: not len(self._intake.buffer) and not self._at_work, timeout_s
            )
        if not is_empty or self._deferral is None:
            return is_empty
        return self._deferral.drain(None if end_s is None else max(end_s - time.monotonic(), 0.0))

    def close(self) -> None:
        """Cancel what waits, let running passes and what was deferred end, end the threads.  May be called again."""
        with self._change:
            self._is_open = False
            waiting: list[_Parcel] = []
            while batch := self._intake.take()[1]:
                waiting += [one.item.parcel for one in batch]
            self._tally.cancelled += len(waiting)
            self._change.notify_all()
        for parcel in waiting:  # cancelling one twice does nothing
            parcel.future.cancel()
        for thread in self._threads:
            thread.join()
        if self._deferral is not None:
            self._deferral.drain()
            self._deferral.close()

    def stats(self) -> SchedulerStats:
        """What has been done so far, and the recent latencies."""
        with self._change:
            tally, buffer, controller = self._tally.frozen(), self._intake.buffer, self._intake.controller
            num_students = self.answerer.num_students if controller is None else controller.num_students
            texts, tokens, rejected = len(buffer), buffer.tokens, self._intake.rejected
        return tally.stats(
            queue_texts=texts, queue_tokens=tokens, num_students=num_students, rejected=rejected
        )

    def __enter__(self) -> TextScheduler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _leave(self, parcel: _Parcel, future: Future[Any]) -> None:
        """Take the texts of a future that was cancelled out of the queue."""
        if not future.cancelled():
            return
        with self._change:
            self._drop(parcel)
            parcel.claim()  # only now do those wake who wait for several futures

    def _drop(self, parcel: _Parcel) -> None:
        """What still waits of it will not be computed."""
        dropped = sum(self._intake.buffer.discard(job.number) for job in parcel.jobs)
        if dropped:
            self._tally.cancelled += dropped
            self._change.notify_all()

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: len(self._intake.buffer) or not self._is_open)
                num_students, batch = self._intake.take()
                if not batch:
                    return
                wanted = [one for one in batch if self._is_wanted(one.item.parcel)]
                left = len(batch) - len(wanted)
                self._tally.cancelled += left  # after they were queued, before `_drop` came
                self._at_work += 1
            try:
                if wanted:
                    self._serve(num_students, wanted)
            finally:
                with self._change:
                    self._at_work -= 1
                    self._change.notify_all()

    def _is_wanted(self, parcel: _Parcel) -> bool:
        """A text of it is about to be computed: the last one binds its caller."""
        parcel.queued -= 1
        return parcel.claim() if not parcel.queued else parcel.is_wanted and not parcel.future.cancelled()

    def _serve(self, num_students: int, batch: Sequence[Waiting[_Job]]) -> None:
        """One pass.  What it raises is raised by the future of each of its texts, and the worker lives on."""
        begin_s = self.clock()
        try:
            rows_SD, logits_SC = self.answerer.answer([one.item.text for one in batch], num_students)
            assert len(rows_SD) == len(batch), "a pass answers each of its texts once"
            wanted = [False] * len(batch)
            if self._deferral is not None and logits_SC is not None:
                wanted = self._deferral.wanted(logits_SC)
        except BaseException as error:  # a future nobody ends would be waited for for ever
            self._note(num_students, batch, begin_s, is_failed=True)
            self._fail(batch, error)
            return
        service_s = self._note(num_students, batch, begin_s)
        logits: Sequence[Tensor | None] = [None] * len(batch) if logits_SC is None else logits_SC.unbind()
        served = [
            Served(row_D, logits_C, num_students, begin_s - one.since_s, service_s)
            for row_D, logits_C, one in zip(rows_SD.unbind(), logits, batch, strict=True)
        ]
        answers = list(zip((one.item for one in batch), served, wanted, strict=True))
        self._fill([(job, answer) for job, answer, is_wanted in answers if not is_wanted])
        for job, answer, is_wanted in answers:
            if is_wanted:
                self._defer(job, answer)

    def _fail(self, batch: Sequence[Waiting[_Job]], error: BaseException) -> None:
        """The futures of a pass that raised raise the same; what waits of them is dropped."""
        failed = []
        with self._change:
            for parcel in (one.item.parcel for one in batch):
                if parcel.claim():
                    parcel.is_wanted = False
                    self._drop(parcel)
                    failed.append(parcel)
        for parcel in failed:
            parcel.future.set_exception(error)

    def _fill(self, answers: Sequence[tuple[_Job, Served]]) -> None:
        """Put answers into their parcels; those that are whole go to their callers."""
        whole = []
        with self._change:
            for job, served in answers:
                parcel = job.parcel
                parcel.answers[job.at] = served
                if len(parcel.answers) == len(parcel.jobs) and parcel.is_wanted:
                    whole.append(parcel)
        for parcel in whole:
            parcel.send()

    def _defer(self, job: _Job, by_students: Served) -> None:
        """Ask the teacher; the students' answer stands where the teacher gives none."""
        assert self._deferral is not None, "only a deferral wants a text deferred"
        try:
            asked = self._deferral.submit(job.text)
        except ZinferError:
            self._settle(job, by_students, None)
            return
        asked.add_done_callback(lambda future: self._settle(job, by_students, future))

    def _settle(self, job: _Job, by_students: Served, asked: Future[Served] | None) -> None:
        answer = by_students
        if asked is not None and not asked.cancelled() and (error := asked.exception()) is None:
            answer = _deferred(by_students, asked.result())
        elif asked is not None and not asked.cancelled():
            logger.warning("the teacher failed, the students' answer stands: %s", error)
        with self._change:
            self._tally.deferred += answer.is_deferred
            self._tally.kept += not answer.is_deferred
        self._fill([(job, answer)])

    def _note(
        self, num_students: int, batch: Sequence[Waiting[_Job]], begin_s: float, *, is_failed: bool = False
    ) -> float:
        """Books first, futures after: whoever waits for an answer finds it counted."""
        end_s = self.clock()
        tokens = sum(one.tokens for one in batch)
        waits = [begin_s - one.since_s for one in batch]
        with self._change:
            self._tally.add(num_students, tokens, waits, (begin_s, end_s), is_failed=is_failed)
            if not is_failed:
                self._intake.served(num_students, tokens, end_s - begin_s)
        return end_s - begin_s


def _deferred(by_students: Served, by_teacher: Served) -> Served:
    """The teacher's answer with the time of both."""
    return Served(
        by_teacher.representation_D,
        by_teacher.logits_C,
        by_students.num_students,
        by_students.queue_s + by_teacher.queue_s,
        by_students.service_s + by_teacher.service_s,
        is_deferred=True,
    )
