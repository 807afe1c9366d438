"""Real encoders and groups behind the application: what is served is what `Classifier` says of the same texts."""

import asyncio
import threading
import time
from contextlib import contextmanager

import httpx2
import numpy as np
import pytest
import torch
from student_groups import write_group_folder
from text_models import write_encoder, write_sentence_files

from zinfer import Classifier
from zinfer.config.schema import Serve, Settings
from zinfer.errors import BudgetError, IntegrityError
from zinfer.serving.app import make_app
from zinfer.serving.model import ServedClassifier, open_queue
from zinfer.serving.service import Service
from zinfer.serving.threads import settings_beside

CPU = {"device": "cpu", "machine": "sim-default", "threads": 1}
TEXTS = ["the quick brown fox", "", "a lazy dog", ("import json", "read files"), "the " * 100, "fox"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    bare = write_encoder("bert", root / "bare", architectures=["BertModel"])
    return {
        "group": write_group_folder(root / "group"),
        "bert": write_encoder("bert", root / "bert"),
        "roberta": write_encoder("roberta", root / "roberta"),
        "sentences": write_sentence_files(bare, max_seq_length=16, do_lower_case=True),
    }


@contextmanager
def served(folder, students=None, teacher=None, defer_below=None, **limits):
    """(classifier, ask) where ask(path, body) is a response of a warm server over the classifier."""
    limits = Serve.model_validate({"objective_ms": 10_000} | limits)
    given = {"students": students, "teacher": teacher, "defer_below": defer_below} | CPU
    with Classifier(folder, **given) as classifier:
        service = Service(ServedClassifier(classifier), open_queue(classifier, limits), limits)
        try:
            service.warm()
            transport = httpx2.ASGITransport(make_app(service))

            async def post(path, body):
                async with httpx2.AsyncClient(transport=transport, base_url="http://here") as client:
                    return await client.post(path, json=body, timeout=60)

            yield classifier, lambda path, body: asyncio.run(post(path, body))
        finally:
            service.close()


def in_json(texts):
    return [text if isinstance(text, str) else list(text) for text in texts]


@pytest.mark.parametrize("name", ["group", "bert", "roberta"])
def test_predictions_are_the_classifiers(folders, name):
    with served(folders[name]) as (classifier, ask):
        found = ask("/predict", {"texts": in_json(TEXTS)}).json()
        expected = classifier.classify(TEXTS, top_k=None)
        for row, labels in zip(found["results"], expected, strict=True):
            assert [one["label"] for one in row["labels"]] == [one["label"] for one in labels]
            scores = [one["score"] for one in labels]
            assert [one["score"] for one in row["labels"]] == pytest.approx(scores, abs=1e-5)
        assert [row["truncated"] for row in found["results"]] == [text == TEXTS[4] for text in TEXTS]
        assert len({row["labels"][0]["score"] for row in found["results"]}) == len(TEXTS), "texts differ"
        assert (found["students"], found["of"]) == ((3, 3) if name == "group" else (1, 1))
        raw = ask("/predict", {"inputs": TEXTS[0], "raw_scores": True}).json()
        expected_raw = classifier.classify(TEXTS[0], top_k=None, raw_scores=True)
        assert [one["score"] for one in raw] == pytest.approx(
            [one["score"] for one in expected_raw], abs=1e-5
        )


@pytest.mark.parametrize("name", ["group", "sentences"])
def test_vectors_are_the_classifiers(folders, name):
    with served(folders[name]) as (classifier, ask):
        rows = np.array(ask("/embed", {"inputs": ["The fox", "a dog"], "normalize": False}).json())
        unit = np.array(ask("/embed", {"inputs": ["The fox", "a dog"]}).json())
        assert np.allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
        found, expected = (unit if name == "sentences" else rows), classifier.embed(["The fox", "a dog"])
        assert np.abs(found - expected).max() < 1e-5
        if name == "sentences":
            refused = ask("/predict", {"inputs": "a"})
            assert (refused.status_code, refused.json()["code"]) == (424, "ZI-1183")


def test_fewer_students_answer_and_say_so(folders):
    with served(folders["group"]) as (_, ask):
        whole = ask("/embed", {"inputs": "the fox"})
    with served(folders["group"], students=1) as (classifier, ask):
        found = ask("/embed", {"inputs": "the fox", "normalize": False})
        assert (found.headers["x-students"], whole.headers["x-students"]) == ("1", "3")
        assert np.abs(np.array(found.json()[0]) - classifier.embed("the fox")[0]).max() < 1e-5
        assert np.abs(np.array(found.json()[0]) - np.array(whole.json()[0])).max() > 0.1


@pytest.mark.parametrize(("below", "is_deferred"), [(1.0, True), (0.0, False)])
def test_the_teacher_answers_what_students_are_not_sure_of_and_the_answer_says_so(
    folders, below, is_deferred
):
    texts = ["the fox", "a dog"]
    with served(folders["group"], teacher=folders["bert"], defer_below=below) as (_, ask):
        found = ask("/predict", {"texts": texts}).json()["results"]
    with Classifier(folders["bert" if is_deferred else "group"], **CPU) as classifier:
        expected = classifier.classify(texts, top_k=None)
    assert [row["deferred"] for row in found] == [is_deferred] * 2
    for row, labels in zip(found, expected, strict=True):
        scores = {one["label"]: one["score"] for one in labels}
        assert {one["label"]: one["score"] for one in row["labels"]} == pytest.approx(scores, abs=1e-5)


def test_many_at_once_get_their_own_answers(folders, monkeypatch):
    """Requests that share passes: an answer that went to its neighbour would be seen.

    The first pass waits until the others are queued, so that they do share.
    """
    monkeypatch.setattr("zinfer.serving.service._MOST_BEFORE_S", float("inf"))
    texts = ["the " * at + "fox" for at in range(1, 24)]
    limits = Serve(objective_ms=10_000)
    with Classifier(folders["group"], **CPU) as classifier:
        expected = classifier.embed(texts)
        service = Service(ServedClassifier(classifier), open_queue(classifier, limits), limits)
        service.warm()
        plain, is_first = classifier.engine.answer, []

        def answer(given, num_students):
            if not is_first:
                is_first.append(True)
                end_s = time.monotonic() + 60
                while service.queue.stats().queue_texts < len(texts) - len(given):
                    assert time.monotonic() < end_s
                    time.sleep(0.001)
            return plain(given, num_students)

        monkeypatch.setattr(classifier.engine, "answer", answer)

        async def all_at_once():
            transport = httpx2.ASGITransport(make_app(service))
            async with httpx2.AsyncClient(transport=transport, base_url="http://here") as client:
                body = [{"inputs": text, "normalize": False} for text in texts]
                return await asyncio.gather(*(client.post("/embed", json=one) for one in body))

        found = asyncio.run(all_at_once())
        passes = service.queue.stats().passes
        service.close()
    rows = np.array([one.json()[0] for one in found])
    assert np.abs(rows - expected).max() < 1e-5
    assert np.abs(np.roll(rows, 1, axis=0) - expected).max() > 1e-2, (
        "neighbours differ, or nothing was compared"
    )
    assert passes < len(texts), "passes were shared"


def test_the_beginning_can_be_cut_off(folders):
    with served(folders["bert"]) as (classifier, ask):
        long = "fox " * 80 + "dog"
        left = ask("/embed", {"inputs": long, "truncation_direction": "Left", "normalize": False}).json()
        same = classifier.embed("fox " * 61 + "dog")
        assert np.abs(np.array(left) - same).max() < 1e-4
        refused = ask("/embed", {"inputs": long, "truncate": False})
        assert (refused.status_code, refused.json()["code"]) == (413, "ZI-1181")
        assert "more than 64 tokens" in refused.json()["message"]


def test_an_objective_that_no_pass_can_hold_names_one_that_works(folders):
    with (
        Classifier(folders["group"], **CPU) as classifier,
        pytest.raises(BudgetError, match="ZI-2207") as caught,
    ):
        open_queue(classifier, Serve(objective_ms=0.001))
    remedy, value = caught.value.remedy.split()
    assert remedy == "--objective-ms"
    assert float(value) >= 1
    with Classifier(folders["bert"], **CPU) as classifier:
        open_queue(classifier, Serve(objective_ms=0.001)).close()  # one model has no choice, and no objective


def test_a_teacher_that_cannot_answer_leaves_no_thread(folders, monkeypatch):
    def broken(_self, _texts, _students=1):
        raise IntegrityError("ZI-6101", "block 3", remedy="zinfer verify")

    options = {"teacher": folders["bert"], "defer_below": 0.5}
    with Classifier(folders["group"], **options, **CPU) as classifier:
        before = set(threading.enumerate())
        monkeypatch.setattr(type(classifier._teacher), "answer", broken)
        with pytest.raises(IntegrityError, match="ZI-6101"):
            open_queue(classifier, Serve())
        assert set(threading.enumerate()) <= before


def test_nothing_is_kept_after_the_end(folders):
    before = set(threading.enumerate())
    with served(folders["group"]) as (_, ask):
        assert ask("/embed", {"inputs": "a"}).status_code == 200
        assert set(threading.enumerate()) - before
    assert set(threading.enumerate()) <= before
    assert torch.get_num_threads() == 1


def test_passes_leave_cores_to_requests(monkeypatch):
    settings = Settings()
    for cores, threads in ((1, 1), (2, 1), (16, 8)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert settings_beside(settings).runtime.threads == threads
    asked = settings.model_copy(update={"runtime": settings.runtime.model_copy(update={"threads": 5})})
    assert settings_beside(asked) == asked
