"""The ragged workload's pure parts: known continuations, pass counts, verdicts.  Nothing here is timed."""

import json

import numpy as np
import pytest
from bench_modules import BENCHMARKS, load
from hypothesis import given
from hypothesis import strategies as st

calls, counts, known, throughput = (load(name) for name in ("calls", "counts", "known", "throughput"))
packed, quantised, roofline, runner = (load(name) for name in ("packed", "quantised", "roofline", "all"))


def simulated(lengths, slots):
    """Slot by slot and pass by pass: the slow twin of `continuous_passes`."""
    waiting, running, passes = list(lengths), [], 0
    while waiting or running:
        while waiting and len(running) < slots:
            running.append(waiting.pop(0))
        running = [left - 1 for left in running if left > 1]
        passes += 1
    return passes


class TestCounts:
    @given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(1, 8))
    def test_continuous_equals_its_slow_twin_and_bounds_hold(self, lengths, slots):
        passes = counts.continuous_passes(lengths, slots)
        assert passes == simulated(lengths, slots)
        assert max(*lengths, -(-sum(lengths) // slots)) <= passes
        assert passes <= counts.static_passes(lengths, slots)

    def test_equal_lengths_gain_nothing(self):
        assert counts.static_passes([5] * 8, 4) == counts.continuous_passes([5] * 8, 4) == 10

    def test_static_waits_for_the_longest(self):
        assert counts.static_passes([8, 1, 1, 8], 2) == 16
        assert counts.continuous_passes([8, 1, 1, 8], 2) == 10


class TestKnown:
    @pytest.fixture
    def made(self):
        return known.chains(vocab=1500, eos=2, count=12, prompts=(4, 9), outputs=(8, 30), seed=3)

    def test_every_request_ends_by_the_end_token_after_its_length(self, made):
        told, _ = made
        for request in told.requests:
            output = told.follow(request.prompt, 64)
            assert len(output) == request.length
            assert output[-1] == told.eos
            assert told.eos not in output[:-1]

    def test_end_token_can_be_ignored(self, made):
        told, _ = made
        assert len(told.follow(told.requests[0].prompt, 64, ignore_eos=True)) == 64

    def test_chains_share_no_token(self, made):
        told, _ = made
        seen = [token for request in told.requests for token in told.follow(request.prompt, 64)[:-1]]
        assert len(seen) == len(set(seen))

    def test_too_small_a_vocabulary_is_refused(self):
        with pytest.raises(ValueError, match="do not fit"):
            known.chains(vocab=400, eos=2, count=12, prompts=(4, 9), outputs=(8, 30), seed=3)

    def test_head_answers_each_embedding_with_its_follower_by_a_wide_margin(self, made):
        told, lasts = made
        embedding, head = known.weights(told, lasts, width=256, seed=0)
        noise = np.random.default_rng(1).standard_normal(embedding.shape) * 4.0  # what layers add
        hidden = embedding + noise
        hidden /= np.sqrt((hidden**2).mean(-1, keepdims=True))
        logits = hidden @ head.T
        two = np.partition(logits, -2, axis=-1)[:, -2:]
        assert logits.argmax(-1).tolist() == told.next_of
        assert (two[:, 1] - two[:, 0]).min() > 4.0
        logits[told.requests[0].prompt[-1], 0] = 100.0  # a wrong answer is seen
        assert logits.argmax(-1).tolist() != told.next_of

    def test_bf16_rounds_to_nearest_as_torch_does(self):
        import torch

        values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
        wanted = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
        assert known.to_bf16(values) == wanted

    def test_the_engine_says_what_must_come(self, tmp_path):
        from zinfer import LLM, SamplingParams
        from zinfer.checkpoint.synthetic import write_checkpoint
        from zinfer.spec.read import read_spec

        shape = json.loads((BENCHMARKS.parent / "configs/shapes/tinyllama-1.1b.json").read_text())
        small = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 800}
        config = shape | small | {"num_attention_heads": 4, "num_key_value_heads": 2}
        write_checkpoint(read_spec(config), config, tmp_path)
        known.rewrite(tmp_path, count=6, prompts=(3, 6), outputs=(8, 12))
        told = known.read_known(tmp_path)
        prompts = [request.prompt for request in told.requests]
        with LLM(tmp_path, device="cpu", machine="sim-default", memory={"host": "64MiB"}) as llm:
            outputs = llm.generate(prompts, SamplingParams(max_tokens=16, temperature=0.0))
        call = calls.Call(prompts, 16, ignore_eos=False)
        call.outputs = [list(output.outputs[0].token_ids) for output in outputs]
        assert calls.num_wrong(told, [call]) == 0
        assert [len(output) for output in call.outputs] == [request.length for request in told.requests]
        call.outputs[2][1] += 1
        assert calls.num_wrong(told, [call]) == 1


class TestVerdicts:
    def row(self, rate, **changed):
        return {"tokens_per_s": rate, "error": "", "comparable": True, "num_wrong": 0} | changed

    def test_targets_are_met_or_missed_aloud(self):
        rows = {"continuous": self.row(30.0), "static": self.row(20.0), "accelerate": self.row(10.0)}
        ratios, said = throughput.verdicts(rows, allowed=1.6)
        assert ratios == {"static": 1.5, "accelerate": 3.0}
        assert said == ["1.500 x static, at least 1.488 x", "3.000 x accelerate, NOT 5.000 x"]

    @pytest.mark.parametrize("fault", [{"num_wrong": 1}, {"comparable": False}, {"error": "killed"}])
    @pytest.mark.parametrize("engine", ["continuous", "static"])
    def test_no_ratio_of_a_wrong_or_unlimited_row(self, engine, fault):
        rows = {"continuous": self.row(30.0), "static": self.row(20.0)}
        rows[engine] |= fault
        assert throughput.verdicts(rows, allowed=1.6) == ({}, [])


class TestRoofline:
    def test_products_are_interpolated_and_extended_in_proportion(self):
        products = roofline.Products({"body": {"1": 1.0, "4": 4.0, "8": 5.0}, "head": {"1": 0.5, "8": 0.5}})
        assert [products.part_s("body", rows) for rows in (1, 2, 4, 6, 8, 16)] == [
            1.0,
            2.0,
            4.0,
            4.5,
            5.0,
            10.0,
        ]
        assert products.pass_s(8, 2) == 5.5


class TestPacked:
    def test_prompts_are_half_full_and_padding_keeps_what_follows(self):
        prompts = packed.half_full(33, 1000)
        assert sum(map(len, prompts)) / (33 * packed.LONGEST) == pytest.approx(0.5, abs=0.01)
        filled = packed.padded(prompts)
        assert {len(prompt) for prompt in filled} == {packed.LONGEST}
        assert all(wide[-len(prompt) :] == prompt for wide, prompt in zip(filled, prompts, strict=True))

    def test_turns_alternate(self):
        assert calls.turns(("packed", "padded"), 3) == [
            "packed",
            "padded",
            "padded",
            "packed",
            "packed",
            "padded",
        ]


class TestQuantised:
    def test_speed_is_set_beside_the_bytes(self):
        rows = [
            {"weights": "bf16", "error": "", "tokens_per_s": 10.0, "pass_bytes": 200},
            {"weights": "int8", "error": "", "tokens_per_s": 19.0, "pass_bytes": 100},
            {"weights": "int4", "error": "no such option", "pass_bytes": 50},
        ]
        assert quantised.verdicts(rows) == {"int8": {"speed": 1.9, "bytes": 2.0, "share": 0.95}}
        rows[0]["error"] = "killed"
        assert quantised.verdicts(rows) == {}

    def test_budget_is_found_by_bisection(self, monkeypatch):
        monkeypatch.setattr(quantised, "pass_bytes", lambda model: 10**9)
        monkeypatch.setattr(quantised, "planned_share", lambda bench, model, budget: 1 - budget / 10**9)
        assert quantised.budget_for(None, None, 0.6, steps=20) == pytest.approx(4e8, rel=1e-3)


class TestAll:
    def test_every_script_is_there_and_the_queues_take_half_an_hour_at_most(self):
        assert all((BENCHMARKS / script).is_file() for script in runner.BENCHMARKS)
        assert runner.QUEUES_S <= 1800
        assert runner.limit_of("throughput.py", 0) == runner.QUEUES["throughput.py"]
        assert runner.limit_of("prediction_grid.py", 1700) == 100  # what is left of it
        assert runner.limit_of("overlap.py", 1700) == runner.ALONE["overlap.py"]
        words = ["--model", "m", "--work", "w", "--quick"]
        assert runner.options_of("serve_soak.py", words) == ["--quick"]

    def test_only_some_and_their_options(self):
        assert runner.chosen(["--only", "packed.py", "--quick"]) == (["packed.py"], ["--quick"])
        assert runner.chosen(["--quick"]) == (list(runner.BENCHMARKS), ["--quick"])
        assert runner.options_of("overlap.py", ["--quick"]) == []
        assert runner.options_of("several_devices.py", ["--quick", "--results", "r", "--x"]) == [
            "--results",
            "r",
        ]
        assert runner.options_of("several_devices.py", ["--quick"]) == []
        with pytest.raises(KeyError, match=r"none\.py"):
            runner.chosen(["--only", "none.py"])
