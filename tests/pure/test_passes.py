"""How full passes are: seconds by rows, and the rows that suit a job."""

from dataclasses import replace
from math import inf

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from plan_of import MACHINE, plan_of, small_llama

from zinfer.config.machine import Overlap
from zinfer.plan.curve import Curve
from zinfer.plan.passes import PassSeconds, best_fill
from zinfer.plan.queue import run_queue
from zinfer.plan.records import Workload
from zinfer.plan.simulate import PassRun
from zinfer.plan.tokens import TokenBudget

COSTLY = Curve((1, 1001), {"mlp": (0.3, 10.3)})  # 0.29 s whatever a pass carries, and 10 ms a row
PLAIN = Curve((1, 1001), {"mlp": (0.01, 10.01)})  # rows alone
JOB = Workload(batch=32, prompt_len=16, gen_len=8, prefill_rows=512, num_requests=32)


ALONE = Overlap()


def pass_seconds(curve, stream_s=1.0, overlap=ALONE, batch=32):
    steady_s = max(overlap.at_once(stream_s, curve.at(batch)))
    return PassSeconds(curve, stream_s, overlap, steady_s, batch)


@given(st.floats(0.01, 10), st.floats(0.01, 10), st.floats(1, 4), st.floats(1, 4))
def test_what_works_side_by_side_is_slower_by_no_more_than_its_factor(disk_s, work_s, disk, work):
    slow_disk_s, slow_work_s = Overlap(disk=disk, compute=work).at_once(disk_s, work_s)
    assert disk_s <= slow_disk_s <= disk_s * disk * (1 + 1e-9)
    assert work_s <= slow_work_s <= work_s * work * (1 + 1e-9)
    assert Overlap().at_once(disk_s, work_s) == (disk_s, work_s)
    assert Overlap(disk=disk, compute=work).at_once(disk_s, 0.0) == (disk_s, 0.0)


def test_who_works_longer_is_slowed_for_the_time_of_the_other_only():
    slow_disk_s, slow_work_s = Overlap(disk=1.5, compute=1.2).at_once(10.0, 1.0)
    assert slow_disk_s == pytest.approx(10.0 + 0.5 * 1.2)
    assert slow_work_s == pytest.approx(1.2)


@pytest.mark.parametrize("curve", [COSTLY, PLAIN])
def test_a_pass_takes_what_the_longer_of_the_two_takes(curve):
    pass_s = pass_seconds(curve)
    assert pass_s(1) == pass_s(32) == pytest.approx(1.0)
    assert pass_s(500) == pytest.approx(curve.at(500))
    slowed = pass_seconds(curve, overlap=Overlap(compute=1.5))
    assert slowed(500) == pytest.approx(curve.at(500) + 0.5 * 1.0)


def test_the_simulated_pass_sets_the_scale():
    """A link's seconds are taken as they are alone: the simulated pass had them stretched."""
    busy_s = {"disk": 1.2, "compute": 0.5, "rows": 9.0}
    steady = PassRun(1.5, 0.0, busy_s, {}, {}, (), disk_slowdown=1.2)
    pass_s = PassSeconds.of(steady, COSTLY, Overlap(), batch=8)
    assert pass_s.stream_s == pytest.approx(1.0)
    assert pass_s(8) == 1.5
    assert pass_s(1001) == pytest.approx(1.5 * COSTLY.at(1001) / 1.0)


def test_a_job_gets_fuller_passes_where_each_pass_costs_something():
    free = TokenBudget(COSTLY, 1.0, batch=32, max_rows=512).rows
    rows, run = best_fill(JOB, free, pass_seconds(COSTLY), "throughput")
    assert free < rows <= JOB.prefill_rows
    assert run.seconds < 0.98 * run_queue(JOB, free, pass_seconds(COSTLY)).seconds


def test_passes_stay_at_what_is_free_where_nothing_is_won():
    free = TokenBudget(PLAIN, 1.0, batch=32, max_rows=512).rows
    night = replace(JOB, num_requests=640)  # prompts ride beside decoding sequences all the time
    rows, _ = best_fill(night, free, pass_seconds(PLAIN), "throughput")
    assert rows == free
    endless = Workload(batch=32, prompt_len=16, gen_len=8, prefill_rows=512)
    assert best_fill(endless, free, pass_seconds(COSTLY), "throughput")[0] == free
    texts = Workload(batch=32, prompt_len=16, gen_len=1, prefill_rows=512, num_requests=64, is_whole=True)
    assert best_fill(texts, free, pass_seconds(COSTLY), "throughput")[0] == free


@settings(max_examples=40, deadline=None)
@given(
    fixed_s=st.floats(0.0, 0.5),
    row_s=st.floats(0.001, 0.02),
    batch=st.integers(1, 24),
    requests=st.integers(1, 48),
    prompt=st.integers(1, 40),
    objective=st.sampled_from(["throughput", "latency"]),
)
def test_the_fill_is_near_the_best_of_all_and_never_worse_than_what_is_free(
    fixed_s, row_s, batch, requests, prompt, objective
):
    curve = Curve((1, 1001), {"mlp": (fixed_s + row_s, fixed_s + 1001 * row_s)})
    job = Workload(batch, prompt, 6, prefill_rows=max(batch * prompt, batch), num_requests=requests)
    free = TokenBudget(curve, 1.0, batch=batch, max_rows=job.prefill_rows).rows
    pass_s = pass_seconds(curve, batch=batch)

    def cost(run):
        return run.mean_finish_s if objective == "latency" else run.seconds

    rows, run = best_fill(job, free, pass_s, objective)
    assert free <= rows <= job.prefill_rows
    assert cost(run) <= cost(run_queue(job, free, pass_s))
    tried = {min(free * fill, job.prefill_rows) for fill in (1, 2, 4, 8)} | {job.prefill_rows}
    best = min(cost(run_queue(job, count, pass_s)) for count in tried)
    assert cost(run) <= best / 0.98 + 1e-9


def test_the_fill_goes_with_what_the_passes_show():
    budget = TokenBudget(PLAIN, 1.0, batch=4, max_rows=800, fill=3.0)
    plain = TokenBudget(PLAIN, 1.0, batch=4, max_rows=800)
    assert budget.rows == 3 * plain.rows
    for _ in range(20):  # products take twice what the profile says
        predicted = {"mlp": 2 * PLAIN.group_at("mlp", 50)}
        budget.observe(50, predicted, wait_s=0.0, seconds=1.0)
        plain.observe(50, predicted, wait_s=0.0, seconds=1.0)
    assert plain.rows == pytest.approx(50, abs=2)
    assert budget.rows == 3 * plain.rows
    budget.follow(PLAIN, 1.0, batch=4, max_rows=800, fill=8.0)
    assert budget.rows == pytest.approx(400, abs=16)
    budget.follow(PLAIN, 1.0, batch=4, max_rows=800, fill=inf)
    assert budget.rows == 800, "where all at once is best nobody is left behind for a pass of their own"
    budget.follow(PLAIN, 1.0, batch=4, max_rows=120, fill=3.0, is_corrected=True)
    assert budget.rows == 120, "never more than a pass may carry"
    budget.follow(PLAIN, 1.0, batch=4, max_rows=800, is_corrected=True)
    assert budget.rows == pytest.approx(100, abs=1), "another plan has another fill"


def test_a_plan_says_how_full_its_passes_are():
    slow = MACHINE.host.model_copy(update={"op_overhead_s": 2e-3})
    machine = MACHINE.model_copy(update={"host": slow})
    workload = Workload(batch=64, prompt_len=64, gen_len=8, num_requests=64)
    flags = {"device": "cpu", "memory__host": "300MiB"}
    plan = plan_of(small_llama(), workload, machine, **flags)
    assert plan.forecast.full_rows <= plan.workload.prefill_rows
    assert plan.forecast.fill == pytest.approx(max(plan.forecast.full_rows / plan.forecast.token_rows, 1))
    endless = plan_of(
        small_llama(), Workload(batch=64, prompt_len=64, gen_len=8), machine, batches=[64], **flags
    )
    assert plan.fill == inf, "all prompts at once are best"
    assert endless.fill == endless.forecast.fill == 1
    assert endless.forecast.full_rows == endless.forecast.token_rows
