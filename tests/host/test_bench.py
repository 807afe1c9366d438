"""`zinfer bench`: loads, figures from moments, both drivers on the bundled model, the record and the picture."""

import json
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zinfer import LLM, SamplingParams
from zinfer.bench import drive
from zinfer.bench.load import Span, poisson_arrivals, random_load
from zinfer.bench.report import Run, Timeline, lines, spread
from zinfer.cli.main import run
from zinfer.errors import UsageError
from zinfer.plan.records import Forecast
from zinfer.runtime.stats import PassRecord
from zinfer.runtime.turns import Turns

NAN, INF = float("nan"), float("inf")

FORECAST = Forecast(1.0, 0.5, 0.6, 4.0, 9.0, 8, "disk", {"disk": 100}, {"disk": 0.45, "compute": 0.1})


def done(seconds, rows=2, is_first=False, is_decode=True, disk=100):
    return PassRecord(seconds, 0.0, rows, rows, is_first, is_decode, {"disk": disk}, {})


class TestLoad:
    def test_same_seed_same_requests_within_their_ranges(self):
        asked = (1000, 40, Span(3, 9), Span(2, 2))
        load = random_load(*asked, seed=5)
        assert load == random_load(*asked, seed=5)
        assert load != random_load(*asked, seed=6)
        assert {len(prompt) for prompt in load.prompts} == set(range(3, 10))
        assert set(load.gen_lens) == {2}
        assert max(max(prompt) for prompt in load.prompts) < 1000

    @given(st.text(max_size=8))
    def test_a_span_is_understood_or_refused(self, text):
        try:
            span = Span.parse(text, "--gen-len")
        except UsageError as error:
            assert error.code == "ZI-1121"
        else:
            assert 1 <= span.low <= span.high

    @pytest.mark.parametrize(
        ("text", "wanted"), [("7", Span(7, 7)), ("2-9", Span(2, 9)), ("9-2", None), ("0", None), ("3-", None)]
    )
    def test_spans(self, text, wanted):
        if wanted is not None:
            assert Span.parse(text, "--gen-len") == wanted
            return
        with pytest.raises(UsageError, match="gen-len"):
            Span.parse(text, "--gen-len")

    def test_arrivals_come_at_the_rate(self):
        times = list(poisson_arrivals(4000, 20.0, seed=1))
        assert times[0] == 0.0
        assert times == sorted(times)
        assert times[-1] == pytest.approx(200.0, rel=0.1)


class TestFigures:
    @pytest.fixture
    def block(self):
        timelines = [Timeline(10.0, [11.0, 11.5, 13.0], 4), Timeline(10.0, [12.0], 6)]
        passes = [done(3.0, rows=10, is_first=True, is_decode=False, disk=400), done(0.5), done(0.7)]
        return Run("throughput", timelines, 3.0, passes, FORECAST, {}).to_dict()

    def test_follow_their_formulas(self, block):
        assert (block["requests"], block["input_tokens"], block["output_tokens"]) == (2, 10, 4)
        assert block["output_tokens_per_s"] == pytest.approx(4 / 3)
        assert block["total_tokens_per_s"] == pytest.approx(14 / 3)
        assert block["ttft_s"] == pytest.approx({"mean": 1.5, "p50": 1.5, "p99": 1.99})
        assert block["tpot_s"]["mean"] == pytest.approx(1.0)  # (3 - 1) / 2; one token alone has none
        assert block["itl_s"]["p50"] == pytest.approx(1.0)  # of 0.5 and 1.5
        assert block["tokens_per_pass"] == pytest.approx(4 / 3)
        assert block["bytes_per_token"] == {"disk": 150.0}
        assert block["pass_s"] == pytest.approx(0.6)
        assert block["limit_share"] == pytest.approx(0.75)
        assert block["predicted_duration_s"] == 9.0

    def test_are_said_with_the_formulas(self, block):
        told = "\n".join(lines(block))
        assert "75% of the limit, bound by disk" in told
        assert "TPOT (end to end - TTFT) / (output tokens - 1)" in told

    def test_of_nothing_are_none(self):
        assert spread([]) is None
        single = Run("latency", [Timeline(0.0, [1.0], 1)], 1.0, [], FORECAST, {}).to_dict()
        assert (single["tpot_s"], single["itl_s"], single["pass_s"]) == (None, None, None)
        assert list(lines(single))


@pytest.fixture
def llm():
    with LLM(device="cpu", memory={"host": "24MiB"}, machine="sim-default") as opened:
        yield opened


@pytest.fixture
def load():
    return random_load(500, 6, Span(3, 9), Span(2, 5), seed=0)


def quiet(done, total, what):
    """Progress for nobody."""


class TestDrivers:
    @pytest.mark.parametrize("how", [{}, {"concurrency": 3}, {"request_rate": 200.0}])
    def test_every_token_of_every_request_has_its_moment(self, llm, load, how):
        got = drive.latency(llm, load, quiet, **how) if how else drive.throughput(llm, load, quiet)
        assert sorted(len(line.token_s) for line in got.timelines) == sorted(load.gen_lens)
        assert all(line.ttft_s > 0 and min([1.0, *line.gaps_s]) > 0 for line in got.timelines)
        assert sum(done.rows for done in got.passes) == sum(
            len(prompt) + count - 1 for prompt, count in zip(load.prompts, load.gen_lens, strict=True)
        )

    def test_users_share_passes_and_are_no_more_than_asked_for(self, llm):
        load = random_load(500, 6, Span(3, 9), Span(12, 15), seed=0)
        got = drive.latency(llm, load, quiet, concurrency=3)
        assert max(done.sequences for done in got.passes) == 3

    def test_arrivals_are_either_open_or_closed(self, llm, load):
        for how in (
            {},
            {"concurrency": 1, "request_rate": 1.0},
            {"concurrency": 0},
            *({"request_rate": rate} for rate in (0.0, NAN, INF)),
        ):
            with pytest.raises(UsageError, match="ZI-1123"):
                drive.latency(llm, load, quiet, **how)

    def test_requests_that_fail_are_counted_and_none_at_all_is_an_error(self, llm, load):
        load.prompts[2] = [1] * 2000  # beyond the context
        got = drive.throughput(llm, load, quiet)
        assert (len(got.timelines), len(got.failed)) == (5, 1)
        load.prompts[:] = [[1] * 2000] * 6
        with pytest.raises(UsageError, match="context"):
            drive.throughput(llm, load, quiet)

    def test_a_plan_that_was_asked_for_holds_for_smaller_requests(self, llm):
        wanted = llm.fit([[1, 2, 3]] * 4, SamplingParams(max_tokens=8))
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2))
        assert llm.plan is wanted
        assert llm.fit([[1, 2, 3]], SamplingParams(max_tokens=2)) is wanted  # the engine is open
        llm.close()
        assert llm.fit([[1, 2, 3]], SamplingParams(max_tokens=2)).workload.batch == 1


class TestTurns:
    def test_who_has_just_had_the_lock_lets_others_go_first(self):
        turns, order = Turns(), []

        def wait():
            with turns, turns:  # callers hold it twice
                order.append("who waits")

        for _ in range(50):
            thread = threading.Thread(target=wait)
            with turns, turns:
                thread.start()
                while not turns._gate.locked():
                    time.sleep(0)
            with turns:
                order.append("the last holder")  # with an ordinary lock it comes first
            thread.join()
        assert order == ["who waits", "the last holder"] * 50


class TestCommand:
    ARGS = ("--num-prompts", "4", "--prompt-len", "3-6", "--gen-len", "2-3", "--host-mem", "24MiB")
    ARGS += ("--machine", "sim-default", "--device", "cpu")

    def test_writes_block_record_and_picture(self, tmp_path, capsys):
        record, picture = tmp_path / "r.json", tmp_path / "r.svg"
        assert run(["bench", "throughput", *self.ARGS, "--json", str(record), "--svg", str(picture)]) == 0
        told = capsys.readouterr().out
        assert all(word in told for word in ("output throughput", "TTFT", "TPOT", "ITL", "predicted"))
        found = json.loads(record.read_text())
        assert (found["requests"], found["config"]["gen_len"]) == (4, "2-3")
        assert "<svg" in picture.read_text()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.svg"]

    def test_latency_defaults_to_one_user(self, capsys):
        assert run(["bench", "latency", *self.ARGS]) == 0
        assert "4 in" in capsys.readouterr().out

    def test_missing_matplotlib_is_said_before_the_run(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert run(["bench", "throughput", *self.ARGS, "--svg", str(tmp_path / "r.svg")]) == 5
        said = capsys.readouterr()
        assert "pip install 'zinfer[plots]'" in said.err
        assert said.out == ""

    @pytest.mark.parametrize(
        "wrong",
        [
            ("--num-prompts", "0"),
            ("--prompt-len", "9-2"),
            ("--gen-len", "many"),
            ("--prompt-len", "5000"),
        ],
    )
    def test_bad_input_is_one_typed_error(self, wrong, capsys):
        assert run(["bench", "throughput", *self.ARGS, *wrong]) == 2
        assert "try:" in capsys.readouterr().err
