"""Texts of many callers in shared passes: every answer once and right, whatever is cancelled, fails or overflows."""

import threading
from concurrent.futures import CancelledError, Future, wait

import pytest
import torch

from zinfer.errors import BudgetError, MachineError, ZinferError
from zinfer.students.opening import measured, open_scheduler
from zinfer.students.scheduler import Overloaded, TextScheduler
from zinfer.tokenizer import Encoded


def text(*ids):
    return Encoded(tuple(ids), (0,) * len(ids), is_cut=False)


class Sums:
    """Answers with the sum of the ids; passes go through a gate, so that a test says when.  An id of 13 raises."""

    labels = ("sum", "count")
    max_tokens = 64

    def __init__(self, num_students=3, *, is_open=True):
        self.num_students = num_students
        self.gate, self.begun = threading.Event(), threading.Semaphore(0)
        self.passes = []
        if is_open:
            self.gate.set()

    def answer(self, texts, num_students):
        self.begun.release()
        assert self.gate.wait(30)
        self.passes.append((num_students, [one.ids for one in texts]))
        if any(13 in one.ids for one in texts):
            raise RuntimeError("thirteen")
        sums = torch.tensor([float(sum(one.ids)) for one in texts])
        counts = torch.tensor([float(len(one.ids)) for one in texts])
        return sums[:, None], torch.stack([sums, counts], 1)


def opened(answerer, **options):
    given = {"objective_s": None, "max_queue_tokens": 1000, "pass_tokens": 100, "controller": None}
    return TextScheduler(answerer, **(given | options))


@pytest.mark.parametrize("workers", [1, 3])
def test_every_text_gets_its_own_answer(workers):
    answerer = Sums()
    given = [text(*range(1, 2 + at % 9)) for at in range(200)]
    with opened(answerer, workers=workers, max_queue_tokens=10_000) as scheduler:
        served = [future.result(30) for future in [scheduler.submit(one) for one in given]]
        stats = scheduler.stats()
    for one, answer in zip(given, served, strict=True):
        assert answer.representation_D.tolist() == [sum(one.ids)]
        assert answer.logits_C.tolist() == [sum(one.ids), len(one.ids)]
        assert (answer.num_students, answer.is_deferred) == (3, False)
        assert answer.queue_s >= 0
        assert answer.service_s >= 0
    assert stats.rows == sum(len(one.ids) for one in given), "no row of padding is computed"
    assert sum(len(texts) for _, texts in answerer.passes) == len(given), "each text is computed once"
    assert stats.passes == len(answerer.passes)
    assert stats.answers == {3: len(given)}
    assert (stats.queue_texts, stats.queue_tokens, stats.failed, stats.rejected) == (0, 0, 0, 0)
    assert stats.queue_p50_s <= stats.queue_p99_s
    assert 0 < stats.busy_share <= 1


def test_an_idle_worker_takes_what_is_there_and_a_busy_one_collects():
    answerer = Sums(is_open=False)
    with opened(answerer) as scheduler:
        first = scheduler.submit(text(1, 2))
        assert answerer.begun.acquire(timeout=30), "the first text is taken at once, alone"
        rest = [scheduler.submit(text(3, 4)) for _ in range(5)]
        assert scheduler.stats().queue_texts == 5
        answerer.gate.set()
        wait([first, *rest], 30)
    assert [len(texts) for _, texts in answerer.passes] == [1, 5], "what came meanwhile shares a pass"


def test_texts_of_one_caller_come_together_so_an_idle_worker_takes_all_of_them():
    answerer = Sums()
    with opened(answerer, workers=3) as scheduler:
        served = scheduler.submit_all([text(at, at) for at in range(1, 11)]).result(30)
        assert [one.representation_D.item() for one in served] == list(range(2, 22, 2))
    assert [len(texts) for _, texts in answerer.passes] == [10], "never the first of them alone"


def test_more_than_a_pass_holds_is_shared_by_workers():
    answerer = Sums(is_open=False)
    with opened(answerer, workers=2, pass_tokens=20) as scheduler:
        future = scheduler.submit_all([text(at, at) for at in range(20, 40)])
        for _ in range(2):
            assert answerer.begun.acquire(timeout=30), "both are at work"
        answerer.gate.set()
        assert [one.representation_D.item() for one in future.result(30)] == list(range(40, 80, 2))


def test_a_caller_has_all_or_none_of_its_texts_queued():
    answerer = Sums(is_open=False)
    with opened(answerer, max_queue_tokens=10) as scheduler:
        scheduler.submit(text(1))
        assert answerer.begun.acquire(timeout=30)
        scheduler.submit_all([text(1, 2), text(3, 4)])
        with pytest.raises(Overloaded):
            scheduler.submit_all([text(*range(5)), text(7, 8)])
        with pytest.raises(BudgetError, match="2 texts of 12 tokens"):
            scheduler.submit_all([text(*range(6)), text(*range(6))])
        assert scheduler.stats().queue_texts == 2
        assert scheduler.stats().rejected == 1
        answerer.gate.set()


def test_a_full_queue_says_when_to_come_again():
    answerer = Sums(is_open=False)
    with opened(answerer, max_queue_tokens=10) as scheduler:
        scheduler.submit(text(*range(10)))
        assert answerer.begun.acquire(timeout=30)
        scheduler.submit(text(*range(8)))
        with pytest.raises(Overloaded) as caught:
            scheduler.submit(text(1, 2, 3))
        assert isinstance(caught.value, BudgetError)
        assert caught.value.code == "ZI-2205"
        assert caught.value.retry_after_s > 0
        scheduler.submit(text(1, 2))
        assert scheduler.stats().rejected == 1
        with pytest.raises(BudgetError, match="ZI-2206"):
            scheduler.submit(text(*range(11)))
        answerer.gate.set()
        assert scheduler.drain(30)
        assert scheduler.stats().answers == {3: 3}


def test_a_caller_may_leave_until_its_last_text_is_in_a_pass():
    answerer = Sums(is_open=False)
    with opened(answerer, pass_tokens=4) as scheduler:
        future = scheduler.submit_all([text(1, 2), text(3, 4), text(5, 6), text(7, 8)])
        assert answerer.begun.acquire(timeout=30), "the first two of them are in a pass"
        assert future.cancel()
        assert wait([future], 30).not_done == set()
        answerer.gate.set()
        assert scheduler.submit(text(9)).result(30).representation_D.item() == 9
        assert scheduler.stats().cancelled == 2, "the other two"
    assert [len(texts) for _, texts in answerer.passes] == [2, 1]


def test_of_what_has_failed_no_more_is_computed():
    answerer = Sums(is_open=False)
    with opened(answerer, pass_tokens=4) as scheduler:
        future = scheduler.submit_all([text(1, 2), text(13, 4), text(5, 6)])
        assert answerer.begun.acquire(timeout=30)
        answerer.gate.set()
        with pytest.raises(RuntimeError, match="thirteen"):
            future.result(30)
        assert scheduler.drain(30)
        assert (scheduler.stats().failed, scheduler.stats().cancelled) == (2, 1)
    assert len(answerer.passes) == 1


def test_what_is_cancelled_is_not_computed():
    answerer = Sums(is_open=False)
    with opened(answerer, max_queue_tokens=10) as scheduler:
        running = scheduler.submit(text(1))
        assert answerer.begun.acquire(timeout=30)
        cancelled = scheduler.submit(text(*range(2, 12)))
        assert cancelled.cancel()
        assert wait([cancelled], 30).not_done == set(), "who waits for several futures hears of it"
        assert not running.cancel(), "a pass that has begun goes on"
        kept = scheduler.submit(text(*range(20, 30)))  # the cancelled text's room is free at once
        answerer.gate.set()
        assert kept.result(30).representation_D.item() == sum(range(20, 30))
        assert scheduler.stats().cancelled == 1
    assert [ids for _, texts in answerer.passes for ids in texts] == [(1,), tuple(range(20, 30))]


def test_what_is_cancelled_as_a_worker_takes_it_is_counted(monkeypatch):
    """Between the cancelling and its callback, which takes the text out of the queue, the worker comes."""
    taken = threading.Event()
    plain = Future.set_running_or_notify_cancel

    def noticed(future):
        try:
            return plain(future)
        finally:
            if future.cancelled():
                taken.set()

    monkeypatch.setattr(Future, "set_running_or_notify_cancel", noticed)
    answerer = Sums(is_open=False)
    with opened(answerer) as scheduler:
        scheduler.submit(text(1))
        assert answerer.begun.acquire(timeout=30)
        cancelled = scheduler.submit(text(2))
        cancelled._done_callbacks.insert(0, lambda _: answerer.gate.set() or taken.wait(30))
        assert cancelled.cancel()
        assert taken.is_set(), "a worker took it first"
        assert scheduler.drain(30)
        assert scheduler.stats().cancelled == 1
    assert [ids for _, texts in answerer.passes for ids in texts] == [(1,)]


def test_a_pass_that_raises_fails_its_texts_and_the_worker_lives_on():
    answerer = Sums(is_open=False)
    with opened(answerer) as scheduler:
        scheduler.submit(text(1))
        assert answerer.begun.acquire(timeout=30)
        doomed = [scheduler.submit(text(13, at)) for at in range(3)]
        answerer.gate.set()
        for future in doomed:
            with pytest.raises(RuntimeError, match="thirteen"):
                future.result(30)
        assert scheduler.submit(text(4, 5)).result(30).representation_D.item() == 9
        assert scheduler.stats().failed == 3


def test_draining_answers_what_was_taken_and_nothing_else():
    answerer = Sums(is_open=False)
    scheduler = opened(answerer)
    futures = [scheduler.submit(text(at + 20)) for at in range(4)]
    assert not scheduler.drain(0.01), "time ran out, and says so"
    with pytest.raises(MachineError, match="ZI-5341"):
        scheduler.submit(text(1))
    answerer.gate.set()
    assert scheduler.drain(30)
    assert [future.result(0).representation_D.item() for future in futures] == [20, 21, 22, 23]
    scheduler.close()
    scheduler.close()


def test_closing_cancels_what_waits_and_ends_the_threads():
    before = set(threading.enumerate())
    answerer = Sums(is_open=False)
    scheduler = opened(answerer, workers=2, pass_tokens=1)
    running = [scheduler.submit(text(at)) for at in range(2)]
    assert all(answerer.begun.acquire(timeout=30) for _ in running)
    waiting = [scheduler.submit(text(at)) for at in range(5)]
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    assert wait(waiting, 30).not_done == set()
    for future in waiting:
        with pytest.raises(CancelledError):
            future.result(0)
    answerer.gate.set()
    closing.join(30)
    assert [future.result(0).representation_D.item() for future in running] == [0, 1]
    assert set(threading.enumerate()) <= before
    assert scheduler.stats().cancelled == 5


def test_opening_measures_every_number_of_students():
    answerer = Sums()
    with open_scheduler(answerer, objective_s=60.0, pass_tokens=300) as scheduler:
        assert scheduler.submit(text(1, 2)).result(30).num_students == 3
    seen = {(m, sum(map(len, texts))) for m, texts in answerer.passes[:-1]}
    assert seen == {(m, tokens) for m in (1, 2, 3) for tokens in (16, 64, 256, 300)}
    assert all(len(ids) <= answerer.max_tokens for _, texts in answerer.passes for ids in texts)


def test_passes_longer_than_the_objective_are_not_tried_again_with_more_students():
    now, answerer = [0.0], Sums()

    def slow(texts, num_students):
        now[0] += num_students * 0.001 * sum(len(one.ids) for one in texts)
        return Sums.answer(answerer, texts, num_students)

    answerer.answer = slow
    table = measured(answerer, 2000, 0.1, clock=lambda: now[0])
    assert table.tokens == (16, 64, 256), "the first pass that is too long is the largest"
    for m in (1, 2, 3):
        assert [table.at(m, tokens) for tokens in table.tokens] == pytest.approx(
            [0.016 * m, 0.064 * m, 0.256 * m]
        )
    tried = [(m, sum(map(len, texts))) for m, texts in answerer.passes]
    assert (2, 256) not in tried
    assert (3, 64) not in tried
    assert (2, 64) in tried


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"objective_s": 0.0}, "ZI-1162"),
        ({"objective_s": float("nan")}, "ZI-1162"),
        ({"least": 4}, "ZI-1163"),
        ({"least": 0}, "ZI-1163"),
        ({"objective_s": 1e-12}, "ZI-2207"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, code):
    with pytest.raises(ZinferError, match=code) as caught:
        open_scheduler(Sums(), **options)
    assert caught.value.remedy
