"""Batch jobs over an engine that answers at once: every request once, whatever the lines, the disk or the power do."""

import json
import os
import shutil
from pathlib import Path

import pytest
from faulty_disk import ForgetfulDisk, PowerCutError, StepDisk, disk_full, io_error
from hypothesis import given
from hypothesis import strategies as st
from job_engines import DEFAULTS, QuickLLM, run_job
from tiny_models import write_tiny

import zinfer
import zinfer.jobs.run as run_module
from zinfer import LLM
from zinfer.errors import BudgetError, CheckpointError, MachineError, UsageError
from zinfer.jobs.line import Fault, JobRequest, read_line
from zinfer.jobs.output import JobOutput
from zinfer.jobs.requests import survey
from zinfer.jobs.run import Brake


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = write_tiny("llama", tmp_path_factory.mktemp("jobs") / "model")
    with LLM(folder, machine="sim-default", device="cpu", threads=1) as llm:
        yield llm


@pytest.fixture
def llm(opened):
    return QuickLLM(opened)


def write_lines(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def openai(custom_id, **body):
    body = {"prompt": [1, 2, 3], "max_tokens": 4} | body
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def some_lines(count=20):
    """Good and bad ones, plain and OpenAI's."""
    good = [{"prompt_ids": [1, 2, i], "temperature": 1.0, "max_tokens": 1 + i % 5} for i in range(count)]
    bad = ["{", {"prompt_ids": [9999]}, {"prompt": [1], "max_tokens": 0}, openai("a"), openai("a"), "[]"]
    return good[: count // 2] + bad + good[count // 2 :]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_line(path):
    """Line number or custom_id and error -> result; fails where one stands twice."""
    found = {}
    for raw in path.read_text().splitlines():
        record = json.loads(raw)
        record.get("response") and record["response"]["body"].pop("created")
        key = (
            (record["id"], record["error"] and record["error"]["line"]) if "error" in record else record["id"]
        )
        assert key not in found, key
        found[key] = record
    return found


def test_every_line_is_answered_in_its_own_form(llm, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", some_lines())
    outcome = run_job(llm, source, tmp_path / "out.jsonl")
    assert (outcome.done, outcome.total, outcome.faults, outcome.earlier) == (26, 26, 5, 0)
    found = by_line(tmp_path / "out.jsonl")
    assert len(found) == 26
    plain = found[1]
    assert plain["prompt"] == [1, 2, 0]
    assert plain["finish_reason"] == "length"
    errors = {r["error"]["line"]: r["error"] for r in found.values() if r.get("error")}
    assert {line: e["code"] for line, e in errors.items()} == {
        11: "ZI-1701",
        12: "ZI-1106",
        13: "ZI-1302",
        15: "ZI-1708",
        16: "ZI-1701",
    }
    assert all(error["remedy"] for error in errors.values())
    (answered,) = [r for r in found.values() if r.get("response")]
    assert (answered["custom_id"], answered["response"]["status_code"]) == ("a", 200)
    body = answered["response"]["body"]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert body["choices"][0]["finish_reason"] == "length"


def test_a_finished_job_is_not_done_again(llm, tmp_path):
    source, target = write_lines(tmp_path / "in.jsonl", some_lines()), tmp_path / "out.jsonl"
    run_job(llm, source, target)
    before, pulled = target.read_bytes(), llm.pulled
    outcome = run_job(llm, source, target)
    assert (outcome.earlier, outcome.done, outcome.faults) == (26, 26, 5)
    assert target.read_bytes() == before
    assert llm.pulled == pulled


def test_chats_are_refused_one_by_one_where_there_is_no_tokenizer(llm, tmp_path):
    chat = {
        "custom_id": "c",
        "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": "x"}]},
    }
    run_job(llm, write_lines(tmp_path / "in.jsonl", [chat, {"prompt": "text"}]), tmp_path / "out.jsonl")
    assert [r["error"]["code"] for r in read(tmp_path / "out.jsonl")] == ["ZI-4601", "ZI-4601"]


def test_conversations_go_through_the_checkpoints_template(tmp_path):
    demo = Path(zinfer.__file__).parent / "assets" / "demo"
    shutil.copytree(demo, tmp_path / "model")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    talks = [[{"role": "user", "content": text}] for text in ("import os", "def f", "x")]
    lines = [
        {"custom_id": str(i), "url": "/v1/chat/completions", "body": {"messages": talk, "logprobs": True}}
        for i, talk in enumerate(talks)
    ]
    lines.append({"custom_id": "bad", "url": "/v1/chat/completions", "body": {"messages": []}})
    with LLM(tmp_path / "model", machine="sim-default", device="cpu", threads=1) as llm:
        assert run_job(llm, write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl").faults == 1
        found = {r["custom_id"]: r for r in read(tmp_path / "out.jsonl")}
        for i, talk in enumerate(talks):
            expected = llm.chat(talk, DEFAULTS).outputs[0]
            (choice,) = found[str(i)]["response"]["body"]["choices"]
            assert choice["message"] == {"role": "assistant", "content": expected.text}
            tokens = choice["logprobs"]["content"]
            assert "".join(token["token"] for token in tokens) == expected.text
            assert all(token["logprob"] <= 0 for token in tokens)
    assert found["bad"]["error"]["code"] == "ZI-1706"


def test_a_request_that_can_never_fit_is_refused_with_the_numbers(tmp_path):
    folder = write_tiny("llama", tmp_path / "model", max_position_embeddings=100_000)
    with LLM(folder, machine="sim-default", device="cpu", threads=1, memory={"host": "2MiB"}) as llm:
        lines = [{"prompt": [1], "max_tokens": tokens} for tokens in (90_000, 4)]
        assert run_job(llm, write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl").faults == 1
    error = next(r["error"] for r in read(tmp_path / "out.jsonl") if "error" in r)
    print(error)
    assert error["code"] == "ZI-2001"
    assert "2.00 MiB" in error["message"]


def test_a_seed_is_made_from_the_key_and_a_given_one_is_kept():
    line = b'{"prompt": [1]}'
    first, other = read_line(1, line, DEFAULTS), read_line(2, line, DEFAULTS)
    assert first.params.seed == read_line(1, line, DEFAULTS).params.seed
    assert first.params.seed != other.params.seed
    named = [read_line(n, b'{"custom_id": "a", "prompt": [1]}', DEFAULTS).params.seed for n in (1, 2)]
    assert named[0] == named[1], "a request with a name is known by it"
    assert read_line(1, b'{"prompt": [1], "seed": 5}', DEFAULTS).params.seed == 5


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"n": 2}, "ZI-1707"),
        ({"n": True}, "ZI-1707"),
        ({"stream": True}, "ZI-1707"),
        ({"frequency_penalty": 0.5}, "ZI-1707"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "ZI-1707"),
        ({"prompt": None}, "ZI-1705"),
        ({"prompt": ["a", "b"]}, "ZI-1705"),
        ({"prompt": [1.5]}, "ZI-1705"),
        ({"temprature": 1}, "ZI-1301"),
        ({"self": 1}, "ZI-1301"),
        ({"top_p": 2}, "ZI-1302"),
        ({"max_tokens": 1e9}, "ZI-1302"),
        ({"logprobs": 1000}, "ZI-1302"),
    ],
)
def test_fields_that_cannot_be_meant(body, code):
    fault = read_line(1, json.dumps(openai("a", **body)).encode(), DEFAULTS)
    assert isinstance(fault, Fault)
    assert (fault.error.code, fault.custom_id, fault.form) == (code, "a", "completions")
    assert fault.error.remedy


def test_a_fault_says_as_much_of_its_line_as_could_be_read():
    fault = read_line(1, b'{"custom_id": "a", "url": "/v1/embeddings", "body": {}}', DEFAULTS)
    assert (fault.error.code, fault.custom_id, fault.form) == ("ZI-1702", "a", "completions")
    fault = read_line(1, b'{"custom_id": 5, "prompt": "x"}', DEFAULTS)
    assert (fault.error.code, fault.custom_id, fault.form) == ("ZI-1703", None, "plain")


def test_fields_that_are_understood():
    body = {
        "model": "any",
        "user": "me",
        "n": 1,
        "stream": False,
        "prompt": ["Once"],
        "max_tokens": None,
        "max_completion_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": "\n",
        "seed": 3,
        "logprobs": 2,
        "min_tokens": 8,
    }
    request = read_line(1, json.dumps(openai("a", **body)).encode(), DEFAULTS)
    assert isinstance(request, JobRequest)
    params = request.params
    assert (params.max_tokens, params.temperature, params.top_p, params.stop) == (9, 0.5, 0.9, ("\n",))
    assert (params.seed, params.logprobs, params.min_tokens, params.ignore_eos) == (3, 2, 8, True)
    assert (request.prompt, request.model) == ("Once", "any")
    chat = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 4}
    line = {"custom_id": "c", "url": "/v1/chat/completions", "body": chat}
    assert read_line(1, json.dumps(line).encode(), DEFAULTS).params.logprobs == 4


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
BODY = ("prompt", "prompt_ids", "max_tokens", "max_new_tokens", "stop", "seed", "n", "logprobs", "messages")
ODD = ("top_logprobs", "self", "cls", "tools", "temperature", "model", "custom_id", "logit_bias", "url")
NAMES = st.sampled_from(BODY) | st.sampled_from(ODD)
URLS = st.sampled_from(["/v1/completions", "/v1/chat/completions"]) | JSON
FIELDS = st.dictionaries(
    NAMES, JSON | st.integers(0, 3) | st.lists(st.integers(0, 9), max_size=3), max_size=5
)
LINES = (
    JSON | FIELDS | st.fixed_dictionaries({"url": URLS, "body": FIELDS | JSON}, optional={"custom_id": JSON})
)


@given(LINES, st.integers(1, 10**9))
def test_any_json_line_is_a_request_or_one_error(value, number):
    raw = json.dumps(value).encode()
    found = read_line(number, raw, DEFAULTS)
    assert isinstance(found, JobRequest | Fault)
    assert found == read_line(number, raw, DEFAULTS) or isinstance(found, Fault)
    if isinstance(found, Fault):
        assert found.error.code.startswith("ZI-")
        assert found.error.remedy
        assert "\n" not in found.error.message
    else:
        assert found.params.seed is not None


@given(st.binary(max_size=40))
def test_any_bytes_are_a_request_or_one_error(raw):
    assert isinstance(read_line(1, raw, DEFAULTS), JobRequest | Fault)


@given(st.lists(st.sampled_from("abcde\n"), max_size=30))
def test_a_survey_finds_just_the_repeated_ids(tmp_path_factory, ids):
    path = tmp_path_factory.mktemp("survey") / "in.jsonl"
    write_lines(path, ["" if each == "\n" else {"custom_id": each, "prompt": "x"} for each in ids])
    found = survey(path)
    expected = {n for n, each in enumerate(ids, 1) if each != "\n" and each in ids[: n - 1]}
    assert found.repeated == expected
    assert found.num_requests == sum(each != "\n" for each in ids)


def test_a_line_that_is_too_long_is_one_error_and_is_not_kept(llm, tmp_path, monkeypatch):
    monkeypatch.setattr("zinfer.jobs.requests.MAX_JSON_BYTES", 100)
    monkeypatch.setattr("zinfer.checkpoint.strict_json.MAX_JSON_BYTES", 100)
    lines = [{"prompt": [1]}, {"prompt": [1] * 1000}, {"prompt": [2]}]
    run_job(llm, write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl")
    found = by_line(tmp_path / "out.jsonl")
    assert [("error" in r) for r in found.values()].count(True) == 1
    assert {r["id"] for r in found.values()} == {1, 2, 3}


def test_requests_are_read_as_they_are_needed(llm, tmp_path):
    lines = [{"prompt": [1, i % 7]} for i in range(300)]
    run_job(llm, write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl")
    assert llm.most_ahead <= llm.window
    assert len(by_line(tmp_path / "out.jsonl")) == 300


def expected_of(llm, source, folder):
    run_job(llm, source, folder / "expected.jsonl")
    return by_line(folder / "expected.jsonl")


def small_source(tmp_path):
    """Few enough that every step of the disk can fail once."""
    return write_lines(tmp_path / "in.jsonl", some_lines(6))


@pytest.mark.parametrize(("act", "kind"), [(disk_full, BudgetError), (io_error, MachineError)])
def test_a_disk_that_fails_at_any_step_leaves_a_job_that_goes_on(llm, tmp_path, act, kind):
    source = small_source(tmp_path)
    expected = expected_of(llm, source, tmp_path)
    stopped = 0
    for at in range(1000):
        target = tmp_path / f"out-{at}.jsonl"
        disk = StepDisk(at, act)
        try:
            run_job(llm, source, target, disk=disk)
        except kind as error:
            stopped += 1
            assert error.code == {BudgetError: "ZI-2702", MachineError: "ZI-5701"}[kind]
            assert "results are safely written" in error.message
            assert "same command" in error.remedy
            assert run_job(llm, source, target, disk=StepDisk()).done == len(expected)
        assert by_line(target) == expected
        if len(disk.steps) <= at:
            break
    assert stopped > 10


@pytest.mark.parametrize("keeps_newest", [False, True])
@pytest.mark.parametrize("keep", [0, 0.5, 1])
def test_a_power_cut_at_any_step_loses_nothing(llm, tmp_path, keep, keeps_newest):
    source = small_source(tmp_path)
    expected = expected_of(llm, source, tmp_path)
    cuts = 0
    for at in range(1000):
        folder = tmp_path / f"out-{at}"
        folder.mkdir()
        disk = ForgetfulDisk(folder, at)
        try:
            run_job(llm, source, folder / "out.jsonl", disk=disk)
        except PowerCutError:
            cuts += 1
            disk.come_back(lambda raw: raw[: int(len(raw) * keep)], keeps_newest)
            run_job(llm, source, folder / "out.jsonl", disk=StepDisk())
        else:
            break
        assert by_line(folder / "out.jsonl") == expected
    assert cuts > 10


@pytest.mark.parametrize("harm", ["torn", "lost", "flipped", "longer"])
def test_harmed_results_are_made_again(llm, tmp_path, harm):
    source, target = write_lines(tmp_path / "in.jsonl", some_lines()), tmp_path / "out.jsonl"
    run_job(llm, source, target)
    expected, raw = by_line(target), bytearray(target.read_bytes())
    match harm:
        case "torn":
            del raw[-7:]
        case "lost":
            raw.clear()
        case "flipped":
            raw[len(raw) // 2] ^= 1
        case "longer":
            raw += b'{"id": 1, "half'
    target.write_bytes(raw)
    outcome = run_job(llm, source, target)
    assert (outcome.damaged > 0) == (harm != "longer")
    assert by_line(target) == expected


def test_a_journal_believed_blindly_would_lose_results(llm, tmp_path, monkeypatch):
    """The mutation: without the hashes, lost bytes go unnoticed."""
    source, target = write_lines(tmp_path / "in.jsonl", some_lines()), tmp_path / "out.jsonl"
    run_job(llm, source, target)
    expected = by_line(target)
    target.write_bytes(target.read_bytes().splitlines(keepends=True)[0])
    monkeypatch.setattr(
        JobOutput, "_take", lambda self, record: self._count(record) or True if "end" in record else True
    )
    run_job(llm, source, target)
    with pytest.raises((AssertionError, ValueError)):
        assert by_line(target) == expected


def test_what_changed_is_refused_by_name(llm, tmp_path):
    source, target = write_lines(tmp_path / "in.jsonl", some_lines()), tmp_path / "out.jsonl"
    run_job(llm, source, target)
    before = target.read_bytes()
    with pytest.raises(UsageError, match=r"ZI-1712(.|\n)*max_tokens was 6, is 7(.|\n)*rm "):
        run_job(llm, source, target, defaults=type(DEFAULTS)(max_tokens=7, temperature=0.0, ignore_eos=True))
    write_lines(source, some_lines(21))
    with pytest.raises(UsageError, match=r"ZI-1712(.|\n)*requests was 26, is 27"):
        run_job(llm, source, target)
    assert target.read_bytes() == before


def test_another_file_is_not_written_over(llm, tmp_path):
    source, target = write_lines(tmp_path / "in.jsonl", some_lines()), tmp_path / "out.jsonl"
    target.write_text("mine")
    with pytest.raises(UsageError, match="ZI-1711"):
        run_job(llm, source, target)
    assert target.read_text() == "mine"
    with pytest.raises(CheckpointError, match="ZI-4921"):
        run_job(llm, tmp_path / "none.jsonl", tmp_path / "other.jsonl")
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


def test_two_processes_cannot_write_one_job(llm, tmp_path):
    source, target = write_lines(tmp_path / "in.jsonl", some_lines()), tmp_path / "out.jsonl"
    again = []

    class Nested(QuickLLM):
        def generate_iter(self, prompts, params=None):
            with pytest.raises(UsageError, match="ZI-1713") as caught:
                run_job(llm, source, target)
            again.append(caught)
            return super().generate_iter(prompts, params)

    run_job(Nested(llm), source, target)
    assert again


def test_a_stopped_job_writes_what_is_finished(llm, tmp_path):
    source, target = write_lines(tmp_path / "in.jsonl", some_lines(200)), tmp_path / "out.jsonl"
    expected = expected_of(llm, source, tmp_path)
    brake = Brake()

    class Stopping(QuickLLM):
        def generate_iter(self, prompts, params=None):
            for number, output in enumerate(super().generate_iter(prompts, params)):
                if number == 50:
                    brake.pull()
                yield output

    outcome = run_job(Stopping(llm), source, target, brake)
    assert outcome.is_interrupted
    assert 50 <= outcome.done < outcome.total
    assert len(by_line(target)) == outcome.done
    assert run_job(llm, source, target).earlier == outcome.done
    assert by_line(target) == expected


def test_passes_wait_where_the_disk_falls_far_behind(llm, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "MAX_WAITING", 2)
    source, target = write_lines(tmp_path / "in.jsonl", some_lines(60)), tmp_path / "out.jsonl"
    expected = expected_of(llm, source, tmp_path)
    run_job(llm, source, target)
    assert by_line(target) == expected
