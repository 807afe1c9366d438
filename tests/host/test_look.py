"""A look at the disk beside the choice of a plan: what is chosen, what is foretold, and that nothing is left behind."""

import threading
from math import exp

import pytest
from plan_of import MACHINE, plan_of, spec_of
from tiny_models import streaming_bytes, write_tiny

from zinfer import LLM, SamplingParams
from zinfer.config.profiles import load_machine
from zinfer.errors import BudgetError, MachineError, UsageError
from zinfer.memory import measure, measure_disk
from zinfer.memory.measure_disk import IN_FLIGHT, PIECE_BYTES, ReadLoad, device_of, link_now
from zinfer.memory.nvme import SWITCH_INTERVAL
from zinfer.plan import candidates as choosing
from zinfer.plan import make
from zinfer.plan.make import check_budget, make_plan
from zinfer.plan.records import Workload
from zinfer.runtime import session
from zinfer.runtime.look import Look

PROMPT = [5, 9, 200, 31, 7, 44]
PARAMS = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
MIB = 2**20


def with_rate(machine, rate):
    return machine.model_copy(
        update={"disk_read": machine.disk_read.model_copy(update={"bytes_per_s": rate})}
    )


def test_a_look_goes_on_beside_others_and_is_waited_for():
    holders, go = SWITCH_INTERVAL._holders, threading.Event()

    def looked():
        assert go.wait(60)
        return MACHINE

    look = Look(looked)
    assert look._thread.is_alive()
    assert SWITCH_INTERVAL._holders == holders + 1
    go.set()
    assert look.machine() is MACHINE
    assert look.machine() is MACHINE
    assert not look._thread.is_alive()
    assert SWITCH_INTERVAL._holders == holders


def test_what_a_look_raised_is_told_to_everyone_who_asks():
    holders = SWITCH_INTERVAL._holders

    def looked():
        raise MachineError("ZI-5321", "the disk is gone", remedy="another disk")

    look = Look(looked)
    look.end()
    for _ in range(2):
        with pytest.raises(MachineError, match="ZI-5321"):
            look.machine()
    assert SWITCH_INTERVAL._holders == holders


SPEC = spec_of("llama-3.2-1b", num_hidden_layers=8, vocab_size=4096)
STREAMED = {"device": "cpu", "memory__host": "450MiB"}


def planned(monkeypatch, rate, **flags):
    """A plan chosen by MACHINE, with a disk that does `rate` now; and how often a choice was made."""
    chosen = []
    real = choosing.Candidates.best
    with monkeypatch.context() as patch:
        patch.setattr(
            choosing.Candidates,
            "best",
            lambda self, *args: (chosen.append(self.machine), real(self, *args))[1],
        )
        patch.setattr("plan_of.make_plan", lambda *args, **more: make_plan(*args, **more | {"now": now}))

        def now():
            assert chosen, "the choice does not wait for the look"
            return with_rate(MACHINE, rate)

        plan = plan_of(SPEC, Workload(prompt_len=32, gen_len=16), **STREAMED, **flags)
    return plan, [machine.disk_read.bytes_per_s for machine in chosen]


@pytest.mark.parametrize("log_factor", [-0.19, 0.0, 0.19])
def test_a_disk_that_is_about_as_fast_changes_the_forecast_and_not_the_choice(monkeypatch, log_factor):
    known = MACHINE.disk_read.bytes_per_s
    rate = known * exp(log_factor)
    plan, chosen = planned(monkeypatch, rate)
    as_known = plan_of(SPEC, Workload(prompt_len=32, gen_len=16), **STREAMED)
    assert chosen == [known]
    assert plan.placement == as_known.placement
    assert plan.limit == as_known.limit
    assert plan.machine.disk_read.bytes_per_s == rate
    # The forecast is that of the same choice on a machine with this disk.
    assert plan.forecast.pass_s == pytest.approx(as_known.forecast.pass_s / exp(log_factor), rel=0.02)
    assert plan.forecast.busy_s["disk"] == pytest.approx(
        as_known.forecast.busy_s["disk"] / exp(log_factor), rel=0.01
    )


@pytest.mark.parametrize("log_factor", [-0.21, 0.21, 2.0])
def test_a_disk_that_is_another_one_is_chosen_for(monkeypatch, log_factor):
    known = MACHINE.disk_read.bytes_per_s
    machine = with_rate(MACHINE, known * exp(log_factor))
    plan, chosen = planned(monkeypatch, machine.disk_read.bytes_per_s)
    assert chosen == [known, machine.disk_read.bytes_per_s]
    assert plan == plan_of(SPEC, Workload(prompt_len=32, gen_len=16), machine, **STREAMED)


def test_an_error_of_the_look_ends_the_planning(monkeypatch):
    def now():
        raise MachineError("ZI-5321", "the disk is gone", remedy="another disk")

    monkeypatch.setattr("plan_of.make_plan", lambda *args, **more: make_plan(*args, **more | {"now": now}))
    with pytest.raises(MachineError, match="ZI-5321"):
        plan_of(SPEC, **STREAMED)


@pytest.mark.parametrize("lookahead", ["auto", 0, 3])
@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize("size", [1, 8, 20, 30, 60, 80, 120, 160, 200, 240, 300, 2000])
def test_a_budget_is_refused_at_once_where_its_plan_would_be(monkeypatch, device, lookahead, size):
    """The check simulates nothing where it passes, and says what the plan says where it does not."""
    memory = {"memory__host": f"{size}MiB"}
    if device == "sim":
        memory = {"memory__device": f"{size}MiB", "memory__host": f"{4 * size}MiB"}
    work = Workload(batch=1, prompt_len=16, gen_len=16)

    def told(make):
        monkeypatch.setattr("plan_of.make_plan", make)
        try:
            plan_of(SPEC, work, device=device, runtime__lookahead=lookahead, **memory)
        except BudgetError as error:
            return str(error), error.remedy
        return None

    def checked(spec, source, resolved, machine, workload, **_):
        with monkeypatch.context() as patch:
            if refusal is None:
                patch.setattr(choosing.Candidates, "_judged", lambda *_: pytest.fail("the check simulates"))
            check_budget(spec, source, resolved, machine, workload)

    def is_cut(reason):
        return "cut from" in reason

    plans = []
    refusal = told(lambda *args, **more: plans.append(make_plan(*args, **more)))
    if plans and any(map(is_cut, plans[0].reasons.values())):
        pytest.skip("fits only where it is cut: the check finds that as the plan does")
    assert told(checked) == refusal


def test_a_context_beyond_the_models_is_refused_by_the_check_too(monkeypatch):
    monkeypatch.setattr("plan_of.make_plan", lambda *args, **_: check_budget(*args))
    with pytest.raises(UsageError, match="ZI-1012"):
        plan_of(SPEC, Workload(), device="cpu", runtime__context=500_000)


@pytest.fixture
def folder(tmp_path):
    return write_tiny("llama", tmp_path / "m", num_hidden_layers=6)


@pytest.fixture
def options(folder, tmp_path):
    """Settings under which weights stream from a disk that a profile knows."""
    path = tmp_path / "machine.json"
    machine = load_machine("sim-default").model_copy(
        update={"disk_device": device_of([folder / "model.safetensors"])}
    )
    path.write_text(machine.model_dump_json())
    fixed = {"device": "cpu", "threads": 1, "machine": str(path), "lookahead": 1, "graphs": "off"}
    return fixed | {"memory": {"host": streaming_bytes(folder, PROMPT, PARAMS, **fixed)}}


@pytest.fixture
def counted(monkeypatch):
    """The plans that are made."""
    plans, real = [], make.make_plan

    def noted(*args, **more):
        plans.append(real(*args, **more))
        return plans[-1]

    monkeypatch.setattr("zinfer.runtime.model.make_plan", noted)
    return plans


def test_one_plan_is_made_and_only_when_something_is_asked(folder, options, counted):
    with LLM(folder, **options) as llm:
        assert counted == []
        fitted = llm.fit([PROMPT], PARAMS)
        llm.generate([PROMPT], PARAMS)
        assert llm.plan is fitted
        assert llm.stats.forecast == fitted.forecast
    assert counted == [fitted]


def test_who_asks_for_a_plan_gets_the_one_of_a_small_request(folder, options, counted):
    with LLM(folder, **options) as llm:
        plan = llm.plan
        assert (plan.workload.prompt_len, plan.workload.gen_len) == (16, 16)
        assert llm.plan is plan
        assert llm.stats is llm.stats
        assert llm.stats.forecast == plan.forecast
    assert counted == [plan]
    with LLM(folder, **options) as llm:
        assert llm.stats.forecast == plan.forecast  # without a plan before
    assert len(counted) == 2


def test_other_budgets_before_anything_is_asked(folder, options, counted):
    with LLM(folder, **options) as llm:
        plan = llm.set_memory(host="1GiB")
        assert plan.placement.slots == 0
        assert llm.plan is plan
        assert llm.stats.forecast == plan.forecast
        llm.generate([PROMPT], PARAMS)
        assert llm.plan.placement.slots == 0


@pytest.mark.parametrize("host", [2**30, None])
def test_the_disk_is_looked_at_where_passes_will_wait_for_it(folder, options, host, monkeypatch):
    looked = []

    def for_files(machine, files):
        looked.append(threading.current_thread())
        return with_rate(machine, 0.9 * machine.disk_read.bytes_per_s)

    monkeypatch.setattr(measure, "for_files", for_files)
    with LLM(folder, **options | ({"memory": {"host": host}} if host else {})) as llm:
        plan = llm.fit([PROMPT], PARAMS)
        share = plan.machine.disk_read.bytes_per_s / llm.model.machine.disk_read.bytes_per_s
        assert share == pytest.approx(1.0 if host else 0.9)
        llm.fit([PROMPT * 2], PARAMS)
    assert len(looked) == (0 if host else 1), "once for all plans"
    assert threading.main_thread() not in looked


def test_another_disk_is_measured_before_anything_is_chosen(folder, options, tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(measure, "for_files", lambda machine, files: (looked.append(files), machine)[1])
    path = tmp_path / "elsewhere.json"
    path.write_text(
        load_machine(options["machine"]).model_copy(update={"disk_device": "9:9"}).model_dump_json()
    )
    with LLM(folder, **options | {"machine": str(path)}) as llm:
        assert len(looked) == 1
        assert llm.model.look is None


def test_close_and_a_refusal_leave_no_look_behind(folder, options, monkeypatch):
    go, looks = threading.Event(), []
    real = measure.for_files

    def for_files(machine, files):
        looks.append(threading.current_thread())
        assert go.wait(60)
        return real(machine, files)

    monkeypatch.setattr(measure, "for_files", for_files)
    llm = LLM(folder, **options)
    assert llm.model.look._thread.is_alive()
    go.set()
    llm.close()
    assert not looks[0].is_alive()
    with pytest.raises(BudgetError, match="ZI-2001"):
        LLM(folder, **options | {"memory": {"host": 2**16}})
    assert not looks[-1].is_alive()
    assert len(looks) == 2


def test_the_kernels_are_tried_while_the_disk_is_looked_at(folder, options, monkeypatch):
    go, order = threading.Event(), []

    def for_files(machine, files):
        assert go.wait(60), "the kernels are tried before the look is waited for"
        order.append("look")
        return machine

    monkeypatch.setattr(measure, "for_files", for_files)
    monkeypatch.setattr("zinfer.runtime.model.kernels", lambda: (order.append("kernels"), go.set()))
    with LLM(folder, **options) as llm:
        llm.fit([PROMPT], PARAMS)
    assert order == ["kernels", "look"]


def test_a_look_needs_memory_for_one_read_alone(tmp_path, monkeypatch):
    """Fresh memory may come slower than the reads: four places would take longer to find than the look."""
    path = tmp_path / "weights"
    path.write_bytes(bytes(3 * MIB))
    sizes, places = [], []
    real = measure_disk.HostSlab
    monkeypatch.setattr(measure_disk, "HostSlab", lambda nbytes: (sizes.append(nbytes), real(nbytes))[1])

    def round_seconds(load, reads, _seconds):
        places.append(load._num_places)
        return [1.0]

    with monkeypatch.context() as patch:
        patch.setattr(ReadLoad, "round_seconds", round_seconds)
        link_now([path], MACHINE.disk_read, 0.1)
    assert sizes == [PIECE_BYTES]
    assert set(places) == {1}
    with ReadLoad([path]) as load:
        assert load._num_places == IN_FLIGHT
    with ReadLoad([path], num_places=1) as load:
        assert len(load.round_seconds(measure_disk.ranges([path], MIB), 0.0)) >= 1


def test_a_plan_of_a_session_follows_from_its_model_alone(folder, options):
    """What is planned beside a look is what is planned behind it."""
    with LLM(folder, **options) as llm:
        first = llm.fit([PROMPT], PARAMS)
        later = session.Session(llm.model).fit(llm._requests([PROMPT], PARAMS))
        assert first == later
