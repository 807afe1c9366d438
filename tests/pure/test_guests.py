"""Who comes to stay with the second pass: as many as pay where memory is slower than the disk, else nobody."""

import json
from dataclasses import replace

import pytest
from plan_of import MACHINE, plan_of, source_of, spec_of

from zinfer.config.machine import There
from zinfer.plan.explain import explain
from zinfer.plan.forecast import prefill_load, simulate_loading
from zinfer.plan.make import Plan
from zinfer.plan.records import Fetch, Workload
from zinfer.plan.schedule import build_schedule
from zinfer.units import Bytes

SPEC = spec_of("llama-3.2-1b", num_hidden_layers=8, vocab_size=4096)
WORK = Workload(batch=1, prompt_len=32, gen_len=16)
STREAMED = {"device": "cpu", "memory__host": "450MiB"}
DISK = MACHINE.disk_read.bytes_per_s


def machine(share):
    """Memory that nobody has used comes at this share of the disk's rate; None: nobody has measured it."""
    return MACHINE.model_copy(update={"fresh_bytes_per_s": share and share * DISK})


def guests_of(plan):
    return {step.chunk for step in plan.schedule.first if isinstance(step, Fetch) and step.as_guest}


def without_guests(plan):
    placement = replace(plan.placement, guests=())
    return replace(plan, placement=placement, schedule=build_schedule(plan.table, placement))


def seconds(plan, machine):
    """The first two passes: as the plan has them, the prompt first and then one token."""
    prefill = prefill_load(plan.workload, plan.forecast.full_rows)
    decode = replace(prefill, rows=1, sequences=1)
    runs = simulate_loading(
        SPEC, plan.table, plan.placement, plan.schedule, machine, [prefill, decode], exact=plan.exact
    )
    return [run.seconds for run in runs]


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_where_memory_is_slower_than_the_disk_some_of_what_stays_comes_with_the_second_pass(share):
    slow = machine(share)
    plan = plan_of(SPEC, WORK, slow, **STREAMED)
    plain = without_guests(plan)
    assert guests_of(plan) == set(plan.placement.guests)
    assert plan.placement.guests
    assert all(map(plan.placement.resident, plan.placement.guests))
    assert all(
        plan.table.chunks[guest].nbytes <= plan.placement.slot_bytes for guest in plan.placement.guests
    )
    first_s, second_s = seconds(plan, slow)
    assert first_s < seconds(plain, slow)[0]
    assert first_s + second_s <= 1.11 * (seconds(plain, slow)[0] + plan.forecast.pass_s)
    # All else of the plan is what it is without them.
    again = plan_of(SPEC, WORK, machine(None), **STREAMED)
    assert again == replace(plain, forecast=again.forecast, machine=again.machine, curve=again.curve)
    assert plan.forecast.pass_s == pytest.approx(again.forecast.pass_s)
    assert plan.forecast.first_token_s < seconds(plain, slow)[0]


@pytest.mark.parametrize(
    ("share", "flags"),
    [
        (None, STREAMED),  # nobody has measured it
        (50.0, STREAMED),  # as good as there
        (0.2, {"device": "cpu", "memory__host": "20GiB"}),  # nothing streams
        (0.2, STREAMED | {"runtime__lookahead": 0}),  # the serial twin moves nothing beside anything
        (
            0.2,
            {"device": "sim", "memory__device": "450MiB", "memory__host": "20GiB"},
        ),  # a link binds, not memory
    ],
)
def test_otherwise_nobody_is_read_twice(share, flags):
    plan = plan_of(SPEC, WORK, machine(share), **flags)
    assert plan.placement.guests == ()
    assert plan.schedule.second == ()
    assert not guests_of(plan)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_nobody_waits_for_memory_that_is_there(share):
    there = machine(share).model_copy(update={"there": There(nbytes=2**30)})
    plan = plan_of(SPEC, WORK, there, **STREAMED)
    assert plan.placement.guests == ()
    slow, plain = (plan_of(SPEC, WORK, machine(each), **STREAMED) for each in (share, None))
    assert plan.forecast.job_s < slow.forecast.job_s
    assert plan.forecast.job_s == pytest.approx(plain.forecast.job_s, rel=0.03)


@pytest.mark.parametrize("there", [0, 100, 1000])
def test_who_waits_is_chosen_again_once_it_is_known_what_is_there(there):
    """As if it had been known at once."""
    slow = machine(0.2)
    now = slow.model_copy(update={"there": There(nbytes=there * 2**20)})
    waited = plan_of(SPEC, WORK, slow, now=lambda: now, **STREAMED)
    known = plan_of(SPEC, WORK, now, **STREAMED)
    assert waited == replace(known, forecast=waited.forecast)
    assert waited.forecast.job_s == pytest.approx(known.forecast.job_s)
    assert (waited.placement.guests == ()) is (there == 1000)
    assert waited.machine.there.nbytes == there * 2**20


def test_the_job_is_foretold_with_what_its_second_pass_reads_again():
    slow = machine(0.2)
    plan = plan_of(SPEC, WORK, slow, **STREAMED)
    first_s, second_s = seconds(plan, slow)
    others_s = (WORK.gen_len - 2) * plan.forecast.pass_s
    assert plan.forecast.first_token_s == pytest.approx(first_s)
    assert plan.forecast.job_s == pytest.approx(first_s + second_s + others_s, rel=0.1)


def test_a_prompt_of_several_passes_waits_for_the_guests_too():
    slow = machine(0.2)
    work = Workload(batch=1, prompt_len=64, gen_len=16)
    plan = plan_of(SPEC, work, slow, **STREAMED, runtime__max_rows=16)
    assert plan.placement.guests
    prefill = prefill_load(plan.workload, plan.forecast.full_rows)
    assert prefill.rows < 64
    runs = simulate_loading(
        SPEC, plan.table, plan.placement, plan.schedule, slow, [prefill, prefill], exact=plan.exact
    )
    later = plan.forecast.prefill_s
    feeds = -(-64 // prefill.rows)
    wanted = sum(run.seconds for run in runs) + (feeds - 2) * later
    assert plan.forecast.first_token_s == pytest.approx(wanted, rel=0.02)


def test_the_explanation_says_how_much_comes_later_and_why():
    slow = plan_of(SPEC, WORK, machine(0.2), **STREAMED)
    line = next(line for line in explain(slow) if "second pass" in line)
    nbytes = sum(slow.table.chunks[guest].nbytes for guest in slow.placement.guests)
    assert str(Bytes(nbytes)) in line
    assert not any("second pass" in line for line in explain(plan_of(SPEC, WORK, machine(None), **STREAMED)))


def test_a_saved_plan_keeps_its_guests(tmp_path):
    plan = plan_of(SPEC, WORK, machine(0.2), **STREAMED)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json", source_of(SPEC))
    assert loaded == plan
    assert loaded.schedule.second == plan.schedule.second != ()
    tree = json.loads((tmp_path / "plan.json").read_text())
    assert tree["placement"]["guests"] == list(plan.placement.guests)
    del tree["placement"]["guests"]  # as an older version wrote it
    (tmp_path / "plan.json").write_text(json.dumps(tree))
    assert Plan.load(tmp_path / "plan.json", source_of(SPEC)).placement.guests == ()
