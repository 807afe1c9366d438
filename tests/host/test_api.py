"""The Python face: what comes out, in which order, and what is left behind."""

import asyncio
import gc
import os
import threading
from pathlib import Path

import pytest
import torch
from tiny_models import write_tiny

from zinfer import LLM, SamplingParams
from zinfer.errors import BudgetError, CheckpointError, UsageError

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
STREAMED = {"machine": "sim-default", "device": "cpu", "threads": 1, "memory": {"host": "6MiB"}}


@pytest.fixture(scope="module")
def llm():
    """The bundled model, in less memory than it has weights."""
    with LLM(**STREAMED) as model:
        yield model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny("qwen3", tmp_path_factory.mktemp("api") / "model")


def short_of(folder, **options):
    """A host budget under which about a third of the weights has to stream."""
    with LLM(folder, **options, memory={"host": "1GiB"}) as model:
        plan = model.fit([1, 2, 3], SamplingParams(max_tokens=12))
        return plan.reserve.total + sum(chunk.nbytes for chunk in plan.table.streamable) * 2 // 3


def test_results_come_in_input_order(llm):
    prompts = ["import os", "def f(x):\n    return", "class A"]
    together = llm.generate(prompts, GREEDY)
    assert [output.prompt for output in together] == prompts
    assert llm.plan.placement.slots > 0, "weights were streamed"
    for prompt, output in zip(prompts, together, strict=True):
        (alone,) = llm.generate(prompt, GREEDY)
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids
        assert alone.outputs[0].finish_reason == "length"


def test_a_stream_joins_to_the_generated_text(llm):
    (output,) = llm.generate("def main():", GREEDY)
    deltas = list(llm.stream("def main():", GREEDY))
    assert "".join(deltas) == output.outputs[0].text
    assert len(deltas) > 1


def test_seeded_draws_do_not_depend_on_batch_mates(llm):
    params = SamplingParams(max_tokens=10, temperature=1.0, seed=5, ignore_eos=True)
    (alone,) = llm.generate("import sys", params)
    among = llm.generate(["x = 1", "import sys", "while True:"], params)[1]
    other = llm.generate(
        "import sys", SamplingParams(max_tokens=10, temperature=1.0, seed=6, ignore_eos=True)
    )[0]
    assert among.outputs[0].token_ids == alone.outputs[0].token_ids
    assert other.outputs[0].token_ids != alone.outputs[0].token_ids


def test_a_stop_string_ends_the_text_before_it(llm):
    (free,) = llm.generate("def main():", GREEDY)
    text = free.outputs[0].text
    stop = text[len(text) // 2 :][:3]
    (output,) = llm.generate(
        "def main():", SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, stop=[stop])
    )
    assert output.outputs[0].text == text[: text.index(stop)]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)


def test_logprobs_are_those_of_the_logits(llm):
    params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True, logprobs=2)
    (output,) = llm.generate("import os", params)
    ids = output.prompt_token_ids + output.outputs[0].token_ids
    expected = torch.log_softmax(llm.logits(ids), -1)
    for step, found in enumerate(output.outputs[0].logprobs):
        token = output.outputs[0].token_ids[step]
        row = expected[len(output.prompt_token_ids) - 1 + step]
        assert found[token] == pytest.approx(float(row[token]), abs=1e-5)
        assert len(found) >= 2


def test_logits_have_a_row_per_token(llm):
    logits = llm.logits("def f(x):")
    assert logits.dtype is torch.float32
    assert logits.shape == (len(llm.tokenizer.encode("def f(x):")), llm.model.spec.vocab_size)


def test_asynchronous_callers(llm):
    async def both():
        whole = await llm.agenerate("import re", GREEDY)
        return whole[0].outputs[0].text, "".join([delta async for delta in llm.astream("import re", GREEDY)])

    text, streamed = asyncio.run(both())
    assert text == streamed


def test_a_stream_left_half_read_blocks_nobody(llm):
    deltas = llm.stream("def main():", GREEDY)
    next(deltas)
    (other,) = llm.generate("import os", SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
    assert len(other.outputs[0].token_ids) == 2
    assert "".join(deltas)


@pytest.mark.parametrize("prompts", [[], [[]], 5, [1.5], ["a", [1]] * 0, None, [["a"]]])
def test_prompts_that_are_none_are_refused(llm, prompts):
    with pytest.raises(UsageError):
        llm.generate(prompts, GREEDY)


def test_text_needs_a_tokenizer_and_chat_a_template(llm, tiny):
    with LLM(tiny, machine="sim-default", device="cpu") as model:
        with pytest.raises(CheckpointError, match="ZI-4601"):
            model.generate("text", GREEDY)
        assert model.generate([1, 2, 3], GREEDY)[0].outputs[0].text == ""
    with pytest.raises(UsageError, match="ZI-1401"):
        llm.chat([{"role": "user", "content": "hello"}], GREEDY)


def test_a_longer_request_makes_a_larger_plan(tiny):
    with LLM(tiny, machine="sim-default", device="cpu", threads=1) as model:
        model.generate([1, 2, 3], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
        before = model.plan.kv_tokens
        model.generate([[1, 2, 3] * 20], SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True))
        assert model.plan.kv_tokens > before


def test_an_impossible_budget_is_refused_when_the_model_is_opened(tiny):
    with pytest.raises(BudgetError, match="ZI-2001"):
        LLM(tiny, machine="sim-default", device="cpu", memory={"host": "40KiB"})


def test_unknown_settings_are_refused(tiny):
    with pytest.raises(UsageError, match="max_batch"):
        LLM(tiny, max_bach=3)
    with pytest.raises(UsageError, match=r"memory\.host"):
        LLM(tiny, memory={"hots": "1GiB"})


def test_closing_leaves_nothing_behind(tiny):
    def held():
        gc.collect()
        return set(threading.enumerate()), len(os.listdir("/proc/self/fd"))

    def once():
        with LLM(tiny, machine="sim-default", device="sim", threads=1, memory={"device": "3MiB"}) as model:
            model.generate([[1, 2, 3], [4]], GREEDY)

    once()
    before = held()
    for _ in range(5):
        once()
    after = held()
    assert after[0] <= before[0]
    assert after[1] == before[1]


def test_a_read_error_in_a_pass_is_reported_and_survived(tiny, monkeypatch):
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    options = {"machine": "sim-default", "device": "cpu", "threads": 1, "max_rows": 8, "max_batch": 1}
    with LLM(tiny, **options, memory={"host": short_of(tiny, **options)}) as model:
        expected = model.generate([1, 2, 3], params)[0].outputs[0].token_ids
        assert model.plan.placement.slots > 0
        real, calls = os.preadv, []

        def failing(fd, buffers, offset, *rest):
            calls.append(offset)
            if len(calls) == 20:
                raise OSError(5, "Input/output error")
            return real(fd, buffers, offset, *rest)

        monkeypatch.setattr(os, "preadv", failing)
        with pytest.raises(Exception, match="ZI-") as caught:
            model.generate([1, 2, 3], params)
        assert Path(tiny / "model.safetensors").name in str(caught.value)
        monkeypatch.undo()
        assert model.generate([1, 2, 3], params)[0].outputs[0].token_ids == expected


def test_buffered_and_direct_reads_give_the_same(tiny):
    options = {
        "machine": "sim-default",
        "device": "cpu",
        "threads": 1,
        "max_rows": 8,
    }
    options["memory"] = {"host": short_of(tiny, **options)}
    found = []
    for read_mode in ("direct", "buffered"):
        with LLM(tiny, **options, read_mode=read_mode) as model:
            found.append(model.generate([1, 2, 3], GREEDY)[0].outputs[0].token_ids)
            assert model.plan.placement.slots > 0
    assert found[0] == found[1]
