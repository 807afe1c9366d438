"""The scheduler before real engines: a group and a plain encoder give what they give alone, and no row is padding."""

import random
import threading
from concurrent.futures import CancelledError, wait

import pytest
import torch
from student_groups import COUNT, write_group_folder
from text_models import WORDS, write_encoder

from zinfer import Classifier
from zinfer.students import serving
from zinfer.students.controller import Controller, isotonic
from zinfer.students.opening import open_scheduler
from zinfer.students.scheduler import Overloaded, TextScheduler
from zinfer.tokenizer import Encoded, encode_texts

CPU = {"device": "cpu", "machine": "sim-default", "threads": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("engines")
    return {"group": write_group_folder(base / "group"), "encoder": write_encoder("bert", base / "encoder")}


def some_texts(count):
    draw = random.Random(3)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 40))) for _ in range(count)]


@pytest.mark.parametrize("kind", ["group", "encoder"])
def test_shared_passes_give_what_the_classifier_gives(kind, folders, monkeypatch):
    given, rows = some_texts(60), []
    with Classifier(folders[kind], **CPU) as classifier:
        engine = classifier.engine
        wanted = torch.from_numpy(classifier.embed(given))
        texts = encode_texts(engine.tokenizer, given, engine.max_tokens)
        packed = serving.pack_texts

        def counted(some, **how):
            batch = packed(some, **how)
            rows.append(batch.num_rows)
            return batch

        monkeypatch.setattr(serving, "pack_texts", counted)
        with open_scheduler(engine, pass_tokens=300) as scheduler:
            served = [future.result(60) for future in [scheduler.submit(one) for one in texts]]
            stats = scheduler.stats()
        ours = torch.stack([one.representation_D for one in served])
        assert (ours - wanted).abs().max() <= 1e-5
        assert (ours.flip(0) - wanted).abs().max() > 0.1, "the mutation: another text's answer is noticed"
        assert stats.rows == sum(len(one.ids) for one in texts)
        if kind == "group":
            assert sum(rows) == stats.rows, "what was computed is what the texts hold"
        assert {one.num_students for one in served} == {COUNT if kind == "group" else 1}
        assert served[0].logits_C.shape == (3,)


def test_fewer_students_under_load_and_every_answer_says_how_many(folders):
    """With a table that calls passes slow the controller falls to one student, and what it says is what answered."""
    with Classifier(folders["group"], **CPU) as classifier:
        engine, given = classifier.engine, some_texts(30)
        texts = encode_texts(engine.tokenizer, given, engine.max_tokens)
        alone = {m: engine.answer(texts, m)[0] for m in range(1, COUNT + 1)}
        table = isotonic((16, 256), [[0.01 * m, 0.1 * m] for m in range(1, COUNT + 1)])
        controller = Controller(table, 0.2, pass_tokens=256)
        controller.most_tokens = lambda busy_s: 10**6  # what is late is not refused here
        with TextScheduler(
            engine, objective_s=0.2, max_queue_tokens=10**6, pass_tokens=256, controller=controller
        ) as scheduler:
            served = scheduler.submit_all(texts).result(60)  # however fast passes are
            answers = scheduler.stats().answers
    assert min(answers) == 1, "under load one student answers"
    assert sum(answers.values()) == len(texts)
    for at, one in enumerate(served):
        assert (one.representation_D - alone[one.num_students][at]).abs().max() <= 1e-5
        other = alone[one.num_students % COUNT + 1][at]
        assert (one.representation_D - other).abs().max() > 1e-2, "the mutation: another number is noticed"


class Echo:
    """Answers with the first id; now and then a pass raises."""

    labels, max_tokens, num_students = (), 8, 1

    def __init__(self):
        self.draw = random.Random(5)

    def answer(self, texts, num_students):
        if self.draw.random() < 0.05:
            raise OSError("now and then")
        return torch.tensor([[float(one.ids[0])] for one in texts]), None


@pytest.mark.parametrize("workers", [1, 3])
def test_many_callers_who_cancel_and_overflow_lose_nothing(workers):
    counts = {"ok": 0, "failed": 0, "cancelled": 0, "refused": 0}
    lock = threading.Lock()

    def call(number):
        draw = random.Random(number)
        futures = {}
        for at in range(80):
            first = number * 1000 + at
            try:
                length = draw.randint(1, 8)
                future = scheduler.submit(Encoded((first,) * length, (0,) * length, is_cut=False))
            except Overloaded as error:
                assert error.retry_after_s > 0
                with lock:
                    counts["refused"] += 1
                continue
            futures[first] = future
            if draw.random() < 0.3:
                future.cancel()
        assert not wait(futures.values(), 60).not_done
        for first, future in futures.items():
            try:
                outcome = "ok" if future.result(0).representation_D.item() == first else "wrong"
            except CancelledError:
                outcome = "cancelled"
            except OSError:
                outcome = "failed"
            with lock:
                counts[outcome] += 1

    with TextScheduler(
        Echo(), objective_s=0.1, max_queue_tokens=60, pass_tokens=16, controller=None, workers=workers
    ) as scheduler:
        threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(90)
        assert scheduler.drain(30)
        stats = scheduler.stats()
    assert sum(counts.values()) == 4 * 80
    assert counts["ok"] > 0
    assert counts["cancelled"] > 0
    assert (stats.queue_texts, stats.queue_tokens) == (0, 0)
    assert sum(stats.answers.values()) == counts["ok"]
    assert (stats.failed, stats.rejected) == (counts["failed"], counts["refused"])
    assert stats.cancelled == counts["cancelled"], "also those that were cancelled as a worker took them"
