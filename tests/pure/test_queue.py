"""The planner's view of a queue: rows of every pass, the token budget, and the batch size that follows."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from plan_of import MACHINE, plan_of, small_llama

from zinfer.errors import BudgetError
from zinfer.plan.curve import Curve, compute_curve
from zinfer.plan.optimise import Cheapest, batch_sizes
from zinfer.plan.queue import queue_passes, run_queue
from zinfer.plan.records import Workload
from zinfer.plan.tokens import TokenBudget

GIB = 2**30
RISING = Curve((1, 100), {"mlp": (0.01, 1.0), "attention": (0.01, 1.0)})


@settings(max_examples=60, deadline=None)
@given(
    num_requests=st.integers(1, 40),
    prompt_len=st.integers(1, 30),
    gen_len=st.integers(1, 12),
    batch=st.integers(1, 9),
    rows=st.integers(9, 64),
)
def test_a_queue_feeds_every_token_once(num_requests, prompt_len, gen_len, batch, rows):
    workload = Workload(batch, prompt_len, gen_len, prefill_rows=64, num_requests=num_requests)
    passes = queue_passes(workload, rows)
    assert sum(step.prompt_rows for step in passes) == num_requests * prompt_len
    assert sum(step.decoding for step in passes) == num_requests * (gen_len - 1)
    assert all(0 < step.rows <= rows and step.decoding <= batch for step in passes)
    run = run_queue(workload, rows, lambda rows: 1.0)
    assert run.num_passes == len(passes) == run.seconds
    assert run.mean_finish_s <= run.seconds


def test_a_long_queue_follows_from_its_beginning():
    workload = Workload(8, 16, 8, prefill_rows=64, num_requests=50_000)
    run = run_queue(workload, 64, lambda rows: 0.5)
    assert run.seconds == pytest.approx(0.5 * 50_000 * 8 / 8, rel=0.3)
    assert run.num_tokens == 400_000


def test_the_token_budget_lies_where_computation_meets_the_link():
    budget = TokenBudget(RISING, 0.1, batch=4, max_rows=400)
    assert budget.rows == 20  # never less than the batch and some prompt
    budget = TokenBudget(RISING, 4.0, batch=4, max_rows=400)
    assert RISING.at(budget.rows) <= 4.0 < RISING.at(budget.rows + 1)
    assert TokenBudget(RISING, 400.0, batch=4, max_rows=400).rows == 400
    assert TokenBudget(RISING, 0.0, batch=4, max_rows=400).rows == 400  # nothing streams: fill every pass


def test_measured_passes_correct_the_budget_by_group():
    budget = TokenBudget(RISING, 4.0, batch=4, max_rows=400)
    before = budget.rows
    for _ in range(20):  # attention takes twice what the profile says, the products what it says
        predicted = {group: RISING.group_at(group, 100) for group in RISING.seconds}
        budget.observe(100, predicted | {"attention": 2 * predicted["attention"]}, wait_s=0.0, seconds=3.0)
    assert budget.compute_scale["attention"] == pytest.approx(2, rel=0.01)
    assert budget.compute_scale["mlp"] == pytest.approx(1, rel=0.01)
    assert budget.rows == pytest.approx(before * 2 / 3, rel=0.05)
    for _ in range(20):  # and the link half of what it says
        budget.observe(10, {}, wait_s=5.0, seconds=8.0)
    assert budget.stream_scale == pytest.approx(2, rel=0.01)
    assert budget.rows == pytest.approx(before * 4 / 3, rel=0.05)
    budget.observe(10, {"mlp": 1e9}, wait_s=0.0, seconds=1e9)
    assert budget.compute_scale["mlp"] < 2, "one disturbed pass does not decide"


def test_the_curve_is_the_sum_of_the_chunks():
    plan = plan_of(small_llama(), Workload(batch=4), device="cpu", memory__host="150MiB")
    compute_s = plan.forecast.busy_s["compute"]
    chunks_s = len(plan.table.streamable) * MACHINE.host.chunk_overhead_s
    assert plan.curve.at(4) == pytest.approx(compute_s - chunks_s, rel=0.01)
    windowed = small_llama(sliding_window=64, architectures=["MistralForCausalLM"])
    workload = Workload(batch=4, prompt_len=4000, gen_len=100)
    short = compute_curve(windowed, MACHINE.host, workload, exact=True)
    whole = compute_curve(small_llama(), MACHINE.host, workload, exact=True)
    assert short.at(4) < whole.at(4)


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0, 1), st.booleans()), min_size=1, max_size=12))
def test_branch_and_bound_equals_brute_force(items):
    """Costs with bounds below them; some items cannot be planned at all."""
    table = dict(enumerate(items, 1))

    def plan(item):
        if table[item][2]:
            raise BudgetError("ZI-0000", "does not fit")
        return table[item][0]

    told = []

    def watch(done, total, what):
        assert 0 <= done < total <= len(items)
        told.append(done)

    search = Cheapest(plan, lambda cost: cost, lambda item: table[item][0] * table[item][1], watch)
    possible = [cost for cost, _, is_refused in items if not is_refused]
    if possible:
        assert search.find(table) == min(possible)
    else:
        with pytest.raises(BudgetError):
            search.find(table)
    assert told == list(range(len(told)))
    assert len(told) >= search.num_planned


FLAGS = [
    {"device": "cpu", "memory__host": "400MiB"},
    {"device": "cpu", "memory__host": "300MiB", "runtime__objective": "latency"},
    {"device": "sim", "memory__device": "300MiB", "memory__host": "200MiB"},
]


@pytest.mark.parametrize("flags", FLAGS, ids=["streams", "latency", "device"])
@pytest.mark.parametrize("num_requests", [12, None])
def test_the_batch_chosen_is_the_best_of_all(flags, num_requests):
    """Brute force: every size planned by itself."""
    spec = small_llama()
    workload = Workload(batch=12, prompt_len=40, gen_len=24, num_requests=num_requests)
    sizes = batch_sizes(num_requests or 64)
    chosen = plan_of(spec, workload, batches=sizes, **flags)
    costs = {}
    for size in sizes:
        try:
            costs[size] = plan_of(spec, workload, batches=[size], **flags)
        except BudgetError:
            continue

    def cost(plan):
        if "runtime__objective" in flags:
            run = run_queue(plan.workload, plan.forecast.full_rows, pass_times(plan))
            return run.mean_finish_s
        if num_requests is None:
            return pass_times(plan)(round(plan.workload.batch * (1 + 40 / 24))) / plan.workload.batch
        return run_queue(plan.workload, plan.forecast.full_rows, pass_times(plan)).seconds

    assert len(costs) > 3
    assert cost(chosen) == pytest.approx(min(map(cost, costs.values())))
    assert chosen.reasons["runtime.max_batch"].startswith("auto")


def pass_times(plan):
    """Seconds of a pass, as the planner has them."""
    fewest = max(plan.stream_s, plan.curve.at(plan.workload.batch))
    return lambda rows: plan.forecast.pass_s * max(plan.stream_s, plan.curve.at(rows)) / fewest


def test_an_open_queue_gets_a_larger_cache_than_a_few_requests():
    spec = small_llama()
    flags = {"device": "cpu", "memory__host": "200MiB"}
    few = plan_of(spec, Workload(4, 64, 64, num_requests=4), batches=batch_sizes(4), **flags)
    many = plan_of(spec, Workload(256, 64, 64), batches=batch_sizes(None), **flags)
    assert few.workload.batch <= 4 < many.workload.batch
    assert many.reserve.kv > few.reserve.kv
    assert many.forecast.bytes_per_pass["disk"] >= few.forecast.bytes_per_pass["disk"]


def test_known_lengths_bound_the_cache():
    spec = small_llama()
    workload = Workload(4, 10, 10, num_requests=8, max_len=320, lengths=(320, 160, 32, 16, 16, 16, 16, 16))
    plan = plan_of(spec, workload, device="cpu", memory__host=GIB)
    assert plan.kv_tokens == 320 + 160 + 32 + 16
    fixed = plan_of(spec, workload, device="cpu", memory__host=GIB, runtime__kv_tokens=400)
    assert fixed.kv_tokens == 400
    least = plan_of(spec, workload, device="cpu", memory__host=GIB, runtime__kv_tokens=10)
    assert least.kv_tokens == 320, "the longest request always fits"
