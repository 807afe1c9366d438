"""Routes, statuses and what is left behind, with doubles of the model and its queue and no socket."""

import asyncio
import json
import math

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving_doubles import LABELS, LetterModel, expected_row, site

from zinfer.config.schema import Serve
from zinfer.errors import UsageError
from zinfer.serving.access import check_binding, is_loopback
from zinfer.serving.shift import Shift

PATHS = ("/predict", "/embed", "/health", "/ready", "/info", "/metrics", "/openapi.json")
ROW = expected_row(LetterModel().encode(["abc"], "right")[0])


def go(work):
    """Run one coroutine to its end."""
    return asyncio.run(asyncio.wait_for(work, 60))


def ask(here, path, body, **headers):
    """One POST of JSON."""

    async def posted():
        async with here.client(**headers) as client:
            return await client.post(path, json=body)

    return go(posted())


def get(here, path, **headers):
    async def got():
        async with here.client(**headers) as client:
            return await client.get(path)

    return go(got())


def scores(length):
    """Softmax of what the double says of a text of so many tokens, likeliest first."""
    many = 1 / (1 + math.exp(-length))
    return [("many", many), ("few", 1 - many)]


def labels_of(found):
    return [(one["label"], pytest.approx(one["score"])) for one in found]


class TestAnswers:
    def test_predict_has_teis_shapes(self):
        with site() as here:
            one = ask(here, "/predict", {"inputs": "abc"})
            assert (one.status_code, one.headers["x-students"]) == (200, "3")
            assert labels_of(one.json()) == scores(3)
            pair = ask(here, "/predict", {"inputs": ["a", "b"]}).json()
            assert labels_of(pair) == scores(3), "two strings are a pair: 'a|b'"
            batch = ask(here, "/predict", {"inputs": [["a"], ["a", "b"]]}).json()
            assert [labels_of(found) for found in batch] == [scores(1), scores(3)]
            raw = ask(here, "/predict", {"inputs": "abc", "raw_scores": True}).json()
            assert [one["score"] for one in raw] == [3.0, 0.0]

    def test_texts_say_who_answered_each(self):
        with site() as here:
            found = ask(here, "/predict", {"texts": ["a", ["a", "b"], "x" * 9], "top_k": 1}).json()
            assert [len(row["labels"]) for row in found["results"]] == [1, 1, 1]
            assert [row["tokens"] for row in found["results"]] == [1, 3, 8]
            assert [row["truncated"] for row in found["results"]] == [False, False, True]
            assert (found["students"], found["of"]) == (3, 3)
            here.queue.num_students = 1
            found = ask(here, "/predict", {"texts": ["a"]})
            assert found.headers["x-students"] == "1"
            assert found.json()["results"][0]["students"] == 1

    def test_embed_has_a_vector_per_text(self):
        with site() as here:
            rows = ask(here, "/embed", {"inputs": ["abc", "d"], "normalize": False}).json()
            assert rows[0] == ROW
            assert len(rows) == 2
            (one,) = ask(here, "/embed", {"inputs": "abc"}).json()
            assert one == pytest.approx([value / math.hypot(*ROW) for value in ROW], rel=1e-6)
            plain = ask(here, "/embed", {"texts": ["abc"], "normalize": False}).json()
            assert plain["results"][0]["embedding"] == ROW

    def test_a_long_answer_is_written_off_the_loop_and_is_the_same(self, monkeypatch):
        body = {"inputs": ["abc", "d"]}
        with site() as here:
            short = ask(here, "/embed", body).content
            monkeypatch.setattr("zinfer.serving.service.FEW_NUMBERS", 1)
            assert ask(here, "/embed", body).content == short

    def test_which_end_is_cut(self):
        with site() as here:
            for direction, kept in (("Right", "abcdefgh"), ("left", "cdefghij")):
                body = {"texts": ["abcdefghij"], "truncation_direction": direction, "normalize": False}
                row = ask(here, "/embed", body).json()["results"][0]["embedding"]
                assert row[0] == sum(map(ord, kept))
            found = ask(here, "/embed", {"inputs": "x" * 9, "truncate": False})
            assert (found.status_code, found.json()["code"]) == (413, "ZI-1181")
            assert ask(here, "/embed", {"inputs": "x" * 8, "truncate": False}).status_code == 200
            assert here.queue.answered == 3, "what is refused is not computed"


class TestRefusals:
    @pytest.mark.parametrize(
        ("headers", "content", "status", "code"),
        [
            ({}, b'{"inputs": "a"}', 415, "ZI-1175"),
            ({"content-type": "text/plain"}, b'{"inputs": "a"}', 415, "ZI-1175"),
            ({"content-type": "application/json", "content-encoding": "gzip"}, b"x", 415, "ZI-1175"),
            ({"content-type": "application/json; charset=utf-8"}, b'{"inputs": "a"}', 200, None),
            ({"content-type": "application/json"}, b"nothing", 400, "ZI-1176"),
            ({"content-type": "application/json"}, b'{"inputs": "\xff"}', 400, "ZI-1176"),
            ({"content-type": "application/json"}, b'{"inputs": "%s"}' % (b"x" * 90), 413, "ZI-1178"),
        ],
    )
    def test_bodies(self, headers, content, status, code):
        async def posted(here, given):
            async with here.client() as client:
                return await client.post("/predict", content=given, headers=headers)

        async def pieces():
            yield content[:8]
            yield content[8:]

        with site(max_body=64) as here:
            for given in (content, pieces()):  # with a length, and in pieces whose sum nobody has said
                found = go(posted(here, given))
                assert found.status_code == status
                assert status == 200 or found.json()["code"] == code

    def test_paths_and_methods_that_there_are_not(self):
        with site() as here:
            found = get(here, "/v1/embeddings")
            assert (found.status_code, found.json()["code"]) == (404, "ZI-1172")
            assert "/embed" in found.json()["remedy"]
            found = get(here, "/predict")
            assert (found.status_code, found.json()["code"]) == (405, "ZI-1173")
            assert "POST" in found.json()["remedy"]
            assert ask(here, "/health", {}).status_code == 405

    def test_a_model_without_a_head_predicts_nothing(self):
        with site() as here:
            here.model.labels = ()
            found = ask(here, "/predict", {"inputs": "a"})
            assert (found.status_code, found.json()["code"]) == (424, "ZI-1183")
            assert found.json()["error_type"] == "Backend"
            assert ask(here, "/embed", {"inputs": "a"}).status_code == 200
            assert "embedding" in get(here, "/info").json()["model_type"]

    def test_a_full_queue_refuses_the_whole_request_and_says_when(self):
        with site() as here:
            here.queue.max_queue_tokens = 10
            here.queue.is_open = False
            found = ask(here, "/embed", {"texts": ["abcd", "abcd", "abcd"]})
            assert (found.status_code, found.json()["code"]) == (429, "ZI-2210")
            assert found.headers["retry-after"] == "3", "2.25 s, rounded up"
            assert found.json()["retry_after_s"] == 2.25
            assert found.json()["error_type"] == "Overloaded"
            assert (here.queue.waiting, here.queue.cancelled) == ([], 0), (
                "none was queued and taken out again"
            )

    def test_what_no_queue_holds_is_told_so_and_not_to_come_again(self):
        with site(queue_tokens=10) as here:
            found = ask(here, "/embed", {"texts": ["abcd"] * 3})
            assert (found.status_code, found.json()["code"]) == (413, "ZI-1185")
            assert "retry-after" not in found.headers
            assert ask(here, "/embed", {"texts": ["abcd"] * 2}).status_code == 200
            assert here.queue.answered == 2

    def test_until_there_should_be_room_nothing_is_read_or_cut(self, monkeypatch):
        with site() as here:
            here.queue.max_queue_tokens = 3
            assert ask(here, "/embed", {"inputs": "abcd"}).status_code == 429
            here.queue.max_queue_tokens = 100
            here.model.at_gate.clear()
            found = ask(here, "/embed", {"inputs": "a"})
            assert (found.status_code, found.json()["code"]) == (429, "ZI-2210")
            assert 0 < found.json()["retry_after_s"] <= 2.25
            assert not here.model.at_gate.is_set()
            monkeypatch.setattr("zinfer.serving.service.time.perf_counter", lambda: 1e12)
            assert ask(here, "/embed", {"inputs": "a"}).status_code == 200

    def test_no_more_is_taken_than_can_soon_be_parsed(self, monkeypatch):
        """With the threads busy, requests wait for them up to half a second's work and are then refused unread."""
        monkeypatch.setattr("zinfer.serving.service.SHORT_BYTES", 0)

        async def many(here):
            here.service._begin_s = 0.2
            here.model.gate.clear()
            async with here.client() as client:
                asked = [
                    asyncio.ensure_future(client.post("/embed", json={"inputs": "a"})) for _ in range(20)
                ]
                await until(lambda: sum(one.done() for one in asked) >= 14)
                here.model.gate.set()
                return await asyncio.gather(*asked)

        with site() as here:
            found = [one.status_code for one in go(many(here))]
            assert set(found) == {200, 429}
            assert found.count(200) <= 6, "0.6 s of work before two threads"
            assert here.service._beginning == 0

    def test_a_failing_pass_and_a_failing_tokenizer(self):
        with site() as here:
            here.queue.error = RuntimeError("/secret")
            found = ask(here, "/embed", {"inputs": "a"})
            assert (found.status_code, found.json()["code"]) == (424, "ZI-5353")
            assert "secret" not in found.text
            here.queue.error = None
            here.model.encode = lambda texts, direction: (_ for _ in ()).throw(
                UsageError("ZI-1132", "text 0 has no token", remedy="leave it out")
            )
            found = ask(here, "/embed", {"inputs": "a"})
            assert (found.status_code, found.json()["error_type"]) == (422, "Tokenizer")
            here.model.encode = lambda texts, direction: 1 / 0
            found = ask(here, "/embed", {"inputs": "a"})
            assert (found.status_code, found.json()["code"]) == (500, "ZI-0001")
            assert "division" not in found.text

    def test_bodies_that_wait_have_a_bound_together(self):
        async def two(here):
            body = {"inputs": "a" * 8}
            here.queue.is_open = False
            async with here.client() as client:
                first = asyncio.ensure_future(client.post("/embed", json=body))
                await until(lambda: here.queue.waiting)
                second = await client.post("/embed", json=body)
                here.queue.answer()
                return await first, second

        with site(max_bodies=30) as here:
            first, second = go(two(here))
            assert (first.status_code, second.status_code) == (200, 429)
            assert second.json()["code"] == "ZI-2211"
            here.queue.is_open = True
            assert ask(here, "/embed", {"inputs": "a" * 8}).status_code == 200, "what was held is given back"

    def test_a_body_that_does_not_come(self):
        async def late():
            yield b'{"inputs"'
            await asyncio.sleep(60)

        async def posted(here):
            async with here.client() as client:
                return await client.post(
                    "/embed", content=late(), headers={"content-type": "application/json"}
                )

        with site(body_s=0.05) as here:
            found = go(posted(here))
            assert (found.status_code, found.json()["code"]) == (408, "ZI-1182")
            assert found.headers["connection"] == "close"


async def until(is_so):
    """Wait for something that another thread does."""
    for _ in range(2000):
        if is_so():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came to be")


class TestKey:
    def test_every_path_but_health_needs_it(self):
        with site(api_key="sesame") as here:
            for path in PATHS:
                for given in ({}, {"authorization": "Bearer open"}, {"authorization": "Basic sesame"}):
                    for found in (get(here, path, **given), ask(here, path, {"inputs": "a"}, **given)):
                        if path == "/health":
                            assert found.status_code in (200, 405)
                            continue
                        assert (found.status_code, found.json()["code"]) == (401, "ZI-1174")
                        assert found.headers["www-authenticate"] == "Bearer"
            assert get(here, "/nowhere").status_code == 401, "what there is not is not told either"
            assert ask(here, "/predict", {"inputs": "a"}, authorization="Bearer sesame").status_code == 200
            assert get(here, "/info", authorization="bearer sesame").status_code == 200
            assert get(here, "/info?key=sesame").status_code == 401
            assert "sesame" not in get(here, "/openapi.json", authorization="Bearer sesame").text

    @pytest.mark.parametrize(
        ("host", "is_inside"),
        [
            ("127.0.0.1", True),
            ("127.8.9.1", True),
            ("::1", True),
            ("localhost", True),
            ("0.0.0.0", False),
            ("::", False),
            ("192.168.1.5", False),
            ("example.org", False),
            ("", False),
        ],
    )
    def test_others_are_let_in_with_a_key_alone(self, host, is_inside):
        assert is_loopback(host) == is_inside
        check_binding(Serve(host=host, api_key="k"))
        if is_inside:
            check_binding(Serve(host=host))
            return
        with pytest.raises(UsageError) as caught:
            check_binding(Serve(host=host))
        assert caught.value.code == "ZI-1171"
        assert caught.value.exit_code == 2

    def test_the_key_is_in_no_output(self):
        assert "sesame" not in repr(Serve(api_key="sesame")) + str(Serve(api_key="sesame").model_dump())


class TestLife:
    def test_loading_and_draining(self):
        with site() as here:
            here.service.is_warm = False
            found = ask(here, "/predict", {"inputs": "a"})
            assert (found.status_code, found.json()["code"]) == (503, "ZI-2213")
            assert get(here, "/health").status_code == 200
            assert get(here, "/ready").json()["code"] == "ZI-2213"
            here.service.warm()
            assert get(here, "/ready").status_code == 200
            here.service.is_draining = True
            found = ask(here, "/predict", {"inputs": "a"})
            assert (found.status_code, found.json()["code"]) == (503, "ZI-2212")
            assert found.headers["connection"] == "close"
            assert get(here, "/ready").status_code == 503
            assert get(here, "/health").status_code == 200

    def test_not_ready_while_the_queue_is_nearly_full(self):
        with site(queue_tokens=10) as here:
            here.queue.is_open = False
            futures = [here.queue.submit(text) for text in here.model.encode(["abcdefgh"], "right")]
            assert get(here, "/ready").status_code == 200
            futures += [here.queue.submit(text) for text in here.model.encode(["a"], "right")]
            found = get(here, "/ready")
            assert (found.status_code, found.json()["code"]) == (503, "ZI-2210")
            here.queue.answer()
            assert all(future.done() for future in futures)

    def test_an_end_before_the_answer_is_a_503(self):
        async def ended(here):
            here.queue.is_open = False
            async with here.client() as client:
                asked = asyncio.ensure_future(client.post("/embed", json={"inputs": "a"}))
                await until(lambda: here.queue.waiting)
                here.queue.close()
                return await asked

        with site() as here:
            found = go(ended(here))
            assert (found.status_code, found.json()["code"]) == (503, "ZI-2212")

    @pytest.mark.parametrize("where", ["in the queue", "in the tokenizer"])
    def test_a_client_that_leaves_takes_its_texts_along(self, where, monkeypatch):
        monkeypatch.setattr("zinfer.serving.service.SHORT_BYTES", 0)
        with site() as here:
            here.queue.is_open = False
            if where == "in the tokenizer":
                here.model.gate.clear()
            go(left(here, where))
            assert not here.queue.waiting
            assert here.queue.answered == 0
            assert here.queue.cancelled == 3, "they were in the queue, and left it"
            text = get(here, "/metrics").text
            assert "zinfer_disconnects_total 1.0" in text
            assert 'zinfer_requests_total{path="/embed",status="499"} 1.0' in text

    def test_nothing_blocks_the_loop(self, monkeypatch):
        """While one request's long text is cut into tokens and another one's waits, /health answers."""
        monkeypatch.setattr("zinfer.serving.service.SHORT_BYTES", 15)

        async def asked(here):
            async with here.client() as client:
                here.queue.is_open = False
                waiting = asyncio.ensure_future(client.post("/embed", json={"inputs": "a"}))
                await until(lambda: here.queue.waiting)
                here.model.gate.clear()
                cutting = asyncio.ensure_future(client.post("/embed", json={"inputs": "bbbb"}))
                assert (await client.get("/health")).status_code == 200
                assert not waiting.done()
                assert not cutting.done()
                here.model.gate.set()
                await until(lambda: len(here.queue.waiting) == 2)
                here.queue.answer()
                return await waiting, await cutting

        with site() as here:
            assert [found.status_code for found in go(asked(here))] == [200, 200]


async def left(here, where):
    """A client that sends three texts and hangs up, as ASGI tells it."""
    gone, sent = asyncio.Event(), []
    body = json.dumps({"texts": ["a", "b", "c"]}).encode()
    messages = [{"type": "http.request", "body": body}]

    async def receive():
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/embed", "headers": headers, "query_string": b""}
    handled = asyncio.ensure_future(here.app(scope, receive, send))
    await until(lambda: here.queue.waiting if where == "in the queue" else here.model.at_gate.is_set())
    gone.set()
    await handled
    assert sent[0]["status"] == 499
    here.model.gate.set()
    await until(lambda: here.queue.cancelled == 3)


class TestNumbers:
    def test_metrics_are_text_of_version_0_0_4_and_count_what_happened(self):
        with site() as here:
            ask(here, "/predict", {"texts": ["abc", "d"]})
            ask(here, "/predict", {"inputs": 7})
            get(here, "/" + "x" * 1000)
            here.queue.max_queue_tokens = 0
            ask(here, "/embed", {"inputs": "a"})
            found = get(here, "/metrics")
            assert found.headers["content-type"].startswith("text/plain; version=0.0.4")
            families = {family.name: family for family in text_string_to_metric_families(found.text)}
            requests = {
                (sample.labels["path"], sample.labels["status"]): sample.value
                for sample in families["zinfer_requests"].samples
                if sample.name.endswith("_total")
            }
            assert requests == {
                ("/predict", "200"): 1,
                ("/predict", "422"): 1,
                ("other", "404"): 1,
                ("/embed", "429"): 1,
            }
            values = {sample.name: sample.value for family in families.values() for sample in family.samples}
            assert values["zinfer_texts_total"] == 2
            assert values["zinfer_tokens_total"] == 4
            assert values["zinfer_rejected_total"] == 1
            assert values["zinfer_students_sum"] == 6
            assert values["zinfer_request_seconds_count"] == 1
            assert values["process_resident_memory_bytes"] > 2**20
            assert values["zinfer_in_flight"] == 1, "the one that asks"

    def test_one_line_per_so_many_seconds_and_none_where_nothing_happened(self):
        with site(access_s=10) as here:
            shift = Shift(here.app.desk.meters, here.service)
            assert shift.line(100.0) == ""
            assert shift.line(111.0) == "", "nothing happened"
            for _ in range(3):
                ask(here, "/predict", {"inputs": "abc"})
            ask(here, "/predict", {"inputs": 7})
            assert shift.line(115.0) == ""
            assert shift.line(122.0).startswith("11 s: requests by status: 3×200, 1×422; mean ")
            assert shift.line(140.0) == ""

    def test_info_says_who_answers_and_what_is_refused(self):
        with site(max_texts=5, objective_ms=20) as here:
            found = get(here, "/info").json()
            assert found["model_type"] == {"classifier": {"id2label": dict(zip("01", LABELS, strict=True))}}
            assert (found["model_id"], found["max_input_length"], found["students"]) == ("letters", 8, 3)
            assert (found["max_client_batch_size"], found["objective_ms"], found["double"]) == (5, 20, True)
