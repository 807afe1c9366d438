"""The load generator, its checks and the plain BERT of the server benchmarks.  Nothing here is timed."""

import asyncio
import json
import math
import sys
from itertools import pairwise

import pytest
import torch
from bench_modules import load
from serving_doubles import LABELS, listening
from text_models import write_encoder

from zinfer import Classifier

TEXTS = ["a", "bc", "def", "ghij"]


http_load, served, burst, soak = (
    load(name) for name in ("http_load", "served", "students_burst", "serve_soak")
)
export_onnx = load("export_onnx")


def test_arrivals_are_poisson_by_segment_and_the_same_for_a_seed():
    found = http_load.arrivals([[100.0, 5.0], [100.0, 25.0], [50.0, 0.0]], seed=3)
    assert found == sorted(found)
    assert found == http_load.arrivals([[100.0, 5.0], [100.0, 25.0], [50.0, 0.0]], seed=3)
    calm, busy = sum(at < 100 for at in found), sum(100 <= at < 200 for at in found)
    assert calm + busy == len(found)
    assert abs(calm - 500) < 5 * math.sqrt(500)
    assert abs(busy - 2500) < 5 * math.sqrt(2500)
    gaps = [after - before for before, after in pairwise(found[:calm])]
    mean = sum(gaps) / len(gaps)
    assert sum(gap * gap for gap in gaps) / len(gaps) / mean**2 == pytest.approx(2, abs=0.5), "memoryless"


def job_of(tmp_path, url, wrong=False, **changes):
    """A job against the double: a text of n letters has logits (0, n), whoever answers."""
    logits = [[0.0, float(len(text) + wrong)] for text in TEXTS]
    facts = {"labels": list(LABELS), "logits": {str(students): logits for students in (1, 2, 3)}}
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    texts_of = [[0, 1], [2, 3]]
    bodies = [json.dumps({"texts": [TEXTS[at] for at in some], "raw_scores": True}) for some in texts_of]
    given = {"url": url, "bodies": bodies, "texts_of": texts_of, "seed": 1, "segments": [[0.5, 100.0]]}
    return given | {"expected": str(tmp_path / "facts.json")} | changes


def offered(job):
    loading, checker = http_load.Load(job), http_load.Checker(job)
    seen = asyncio.run(loading.run())
    rights = [one.status == 200 and checker.is_right(at, one.body) for at, one in enumerate(seen)]
    return loading, seen, rights


@pytest.fixture(scope="module")
def here():
    with listening() as opened:
        yield opened


def test_every_answer_is_checked(here, tmp_path):
    loading, seen, rights = offered(job_of(tmp_path, here.about["url"], connections=7))
    assert len(seen) > 20
    assert all(rights)
    assert {one.students for one in seen} == {3}
    assert all(one.latency_s > 0 for one in seen)
    assert loading.held >= 7, "connections are held to the end"


def test_a_wrong_answer_is_seen(here, tmp_path):
    """Mutation: the model says something else than the server."""
    _, seen, rights = offered(job_of(tmp_path, here.about["url"], wrong=True))
    assert {one.status for one in seen} == {200}
    assert not any(rights)
    job = job_of(tmp_path, here.about["url"])
    checker = http_load.Checker(job)
    assert not checker.is_right(1, seen[0].body), "the neighbour's answer"


def test_refusals_and_broken_connections_are_told_apart(here, tmp_path):
    here.site.queue.max_queue_tokens = 0
    _, seen, _ = offered(job_of(tmp_path, here.about["url"]))
    here.site.queue.max_queue_tokens = 100
    assert {(one.status, one.retry_after) for one in seen} == {(429, True)}
    _, seen, _ = offered(job_of(tmp_path, "http://127.0.0.1:9"))
    assert {one.status for one in seen} == {http_load.BROKEN}


@pytest.mark.parametrize("says_so", [True, False])
def test_a_connection_that_is_being_closed_is_not_used_again(says_so, tmp_path):
    """As the server turns one away that is too many: it is told so, and that this was the end."""

    async def run():
        served = []

        async def turned_away(reader, writer):
            await reader.readuntil(b"}")
            served.append(1)
            close = b"connection: close\r\n" * says_so
            writer.write(b"HTTP/1.1 429 \r\nretry-after: 1\r\n" + close + b"content-length: 2\r\n\r\n{}")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(turned_away, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        loading = http_load.Load(job_of(tmp_path, f"http://127.0.0.1:{port}"))
        seen = [http_load.Seen(0.0) for _ in range(5)]
        for number, one in enumerate(seen):  # one after the other, so that a connection would be free
            await loading.one(number, one, 0.0)
        held = len(loading.idle)
        for connection in loading.idle:
            connection.transport.close()
        server.close()
        await server.wait_closed()
        await asyncio.sleep(0)
        return [one.status for one in seen], len(served), held

    statuses, served_count, idle = asyncio.run(run())
    if says_so:
        assert (statuses, served_count, idle) == ([429] * 5, 5, 0)
    else:
        assert http_load.BROKEN in statuses, "the mutation: who is not told runs into the end"


def test_what_is_in_time_and_what_is_not():
    rows = [[0.0, 0.01, 200, 3]] * 98 + [[0.0, 0.2, 200, 1], [0.0, 0.01, 429, 0]]
    assert burst.in_time(rows, 0.1) == 0.98
    assert burst.in_time([], 0.1) == 0.0, "nothing shows nothing"
    found = burst.told(rows, 0.1)
    assert found["by_status"] == {"200": 99, "429": 1}
    assert (found["p50_s"], found["p99_s"]) == (0.01, 0.2)
    assert burst.num_wrong([found]) == 0
    assert burst.num_wrong([{"by_status": {"-2": 3, "500": 1, "0": 5, "429": 7}}]) == 4
    assert burst.quantile([], 0.5) == math.inf


def test_the_verdict_names_what_falls_short():
    rates = {"teacher": 10.0, "adaptive": 15.0, "fixed": 12.0, "onnxruntime": 5.0}
    row = {"in_time": 0.995, "p99_s": 0.09, "students": 1.5, "by_status": {"200": 5}}
    late = {"burst": row | {"in_time": 0.5}}
    said = burst.lines(rates, {"batch": 3.0, "one": 3.5}, {"adaptive": {"burst": row}, "fixed": late})
    assert "1.50 x, NOT 0.7 x" in said[4]
    assert "3.00 x" in said[5]
    assert "holds" in said[6]
    assert "BREAKS" in said[7]


def test_the_floor_stands_beside_the_passes():
    rates = {"floor": 1000.0, "teacher": 10.0, "adaptive": 15.0, "fixed": 12.0}
    ratio = {"batch": 3.0, "one": 3.5, "teacher_s": 0.006, "student_s": 0.002}
    said = burst.lines(rates, ratio, {})
    assert "costs 1.00 ms by a bare Starlette, its passes 6.00 (teacher) and 2.00" in said[-1]


def test_the_burst_lies_between_what_the_two_bear():
    assert burst.burst_rate({"adaptive": 400.0, "fixed": 100.0}) == 200.0
    assert burst.burst_rate({"adaptive": 100.0, "fixed": 400.0}) == 90.0, (
        "never more than the controller bears"
    )
    assert burst.burst_rate({"adaptive": 100.0, "fixed": 0.0}) == 90.0
    assert burst.burst_rate({"adaptive": 0.0, "fixed": 0.0}) > 0


def test_load_without_a_model_checks_nothing(here, tmp_path, monkeypatch):
    """The floor answers with bytes that mean nothing."""
    here.site.service._room_at_s = 0.0  # whatever was refused before
    job = job_of(tmp_path, here.about["url"], expected=None)
    given, result = tmp_path / "job.json", tmp_path / "result.json"
    given.write_text(json.dumps(job))
    monkeypatch.setattr(sys, "argv", ["http_load.py", str(given), str(result)])
    http_load.main()
    found = json.loads(result.read_text())
    assert {row[2] for row in found["requests"]} == {200}
    assert found["largest_difference"] == 0.0


def test_the_soak_sees_each_fault():
    good = {"by_status": {"200": 10, "429": 90}}
    left = {"handles_more": 0, "queue_texts": 0.0, "in_flight": 0.0}
    assert soak.faults(good, 0, left, 1000, 1000) == []
    assert len(soak.faults({"by_status": {"200": 1, "429": 1, "500": 1}}, 0, left, 1000, 1000)) == 1
    assert len(soak.faults({"by_status": {"200": 1}}, 0, left, 1000, 1000)) == 1
    assert len(soak.faults(good, 2**30, left, 1000, 1000)) == 1
    assert len(soak.faults(good, 0, left | {"queue_texts": 1.0}, 1000, 1000)) == 1
    assert len(soak.faults(good, 0, left, 999, 1000)) == 1


def test_texts_are_windows_of_code_and_all_different():
    texts = served.code_texts(200)
    assert len(set(texts)) == 200
    assert all(60 <= len(text) <= 220 for text in texts)


@torch.no_grad()
def test_the_exported_model_is_the_teacher_padded(tmp_path):
    folder = write_encoder("bert", tmp_path / "bert", hidden_act="gelu")
    with Classifier(folder, device="cpu", machine="sim-default", threads=1) as classifier:
        encoded = classifier.encode(["the quick brown fox", "a dog", "import json def class"])
        _, expected = classifier.engine.answer(encoded, 1)
    longest = max(len(one.ids) for one in encoded)
    rows = [one.ids + (0,) * (longest - len(one.ids)) for one in encoded]
    mask = [(1,) * len(one.ids) + (0,) * (longest - len(one.ids)) for one in encoded]
    ids = torch.tensor(rows)
    found = export_onnx.PlainBert(folder)(ids, torch.zeros_like(ids), torch.tensor(mask))
    assert (found - expected).abs().max() < 1e-4
    whole = export_onnx.PlainBert(folder)(ids, torch.zeros_like(ids), torch.ones_like(ids))
    assert (whole - expected).abs().max() > 1e-3, "padding that is not masked would be seen"
