"""Budgets and batch sizes that change while requests run: no bit changes, nothing that stays is read again."""

from dataclasses import replace

import pytest
from plan_of import MACHINE, plan_of, small_llama
from tiny_models import write_tiny

import zinfer.runtime.adapt
from zinfer import LLM, SamplingParams
from zinfer.errors import BudgetError, UsageError
from zinfer.plan.optimise import batch_sizes
from zinfer.plan.records import Budget, Workload
from zinfer.plan.revise import _again, _plan_of, moved_chunks, rebudget, revised

FIXED = {"machine": "sim-default", "threads": 1}
PARAMS = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
PROMPTS = [[3 + at, 1, 4, 1, 5][: 2 + at % 4] for at in range(10)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny("llama", tmp_path_factory.mktemp("adapt") / "model")


@pytest.fixture(scope="module")
def expected(tiny):
    with LLM(tiny, **FIXED, device="cpu", memory={"host": "1GiB"}) as llm:
        return [llm.generate([prompt], PARAMS)[0].outputs[0].token_ids for prompt in PROMPTS]


def sizes(llm):
    """Bytes: what the plan needs beside weights, all weights."""
    return llm.plan.reserve.total, sum(chunk.nbytes for chunk in llm.plan.table.streamable)


def run_and_change(llm, changes):
    """All prompts; before output number n the budgets of changes[n] are set; tokens, and bytes read per pass."""
    outputs = llm.generate_iter(PROMPTS, PARAMS)
    tokens = {}
    for number, output in enumerate(outputs):
        tokens[output.request_id] = output.outputs[0].token_ids
        if number in changes:
            llm.set_memory(**changes[number])
        llm._session._engine.manager.check()
    return [tokens[at] for at in range(len(PROMPTS))]


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_budgets_change_while_requests_run(tiny, expected, device):
    tier = "host" if device == "cpu" else "device"
    options = {"max_batch": 3, "context": 40, "max_rows": 8, "lookahead": 1, "kv": "device"}
    with LLM(tiny, **FIXED, device=device, memory={tier: "1GiB"}, **options) as llm:
        reserve, weights = sizes(llm)
        table, resident = llm.plan.table, []

        def note():
            placement = llm.plan.placement
            resident.append([chunk.id for chunk in table.streamable if placement.resident(chunk.id)])

        llm.set_memory(**{tier: reserve + weights * 2 // 3})
        table = llm.plan.table
        note()
        changes = {
            1: {tier: reserve + weights * 4 // 5},
            3: {tier: reserve + 2 * table.slot_bytes},
            6: {tier: "1GiB"},
        }
        assert run_and_change(llm, changes) == expected
        note()
        assert len(resident[1]) == len(table.streamable) > len(resident[0])
        last = llm.stats.passes[-1]
        assert sum(last.num_bytes.values()) == 0, "at last everything is resident"
        assert any(sum(done.num_bytes.values()) > 0 for done in llm.stats.passes[5:])


def test_what_stays_is_not_read_again(tiny, monkeypatch):
    options = {"max_batch": 1, "context": 40, "max_rows": 8, "lookahead": 1}
    with LLM(tiny, **FIXED, device="cpu", memory={"host": "1GiB"}, **options) as llm:
        reserve, weights = sizes(llm)
        llm.set_memory(host=reserve + weights * 7 // 10)
        llm.generate([[1, 2]], PARAMS)
        before = llm.plan
        llm.set_memory(host=reserve + weights * 9 // 10)
        moved = moved_chunks(before, llm.plan.placement)
        assert moved
        fetched = []
        manager = llm._session._engine.manager
        monkeypatch.setattr(manager, "_begin", spy(manager._begin, fetched))
        llm.generate([[1, 2]], PARAMS)
        stayed = {c.id for c in llm.plan.table.streamable if before.placement.resident(c.id)}
        assert set(moved) <= set(fetched)
        assert stayed
        assert not {chunk for chunk in stayed if llm.plan.placement.resident(chunk)} & set(fetched)


def spy(begin, seen):
    def noted(chunk, tier, **kind):
        seen.append(chunk)
        begin(chunk, tier, **kind)

    return noted


def test_a_budget_that_is_too_small_changes_nothing(tiny, expected):
    with LLM(tiny, **FIXED, device="cpu", memory={"host": "1GiB"}, max_batch=2, context=40) as llm:
        outputs = llm.generate_iter(PROMPTS, PARAMS, ordered=True)
        found = [next(outputs)]
        with pytest.raises(BudgetError, match="ZI-2"):
            llm.set_memory(host="8KiB")
        with pytest.raises(UsageError, match="ZI-1002"):
            llm.set_memory(hosts="8KiB")
        found += list(outputs)
        assert [output.outputs[0].token_ids for output in found] == expected
        llm.set_memory(host=llm.plan.uses[0].total)
        assert [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)] == expected


def test_another_batch_size_in_the_middle_changes_no_token(tiny, expected, monkeypatch):
    seen = []

    def to_two(spec, plan, asked, **rates):
        seen.append(plan.workload.batch)
        again = _again(spec, plan, replace(plan.workload, batch=2), plan.budget, plan.machine, {})
        return _plan_of(spec, plan, again, plan.machine)

    monkeypatch.setattr(zinfer.runtime.adapt, "revised", to_two)
    with LLM(tiny, **FIXED, device="cpu", memory={"host": "1GiB"}) as llm:
        outputs = llm.generate_iter(PROMPTS, PARAMS, ordered=True)
        assert [output.outputs[0].token_ids for output in outputs] == expected
        assert seen == [] or llm.plan.workload.batch == 2
    with LLM(tiny, **FIXED, device="cpu", memory={"host": "1GiB"}) as llm:
        many = [PROMPTS[at % len(PROMPTS)] for at in range(40)]
        monkeypatch.setattr(zinfer.runtime.model, "batch_sizes", lambda count: [5])
        found = [output.outputs[0].token_ids for output in llm.generate_iter(many, PARAMS, ordered=True)]
        assert seen, "the plan was looked at"
        assert found == [expected[at % len(PROMPTS)] for at in range(40)]
        assert llm.stats.preemptions["dropped"] > 0, "running sequences were computed again"
        assert max(done.sequences for done in llm.stats.passes[-20:]) == 2


def test_a_plan_made_for_prompts_is_revised_before_many_tokens_are_generated(tiny, expected, monkeypatch):
    """Prompts alone take as long two at a time; a plan for them covered decode, and carried it out two at a time."""
    looks = []

    def watched(spec, plan, asked, **rates):
        looks.append((asked.num_requests, asked.gen_len, rates["is_begun"]))
        return revised(spec, plan, asked, **rates)

    monkeypatch.setattr(zinfer.runtime.adapt, "revised", watched)
    monkeypatch.setattr(zinfer.runtime.model, "batch_sizes", lambda count: [2])
    with LLM(tiny, **FIXED, device="cpu", memory={"host": "1GiB"}) as llm:
        llm.generate([[5] * 32] * len(PROMPTS), replace(PARAMS, max_tokens=1))
        assert llm.plan.workload.batch == 2 and not looks
        tokens = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)]
        assert tokens == expected
        assert looks == [(len(PROMPTS), PARAMS.max_tokens, False)], "once, with no sequence to compute again"
        assert llm.plan.workload.batch == len(PROMPTS) == llm.plan.workload.num_requests
        assert max(done.sequences for done in llm.stats.passes) == len(PROMPTS)
        assert llm.stats.preemptions["dropped"] == 0
        assert llm.stats.passes[0].num_bytes, "the first call loaded, and its engine lives"
        assert sum(sum(done.num_bytes.values()) for done in llm.stats.passes[2:]) == 0, (
            "nothing is read again"
        )
        llm.generate(PROMPTS, PARAMS)
        assert len(looks) == 1, "the same again needs no look"
        # Another caller may have driven these requests to their end before they are looked at.
        assert not zinfer.runtime.adapt.suit(llm._session._engine)


def left(plan, remaining):
    """The plan's workload when so many requests have not ended."""
    return replace(plan.workload, num_requests=remaining)


def test_a_plan_that_holds_is_not_revised():
    spec = small_llama()
    workload = Workload(64, 40, 24, num_requests=64)
    plan = plan_of(spec, workload, batches=batch_sizes(64), device="cpu", memory__host="400MiB")
    assert revised(spec, plan, left(plan, 40), scale={}, stream_scale=1.0) is None


def test_measured_rates_decide_how_many_run_at_once():
    """An open queue: a cache for more sequences pays until computation binds, and takes memory from the weights."""
    spec = small_llama()
    plan = plan_of(
        spec, Workload(256, 64, 64), batches=batch_sizes(None), device="cpu", memory__host="600MiB"
    )
    slow_disk = revised(spec, plan, plan.workload, scale={}, stream_scale=4.0)
    quarter = dict.fromkeys(plan.curve.seconds, 0.25)
    fast_products = revised(spec, plan, plan.workload, scale=quarter, stream_scale=1.0)
    assert {slow_disk.workload.batch, fast_products.workload.batch} != {plan.workload.batch}
    for again in (slow_disk, fast_products):
        assert again.workload.batch < plan.workload.batch
        assert again.forecast.bytes_per_pass["disk"] < plan.forecast.bytes_per_pass["disk"]
        assert again.uses[0].total <= 600 * 2**20


def test_another_budget_is_what_planning_with_it_gives():
    spec = small_llama()
    plan = plan_of(spec, device="cpu", memory__host="300MiB", runtime__lookahead=2)
    again = rebudget(spec, plan, Budget(host=200 * 2**20))
    assert again.table is plan.table and again.uses[0].total <= 200 * 2**20
    assert again.forecast.pass_s > plan.forecast.pass_s
    assert rebudget(spec, again, plan.budget).placement == plan.placement
    with pytest.raises(BudgetError, match="ZI-2001"):
        rebudget(spec, plan, Budget(host=2**20))
    assert MACHINE.using(1) == plan.machine
