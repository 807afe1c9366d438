"""Continuous passes: whoever shares a pass, whatever is preempted and however it comes back, bits stay the same."""

import threading
from itertools import count, repeat

import pytest
import torch
from tiny_models import write_tiny

from zinfer import LLM, SamplingParams
from zinfer.plan.make import Plan
from zinfer.plan.queue import QueuePass, queue_passes
from zinfer.plan.records import Workload
from zinfer.runtime import loop
from zinfer.runtime.executor import Executor
from zinfer.runtime.request import Request
from zinfer.runtime.scheduler import Scheduler
from zinfer.runtime.session import Session
from zinfer.sampling.sample import collect

FIXED = {"machine": "sim-default", "device": "cpu", "threads": 1}
RAGGED = [(3 + 7 * number % 18, 20 + 11 * number % 40) for number in range(12)]  # prompt and output lengths


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny("qwen3", tmp_path_factory.mktemp("continuous") / "model")


def jobs():
    """Ragged requests: half greedy, half drawn with a seed."""
    for number, (prompt_len, max_tokens) in enumerate(RAGGED):
        prompt = [(31 * number + 7 * at) % 500 + 2 for at in range(prompt_len)]
        sampled = {"temperature": 0.9, "seed": number} if number % 2 else {"temperature": 0.0}
        yield prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True, **sampled)


def short_of(folder, **options):
    """A host budget for two thirds of the weights, whatever the options ask for beside them."""
    with LLM(folder, **FIXED, **options, memory={"host": "1GiB"}) as llm:
        plan = llm._session.fit([job.request for job in map(llm._job, count(), jobs(), repeat(None))])
        weights = sum(chunk.nbytes for chunk in plan.table.streamable)
        return {"host": plan.reserve.total + weights * 2 // 3}


def outputs_of(folder, **options):
    with LLM(folder, **FIXED | options) as llm:
        outputs = list(llm.generate_iter(jobs(), ordered=True))
        assert [output.request_id for output in outputs] == list(range(len(RAGGED)))
        return [output.outputs[0].token_ids for output in outputs], llm.stats, llm.plan


@pytest.fixture(scope="module")
def alone(tiny):
    """Every request by itself, resident."""
    with LLM(tiny, **FIXED, memory={"host": "1GiB"}) as llm:
        return [llm.generate([prompt], params)[0].outputs[0].token_ids for prompt, params in jobs()]


def test_batch_mates_change_nothing(tiny, alone):
    options = {"max_batch": 5, "max_rows": 24}
    tokens, stats, plan = outputs_of(tiny, memory=short_of(tiny, **options), **options)
    assert tokens == alone
    assert max(done.sequences for done in stats.passes) == 5, "batches held several sequences"
    assert any(0 < done.sequences < done.rows for done in stats.passes), "prompts and decode shared passes"
    assert plan.placement.slots > 0, "weights were streamed"


@pytest.mark.parametrize("preempt", ["spill", "recompute"])
def test_preemption_changes_nothing(tiny, alone, preempt, tmp_path):
    options = {"max_batch": 5, "max_rows": 24, "kv_tokens": 96, "preempt": preempt}
    memory = short_of(tiny, **options) | {"disk": str(tmp_path)}
    tokens, stats, plan = outputs_of(tiny, memory=memory, **options)
    assert tokens == alone
    assert plan.placement.slots > 0, "weights were streamed"
    assert stats.preemptions["spilled" if preempt == "spill" else "dropped"] > 0, "somebody was preempted"
    assert stats.preemptions["damaged"] == 0
    assert not list(tmp_path.iterdir()), "nothing is left on disk"


def test_where_prompts_are_cut_changes_nothing(tiny, alone):
    tokens, stats, _ = outputs_of(tiny, memory={"host": "1GiB"}, max_batch=4, max_rows=6)
    assert tokens == alone
    assert max(done.rows for done in stats.passes) <= 6


def test_micro_batches_change_nothing(tiny, alone, monkeypatch):
    sizes, copies = [], []
    real = Executor.run

    def counted(self, batches):
        sizes.append([batch.num_rows for batch, _ in batches])
        return real(self, batches)

    def collected(drawn):
        copies.append(len(drawn))
        return collect(drawn)

    monkeypatch.setattr(Executor, "run", counted)
    monkeypatch.setattr(loop, "collect", collected)
    options = {"max_batch": 5, "max_rows": 24, "micro_rows": 5}
    tokens, _, plan = outputs_of(tiny, memory=short_of(tiny, **options), **options)
    assert tokens == alone
    assert plan.placement.slots > 0, "weights were streamed"
    assert any(len(rows) > 2 for rows in sizes), "passes held several micro-batches"
    assert max(max(rows) for rows in sizes) <= 5
    assert copies == [len(rows) for rows in sizes], "all draws of a pass come to the host at once"


def test_parked_micro_batches_change_nothing(tiny, alone):
    """Hidden states of waiting micro-batches lie in host memory below a device that is short of it."""
    options = {"max_batch": 5, "max_rows": 24, "micro_rows": 5, "device": "sim", "park": "always"}
    memory = {"device": "600KiB", "host": "1GiB"}
    found, stats, plan = outputs_of(tiny, memory=memory, **options)
    assert found == alone
    assert plan.schedule.parks and plan.reserve.host_activations > 0
    assert plan.placement.slots > 0, "weights were streamed"
    parked = [done for done in stats.passes if done.rows > 5]
    assert parked and all(done.num_bytes["d2h"] > 0 for done in parked), "they went down"
    assert all("d2h" not in done.num_bytes for done in stats.passes if done.rows <= 5)
    unparked, _, other = outputs_of(tiny, memory=memory, **options | {"park": "never"})
    assert unparked == alone
    assert other.reserve.activations > plan.reserve.activations, "which is what it is for"


def test_a_changed_draw_is_seen(tiny, alone, monkeypatch):
    """The mutation: a request that is fed from one token too far gives other tokens."""
    real = Request.next_ids

    def careless(self, limit):
        ids = real(self, limit)
        return [*ids[:-1], ids[-1] ^ 1] if len(self.output_ids) == 2 else ids

    monkeypatch.setattr(Request, "next_ids", careless)
    tokens, _, _ = outputs_of(tiny, memory={"host": "1GiB"}, max_batch=4)
    assert tokens != alone


def test_requests_are_pulled_as_passes_have_room(tiny):
    pulled = count()

    def endless():
        while True:
            next(pulled)
            yield [5, 6, 7], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)

    with LLM(tiny, **FIXED, memory={"host": "1GiB"}, max_batch=4) as llm:
        outputs = llm.generate_iter(endless())
        found = [next(outputs).outputs[0].token_ids for _ in range(20)]
        outputs.close()
        assert all(tokens == found[0] for tokens in found)
        assert next(pulled) <= 256 + 8 + 20
        assert llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))


def test_a_request_that_cannot_be_carried_out_does_not_end_the_others(tiny):
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    items = [[1, 2], [], [3] * 300, [9999], ([4, 5], params), "text without a tokenizer", [6]]
    with LLM(tiny, **FIXED, memory={"host": "1GiB"}) as llm:
        outputs = list(llm.generate_iter(items, params, ordered=True))
    assert [output.error and output.error.code for output in outputs] == [
        None,
        "ZI-1104",
        "ZI-1107",
        "ZI-1106",
        None,
        "ZI-4601",
        None,
    ]
    assert all(len(output.outputs[0].token_ids) == 4 for output in outputs if output.error is None)


def test_a_request_too_large_for_the_budget_is_refused_and_a_longer_one_gets_a_new_plan(tiny):
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    with LLM(tiny, **FIXED, memory={"host": "700KiB"}, lookahead=1) as llm:
        longest = [2 + at % 500 for at in range(200)]
        outputs = list(llm.generate_iter([[1, 2]] * 300 + [longest] + [[1, 2]] * 3, params, ordered=True))
    refused = [output.request_id for output in outputs if output.error is not None]
    assert refused in ([], [300])
    assert outputs[0].outputs[0].token_ids == outputs[-1].outputs[0].token_ids


def test_callers_in_several_threads_share_passes(tiny, monkeypatch):
    """Each begins its passes when all have asked."""
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    prompts = [[3, 1, 4], [1, 5, 9, 2], [6, 5]]
    with LLM(tiny, **FIXED, memory={"host": "1GiB"}, max_batch=4, context=64) as llm:
        llm.generate([[1]] * 4, params)
        expected = [llm.generate([prompt], params)[0].outputs[0].token_ids for prompt in prompts]
        before = len(llm.stats.passes)
        found = [None] * len(prompts)
        barrier, plain = threading.Barrier(len(prompts), timeout=60), Session._next_events
        is_first = threading.local()

        def next_events(self, engine, running):
            if not hasattr(is_first, "over"):
                is_first.over = barrier.wait()
            return plain(self, engine, running)

        monkeypatch.setattr(Session, "_next_events", next_events)

        def call(at):
            found[at] = llm.generate([prompts[at]], params)[0].outputs[0].token_ids

        threads = [threading.Thread(target=call, args=(at,)) for at in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == expected
        shared = llm.stats.passes[before:]
        assert max(done.sequences for done in shared) > 1, "their tokens rode together"


def test_logits_ride_beside_generation(tiny):
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    with LLM(tiny, **FIXED, memory={"host": "1GiB"}, max_batch=3, context=64) as llm:
        expected = llm.logits([9, 8, 7, 6, 5])
        (alone,) = llm.generate([[1, 2, 3]], params)
        stream = llm.generate_iter([([1, 2, 3], params)])
        session = threading.Thread(target=lambda: found.extend(stream))
        found = []
        session.start()
        beside = [llm.logits([9, 8, 7, 6, 5]) for _ in range(3)]
        session.join()
    assert all(torch.equal(logits, expected) for logits in beside)
    assert found[0].outputs[0].token_ids == alone.outputs[0].token_ids


class EndlessPages:
    capacity_tokens = free_tokens = 10**9

    def open(self, sequence_id, num_tokens):
        pass

    def grow(self, sequence_id, num_tokens):
        return True

    def close(self, sequence_id):
        pass


@pytest.mark.parametrize("rows", [7, 16, 40])
@pytest.mark.parametrize(("requests", "prompt", "gen", "batch"), [(9, 5, 4, 3), (4, 30, 3, 4), (20, 3, 9, 6)])
def test_the_planner_sees_the_passes_that_the_scheduler_makes(rows, requests, prompt, gen, batch):
    scheduler = Scheduler(EndlessPages(), max_batch=batch, max_rows=rows)
    for number in range(requests):
        scheduler.submit(Request(number, [1] * prompt, SamplingParams(max_tokens=gen), 0))
    seen = []
    while len(scheduler):
        pieces = scheduler.compose(rows)
        decoding = sum(request.is_decoding for request, _, _ in pieces)
        seen.append(QueuePass(decoding, sum(len(ids) for _, ids, _ in pieces) - decoding))
        for request, ids, _ in pieces:
            is_sampling = request.is_sampling_at(request.num_committed + len(ids))
            request.num_committed += len(ids)
            if is_sampling:
                request.output_ids.append(1)
                if len(request.output_ids) == gen:
                    scheduler.finish(request)
    workload = Workload(batch, prompt, gen, prefill_rows=rows, num_requests=requests)
    assert queue_passes(workload, rows) == seen


def test_the_books_balance_after_every_pass(tiny):
    with LLM(tiny, **FIXED, memory={"host": "1400KiB"}, max_batch=4, max_rows=24, kv_tokens=96) as llm:
        outputs = llm.generate_iter(jobs())
        next(outputs)
        engine = llm._session._engine
        step = engine.loop.step
        checks = count()

        def checked():
            events = step()
            engine.loop.scheduler.check()
            engine.kv.check()
            engine.manager.check()
            next(checks)
            return events

        engine.loop.step = checked
        assert sum(1 for _ in outputs) == len(RAGGED) - 1
        assert next(checks) > 10
        assert llm.stats.preemptions["dropped"] + llm.stats.preemptions["spilled"] > 0
        assert max(llm.stats.peak_bytes.values()) <= 1400 * 1024


@pytest.mark.parametrize("takes_all", [True, False])
def test_prompts_that_are_best_fed_at_once_are_whatever_products_take(monkeypatch, takes_all):
    prompts, params = [[5 + at] * 16 for at in range(12)], SamplingParams(max_tokens=3, ignore_eos=True)
    if not takes_all:  # the mutation: the plan's fill, in multiples of what carries on for free
        monkeypatch.setattr(Plan, "fill", property(lambda plan: plan.forecast.fill))
    with LLM(**FIXED, memory={"host": "6MiB"}) as llm:
        llm.generate(prompts, params)
        assert llm.plan.placement.slots > 0, "weights were streamed"
        assert llm.plan.forecast.full_rows >= 12 * 16 > llm.plan.forecast.token_rows
        budget = llm._session._engine.loop.budget
        for _ in range(20):
            slow = {group: 4 * llm.plan.curve.group_at(group, 64) for group in llm.plan.curve.seconds}
            budget.observe(64, slow, wait_s=0.0, seconds=1.0)
        before = len(llm.stats.passes)
        llm.generate(prompts, params)
        rows = [done.rows for done in llm.stats.passes[before:]]
    assert (rows == [12 * 16, 12, 12]) == takes_all
