"""Where the planner puts the cache: formats, sides, bytes in the right tier, and the seconds it counts with."""

import pytest
from plan_of import MACHINE, plan_of, small_llama, source_of

from zinfer.config.machine import Link
from zinfer.errors import BudgetError, UsageError
from zinfer.plan.cost import PassLoad, attention_rate, far_attention_s
from zinfer.plan.explain import explain
from zinfer.plan.make import Plan
from zinfer.plan.records import KvPlan, Tier, Workload
from zinfer.spec.cost import attention_flops

GIB, MIB = 2**30, 2**20
LONG = Workload(batch=64, prompt_len=1000, gen_len=1000)
DEVICE = {"device": "sim", "memory__host": "64GiB"}


def machine_with(host_rate, link_rate):
    host = MACHINE.host.model_copy(update={"attention_flops_per_s": host_rate})
    link = Link(bytes_per_s=link_rate, latency_s=1e-5)
    return MACHINE.model_copy(update={"host": host, "h2d": link, "d2h": link})


@pytest.mark.parametrize("attend", ["host", "device"])
@pytest.mark.parametrize("dtype", [None, "INT8"])
def test_seconds_of_a_layer_follow_the_bytes_that_cross(attend, dtype):
    spec, machine = small_llama(), machine_with(5e10, 1e9)
    load = PassLoad(rows=8, sequences=8, context=500, kv=KvPlan(Tier.HOST, dtype, attend))
    kv_row = 2 * spec.num_kv_heads * spec.head_dim
    query = 8 * spec.num_heads * spec.head_dim * 2
    down, up = 8 * kv_row * 2, 8 * 500 * (kv_row * 2 if dtype is None else kv_row + 8 * spec.num_kv_heads)
    if attend == "host":
        links = 3 * 1e-5 + (down + 2 * query) / 1e9
        engine = machine.host
    else:
        links = 2 * 1e-5 + (down + up) / 1e9
        engine = machine.device
    computing = attention_flops(spec, 8, 500) / attention_rate(engine, load, exact=True)
    assert far_attention_s(spec, machine, load, 500, exact=True) == pytest.approx(links + computing)


@pytest.mark.parametrize(("host_rate", "link_rate", "side"), [(1e12, 1e8, "host"), (1e8, 1e11, "device")])
def test_attention_is_planned_on_the_cheaper_side(host_rate, link_rate, side):
    spec = small_llama()
    plan = plan_of(
        spec, LONG, machine_with(host_rate, link_rate), runtime__kv="host", memory__device="8GiB", **DEVICE
    )
    assert plan.workload.kv == KvPlan(Tier.HOST, None, side)
    device, host = plan.uses
    assert (device.kv, host.kv) == (0, plan.kv_tokens * spec.kv_bytes_per_token)
    assert host.activations > 0
    assert host.total <= host.budget
    near = plan_of(spec, LONG, runtime__kv="device", memory__device="8GiB", **DEVICE)
    assert near.workload.kv == KvPlan(Tier.DEVICE)
    assert near.uses[0].kv == host.kv
    assert near.uses[1].kv == near.uses[1].activations == 0


def test_a_cache_larger_than_the_device_goes_below_it_and_else_stays():
    spec = small_llama()
    roomy = plan_of(spec, LONG, memory__device="8GiB", **DEVICE)
    assert roomy.workload.kv.attend == "resident"
    size = roomy.reserve.kv // 2
    with pytest.raises(BudgetError):
        plan_of(
            spec,
            LONG,
            memory__device=size,
            runtime__kv="device",
            runtime__max_batch=64,
            runtime__max_rows=64,
            **DEVICE,
        )
    small = plan_of(spec, LONG, memory__device=size, runtime__max_batch=64, runtime__max_rows=64, **DEVICE)
    assert small.workload.batch == 64
    assert small.workload.kv.tier is Tier.HOST
    assert "below the device" in small.reasons["runtime.kv"]
    assert any("cache" in line and "host memory" in line for line in explain(small))


def test_int8_pages_are_counted_and_never_chosen_unasked():
    spec = small_llama()
    plain, eight = (
        plan_of(spec, LONG, memory__device="8GiB", runtime__kv_dtype=word, **DEVICE)
        for word in ("auto", "int8")
    )
    assert plain.workload.kv.dtype is None
    assert eight.workload.kv.dtype == "INT8"
    assert eight.reserve.kv / plain.reserve.kv == pytest.approx((spec.head_dim + 4) / (2 * spec.head_dim))
    with pytest.raises(UsageError, match="kv_dtype"):
        plan_of(spec, runtime__kv_dtype="int4")


def test_on_a_cpu_there_is_one_place():
    plan = plan_of(small_llama(), device="cpu", memory__host="8GiB", runtime__kv="host")
    assert plan.workload.kv == KvPlan(Tier.HOST)
    assert "not used" in plan.reasons["runtime.kv"]


def test_a_saved_plan_keeps_where_the_cache_is(tmp_path):
    spec = small_llama()
    plan = plan_of(spec, LONG, runtime__kv="host", runtime__kv_dtype="int8", memory__device="8GiB", **DEVICE)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json", source_of(spec))
    assert again.workload == plan.workload
    assert again.reserve == plan.reserve
    assert again.uses == plan.uses
