"""Plans from configs alone: sizes against closed forms, budgets, refusals that help, and what a saved plan keeps."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_of import MACHINE, SHAPES, plan_of, small_llama, source_of, spec_of

from zinfer.chunks.pack import assemble, layer_sizes
from zinfer.chunks.table import ALIGN, LOOSE_ALIGN
from zinfer.config.machine import Compute, Link, Machine, ProductRate
from zinfer.errors import BudgetError, UsageError
from zinfer.kvcache.pages import PAGE_TOKENS
from zinfer.plan.choose import recorded_room
from zinfer.plan.cost import OpCosts, PassLoad, chunk_seconds, kind_of, seconds_per_byte, visible_keys
from zinfer.plan.explain import alternatives, explain, explained_dict, stand_in
from zinfer.plan.forecast import SteadyPasses
from zinfer.plan.make import Plan, as_read
from zinfer.plan.profile import KV_PAGE_TOKENS, kv_bytes, profile, reserve_for
from zinfer.plan.records import Budget, KvPlan, Tier, Workload
from zinfer.spec.lossless import LOSSLESS
from zinfer.spec.records import DTYPE_BYTES
from zinfer.spec.stored import as_stored, layouts, op_bytes, workspace_bytes

MIB, GIB = 2**20, 2**30


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("opt-175b", 174.6),
        ("llama-3.1-405b", 405.9),
        ("llama-3-70b", 70.6),
        ("llama-3.2-1b", 1.236),
        ("gpt2", 0.124),
    ],
)
def test_parameters_are_those_of_the_published_models(name, billions):
    assert profile(spec_of(name)).num_parameters / 1e9 == pytest.approx(billions, rel=0.005)


def test_bytes_of_a_175_b_model_follow_the_closed_form():
    spec = spec_of("opt-175b")
    sizes = profile(spec)
    layers, width, vocabulary, positions = 96, 12288, 50272, 2050
    weights = 2 * (
        12 * layers * width**2 + vocabulary * width
    )  # the tied head multiplies; no embedding is streamed
    assert sizes.pass_bytes == pytest.approx(weights, rel=0.005)
    assert sizes.row_table_bytes == 2 * (vocabulary + positions) * width
    assert sizes.kv_bytes_per_token == 2 * 2 * layers * width
    assert sizes.flops_per_row == pytest.approx(2 * weights / 2, rel=0.005)
    table = assemble(source_of(spec), 256 * MIB)
    assert sum(chunk.weight_bytes for chunk in table.streamable) == pytest.approx(weights, rel=0.005)
    assert table.total_bytes == pytest.approx(weights, rel=0.01)


WORK = """
import json, resource, sys
from zinfer.checkpoint.index import CheckpointIndex
from zinfer.chunks.source import imagined_source
from zinfer.config.load import load_settings
from zinfer.config.profiles import load_machine
from zinfer.config.resolve import resolve
from zinfer.plan.explain import alternatives, explain
from zinfer.plan.make import make_plan
from zinfer.spec.read import read_spec
from zinfer.spec.records import DTYPE_BYTES
index = CheckpointIndex.open({path!r})
spec = read_spec(index.config)
machine = load_machine("sim-default")
settings = load_settings(flags={{"memory.device": "20GiB", "memory.host": "64GiB"}}, environ={{}}).settings
source = imagined_source(spec.program, spec.lookups, spec.dtype)
plan = make_plan(spec, source, resolve(settings, machine, limits=None), machine)
explain(plan, alternatives(spec, plan))
# Not ru_maxrss: that keeps the peak of the process that forked us.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
used = {{"torch": "torch" in sys.modules, "rss": int(peak.split()[1]) * 1024}}
print(json.dumps(used | {{"cpu_s": resource.getrusage(resource.RUSAGE_SELF).ru_utime}}))
"""


@pytest.mark.parametrize("name", ["opt-175b", "llama-3.1-405b"])
def test_planning_a_huge_model_takes_few_resources_and_no_torch(name):
    # Processor time, which a busy machine does not stretch much, and under a limit: never wall time.
    code = "import resource; resource.setrlimit(resource.RLIMIT_CPU, (40, 40))\n"
    code += WORK.format(path=str(SHAPES / f"{name}.json"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    used = json.loads(done.stdout)
    assert not used["torch"]
    assert used["rss"] < 500 * MIB


def test_the_cache_and_activations_are_part_of_the_budget():
    spec = small_llama()
    workload = Workload(batch=3, prompt_len=100, gen_len=30)
    plan = plan_of(spec, workload, device="cpu", memory__host="200MiB")
    (use,) = plan.uses
    assert use.kv == 3 * 144 * spec.kv_bytes_per_token == kv_bytes(spec, workload)
    assert plan.kv_tokens == 3 * 144
    assert use.activations == plan.reserve.activations + plan.reserve.recorded > 0
    assert use.resident + use.slots + use.kv + use.activations == use.total <= use.budget == 200 * MIB
    assert use.total >= 0.85 * use.budget  # budgets are filled
    more = plan_of(spec, replace(workload, gen_len=600), device="cpu", memory__host="200MiB")
    assert more.uses[0].resident < use.resident
    assert more.forecast.pass_s > plan.forecast.pass_s


def test_pages_of_the_cache_are_as_large_as_planned():
    assert KV_PAGE_TOKENS == PAGE_TOKENS


def test_a_model_that_fits_is_resident_as_a_whole():
    plan = plan_of(small_llama(), device="cpu", memory__host="2GiB")
    assert set(plan.placement.home) == {Tier.HOST}
    assert plan.placement.slots == 0
    assert plan.forecast.bytes_per_pass.get("disk", 0) == 0
    assert plan.forecast.binding in {"compute", "overhead"}


def test_three_tiers_are_used_when_needed():
    plan = plan_of(
        small_llama(), device="sim", machine=MACHINE, memory__device="150MiB", memory__host="250MiB"
    )
    assert {plan.placement.home[chunk.id] for chunk in plan.table.streamable} == set(Tier)
    assert [use.tier for use in plan.uses] == [Tier.DEVICE, Tier.HOST]
    assert all(use.total <= use.budget for use in plan.uses)
    disk = sum(c.read_bytes for c in plan.table.streamable if plan.placement.home[c.id] is Tier.DISK)
    assert plan.forecast.bytes_per_pass["disk"] == disk
    assert plan.forecast.bytes_per_pass["h2d"] > disk
    assert plan.forecast.pass_s >= disk / MACHINE.disk_read.bytes_per_s


def test_the_stated_minimum_runs():
    """Two largest matrices, cache, activations and 256 KiB."""
    for name in ("llama-3.2-1b", "gpt2", "opt-6.7b"):
        spec = spec_of(name)
        workload = Workload(batch=1, prompt_len=16, gen_len=16, prefill_rows=16)
        reserve = reserve_for(spec, workload, exact=True)
        width = DTYPE_BYTES[spec.dtype]
        matrices = sorted((op.matrix.numel * width for op in spec.program if op.matrix), reverse=True)
        budget = (
            2 * matrices[0] + reserve.total + 128 * 1024
        )  # of the 256 KiB rows take 128, counted in reserve
        plan = plan_of(spec, workload, device="cpu", memory__host=budget, runtime__max_rows=16)
        assert plan.uses[0].total <= budget


@settings(max_examples=15)
@given(share=st.floats(0.02, 1.2), step=st.floats(0.01, 0.5))
def test_a_larger_budget_is_predicted_to_be_no_slower(share, step):
    spec = small_llama()
    total = profile(spec).pass_bytes
    passes = []
    for portion in (share, share + step):
        try:
            plan = plan_of(spec, device="cpu", memory__host=int(total * portion), runtime__max_rows=16)
        except BudgetError:
            assert portion < 0.4
            return
        passes.append(plan.forecast.pass_s)
    # Where a second chunk in flight begins to fit it is taken, for its safety, at up to a tenth of the speed.
    assert passes[1] <= passes[0] * 1.1


@pytest.mark.parametrize(
    "flags",
    [
        {"device": "cpu", "memory__host": "20MiB"},
        {"device": "sim", "memory__device": "20MiB", "memory__host": "1GiB"},
        {"device": "sim", "memory__device": "1GiB", "memory__host": "1MiB"},
        {"device": "sim", "memory__device": "20MiB", "memory__host": "1MiB"},
        {"device": "cpu", "memory__host": "100MiB", "runtime__max_rows": 2048, "runtime__lookahead": 3},
        {"device": "cpu", "memory__host": "100MiB", "runtime__max_batch": 64},
    ],
)
def test_an_impossible_budget_is_refused_with_flags_that_then_work(flags):
    spec = small_llama()
    workload = Workload(batch=64, prompt_len=64, gen_len=64)
    with pytest.raises(BudgetError) as refused:
        plan_of(spec, workload, **flags)
    assert refused.value.code == "ZI-2001"
    assert "model.layers" in str(refused.value) or "embed_tokens" in str(refused.value)
    proposed = re.findall(r"--(host|device)-mem (\w+)", refused.value.remedy)
    assert proposed
    changed = flags | {f"memory__{tier}": size for tier, size in proposed}
    plan_of(spec, workload, **changed)


def test_where_the_machine_has_no_more_memory_a_shorter_context_is_proposed():
    spec = small_llama()
    machine = MACHINE.model_copy(update={"host_bytes": 400 * MIB})
    workload = Workload(batch=1, prompt_len=20000, gen_len=20000)
    flags = {"device": "cpu", "memory__host": "100%", "machine": machine}
    with pytest.raises(BudgetError) as refused:
        plan_of(spec, workload, **flags)
    context = int(re.fullmatch(r"--set runtime.context=(\d+)", refused.value.remedy)[1])
    plan_of(spec, workload, runtime__context=context, **flags)


def test_what_is_auto_shrinks_until_it_fits_and_the_plan_says_so():
    spec = small_llama()
    workload = Workload(batch=64, prompt_len=512, gen_len=128)
    plan = plan_of(spec, workload, device="cpu", memory__host="200MiB")
    assert plan.workload.batch < 64
    assert "cut from" in plan.reasons["runtime.max_batch"]
    assert plan.workload.num_requests == 64
    assert plan.forecast.job_s > 127 * plan.forecast.pass_s * 64 / plan.workload.batch
    assert plan.uses[0].total <= 200 * MIB
    with pytest.raises(BudgetError):
        plan_of(spec, workload, device="cpu", memory__host="200MiB", runtime__max_batch=64)
    fixed = plan_of(spec, Workload(batch=2), device="cpu", memory__host="200MiB", runtime__max_rows=32)
    assert fixed.workload.prefill_rows == 32


def test_a_context_beyond_the_models_is_refused_with_one_that_works():
    spec = spec_of("gpt2")
    with pytest.raises(UsageError, match="ZI-1012") as refused:
        plan_of(spec, device="cpu", runtime__context=5000)
    plan_of(spec, device="cpu", runtime__context=int(refused.value.remedy.rpartition("=")[2]))


@pytest.mark.parametrize("flags", [{"device": "cpu", "memory__host": "150MiB"}, {"memory__device": "150MiB"}])
def test_a_saved_plan_comes_back(tmp_path, flags):
    spec = small_llama()
    plan = plan_of(spec, **flags)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json", source_of(spec))
    assert loaded == plan
    assert loaded.to_dict() == plan.to_dict() == json.loads((tmp_path / "plan.json").read_text())
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(UsageError, match="ZI-1011"):
        Plan.load(tmp_path / "plan.json", source_of(spec_of("gpt2")))
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(UsageError, match="ZI-1010"):
        Plan.load(tmp_path / "plan.json", source_of(spec))


def test_weights_lie_where_they_land_where_no_library_sees_them(tmp_path):
    """Exact results may not hang on an address: kernels of ours load from any, libraries choose by it."""
    spec = small_llama()
    kinds = {op.kind for op in spec.program if op.matrix}
    ours = replace(spec, product_sizes=tuple((kind, ()) for kind in kinds))
    one_is_a_librarys = replace(
        ours, product_sizes=(*ours.product_sizes[:-1], (ours.product_sizes[-1][0], (32,)))
    )
    aligns = [
        as_read(source_of(spec), case, device=device, exact=exact).align
        for case in (spec, one_is_a_librarys, ours)
        for device, exact in (("cpu", True), ("cpu", False), ("sim", True), ("cuda:0", False))
    ]
    tight = [ALIGN, LOOSE_ALIGN, ALIGN, ALIGN]
    assert aligns == [*tight, *tight, LOOSE_ALIGN, LOOSE_ALIGN, ALIGN, ALIGN]
    plan = plan_of(ours, device="cpu", memory__host="150MiB")
    assert plan.align == LOOSE_ALIGN
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json", source_of(ours)) == plan
    tree = json.loads((tmp_path / "plan.json").read_text()) | {"align": 3}
    (tmp_path / "plan.json").write_text(json.dumps(tree))
    with pytest.raises(UsageError, match="ZI-1010"):
        Plan.load(tmp_path / "plan.json", source_of(ours))


def test_a_plan_covers_what_its_cache_can_hold():
    plan = plan_of(small_llama(), Workload(batch=4, prompt_len=50, gen_len=50), device="cpu")
    assert plan.covers(Workload(batch=4, prompt_len=60, gen_len=52))
    assert plan.covers(Workload(batch=1, prompt_len=100, gen_len=12))
    assert not plan.covers(Workload(batch=4, prompt_len=60, gen_len=53))
    assert not plan.covers(Workload(batch=5, prompt_len=10, gen_len=10))


def test_explaining_names_tiers_times_and_what_other_budgets_would_buy():
    spec = small_llama()
    plan = plan_of(spec, device="sim", memory__device="150MiB", memory__host="200MiB")
    others = alternatives(spec, plan)
    text = "\n".join(explain(plan, others))
    for word in (
        "LlamaForCausalLM",
        "sim-default",
        "declared",
        "device",
        "host",
        "disk",
        "bound by",
        "tokens/s",
    ):
        assert word in text
    assert all(other.flags in text for other in others)
    better = [other for other in others if other.pass_s is not None and other.pass_s < plan.forecast.pass_s]
    assert better
    assert max(map(len, text.splitlines())) <= 160
    tree = json.loads(json.dumps(explained_dict(plan, others)))
    assert tree["alternatives"][-1]["flags"] == others[-1].flags
    runs = tree["placement"]["home"]
    assert sum(run["chunks"] for run in runs) == len(plan.table.chunks) == tree["model"]["num_chunks"]


def test_an_alternative_is_what_planning_with_its_flags_gives():
    spec = small_llama()
    flags = {"device": "cpu", "runtime__lookahead": 2}
    plan = plan_of(spec, memory__host="250MiB", **flags)
    for other in alternatives(spec, plan):
        if other.pass_s is not None and other.kind == "budgets":
            size = re.fullmatch(r"--host-mem (\w+)", other.flags)[1]
            again = plan_of(spec, memory__host=size, **flags)
            assert again.forecast.pass_s <= other.pass_s * 1.05


@pytest.mark.parametrize("more", [{"device": "cpu"}, {"device": "sim", "memory__device": "150MiB"}])
def test_a_look_ahead_is_passed_over_only_where_it_could_not_be_chosen(monkeypatch, more):
    tried, under, least_s = [], SteadyPasses.under, SteadyPasses.least_s

    def counted(passes, placement):
        tried.append(placement)
        return under(passes, placement)

    monkeypatch.setattr(SteadyPasses, "under", counted)
    counts, plans = [], []
    for least in (least_s, lambda *_: 0.0):
        monkeypatch.setattr(SteadyPasses, "least_s", least)
        made = [plan_of(small_llama(), memory__host=host, **more) for host in ("200MiB", "250MiB", "400MiB")]
        plans.append([(plan.limit, plan.placement, plan.forecast) for plan in made])
        counts.append(len(tried))
    assert plans[0] == plans[1]
    assert counts[0] < counts[1] - counts[0], "some were passed over"


def test_planning_tells_how_far_it_is():
    spec, told = small_llama(), []
    flags = {"device": "cpu", "runtime__lookahead": 2, "memory__host": "250MiB"}

    def watch(done, total, what):
        told.append((done, total, what))

    plan = plan_of(spec, watch=watch, **flags)
    assert told == [(0, 1, "planning")]
    others = alternatives(spec, plan, watch)
    count = len(others)
    assert told[1:] == [(count + at, 2 * count, "planning") for at in range(count)]


def test_what_a_store_would_buy_is_what_planning_with_it_gives():
    spec, flags = small_llama(), {"device": "cpu", "runtime__lookahead": 2, "memory__host": "250MiB"}
    plan = plan_of(spec, **flags)
    stores = {other.flags.split()[-1]: other for other in alternatives(spec, plan) if other.kind == "stores"}
    assert stores.keys() == {LOSSLESS, "int4"}
    assert stores["int4"].pass_s < stores[LOSSLESS].pass_s < 0.8 * plan.forecast.pass_s
    for weights, other in stores.items():
        again = plan_of(as_stored(spec, weights, next(iter(layouts(weights)))), **flags)
        assert again.forecast.pass_s == pytest.approx(other.pass_s, rel=0.15)
    text = "\n".join(explain(plan, list(stores.values())))
    assert re.search(r"stores +zinfer shard --weights lossless .* · the same bits", text)
    assert re.search(r"int4 .* · weights are rounded", text)
    resident = plan_of(spec, **flags | {"memory__host": "4GiB"})
    assert {other.kind for other in alternatives(spec, resident)} == {"budgets"}, "what stays gains nothing"


def test_a_format_that_takes_nothing_of_a_model_is_not_offered():
    spec = small_llama(torch_dtype="float16")
    plan = plan_of(spec, device="cpu", runtime__lookahead=2, memory__host="250MiB")
    stores = [other.flags for other in alternatives(spec, plan) if other.kind == "stores"]
    assert stores == ["zinfer shard --weights int4"]


FLAT = Compute(
    products={"BF16": (ProductRate(rows=1, seconds_per_gb=0.1), ProductRate(rows=9, seconds_per_gb=0.9))},
    attention_flops_per_s=1e9,
    prefill_attention_flops_per_s=1e10,
    op_overhead_s=1e-3,
    chunk_overhead_s=2e-3,
)


def test_compute_seconds_follow_the_formula():
    spec = small_llama()
    table = assemble(source_of(spec), 64 * MIB)
    load = PassLoad(rows=9, sequences=3, context=40)
    costs = chunk_seconds(spec, table, FLAT, load, exact=False)
    behind = ("o", "gate", "up", "down")  # the last layer's attention: there only rows that want logits go on
    narrow = [op for op in spec.program if op.layer == spec.num_layers - 1 and op.kind in behind]
    head_bytes = 2 * (spec.vocab_size * spec.model_dim + sum(op.weight_numel for op in narrow))
    body_bytes = profile(spec).pass_bytes - head_bytes
    attention_s = 4 * 4 * 9 * (40 - 1) * spec.num_heads * spec.head_dim / 1e9
    per_head_byte = 0.3e-9  # three rows, between the points
    expected = body_bytes * 0.9e-9 + head_bytes * per_head_byte + attention_s
    assert sum(cost.work for cost in costs) == pytest.approx(expected, rel=1e-3)
    overhead_s = 1e-3 * len(table.chunk_of_op) + 2e-3 * len(table.streamable)
    assert sum(cost.overhead for cost in costs) == pytest.approx(overhead_s)
    prefill = chunk_seconds(spec, table, FLAT, PassLoad(rows=48, sequences=3, context=16), exact=False)
    attention_s = 4 * 4 * 48 * 9 * spec.num_heads * spec.head_dim / 1e10
    products_s = sum(cost.work for cost in prefill) - attention_s
    assert products_s == pytest.approx(body_bytes * 4.8e-9 + head_bytes * per_head_byte, rel=1e-3)


EVERY_SHAPE = sorted(path.stem for path in SHAPES.glob("*.json"))


@pytest.mark.parametrize("name", EVERY_SHAPE)
def test_ops_of_one_kind_cost_the_same(name):
    spec, load = spec_of(name), PassLoad(rows=9, sequences=3, context=5000)
    table = assemble(source_of(spec), 64 * MIB)
    costs = OpCosts(spec, FLAT, load, exact=True)
    one_by_one = [sum(costs.work(spec.program[op]) for op in chunk.ops) for chunk in table.chunks]
    assert [cost.work for cost in chunk_seconds(spec, table, FLAT, load, exact=True)] == one_by_one
    assert len({kind_of(spec, op) for op in spec.program}) < len(spec.program) / 4


@pytest.mark.parametrize("weights", [LOSSLESS, "int4"])
@pytest.mark.parametrize("name", EVERY_SHAPE)
def test_the_ops_that_stand_for_a_stores_are_as_large(name, weights):
    spec = spec_of(name)
    real = as_stored(spec, weights, next(iter(layouts(weights))))
    standing = stand_in(spec, weights)
    assert [op_bytes(standing, op) for op in standing.program] == [op_bytes(real, op) for op in real.program]
    assert workspace_bytes(standing, "cpu") == workspace_bytes(real, "cpu")


def test_scored_rows_go_through_the_head():
    spec = small_llama()
    table, scored = assemble(source_of(spec), 64 * MIB), PassLoad(48, 3, 16, logits=30)
    behind = ("o", "gate", "up", "down", "head")
    last = [op for op in spec.program if op.layer >= spec.num_layers - 1 and op.kind in behind]
    work_s = [
        sum(cost.work for cost in chunk_seconds(spec, table, FLAT, load, exact=False))
        for load in (replace(scored, logits=0), scored)
    ]
    more_s = (
        2 * sum(op.weight_numel for op in last) * (3.0e-9 - 0.3e-9)
    )  # 30 rows instead of one of each sequence
    assert work_s[1] - work_s[0] == pytest.approx(more_s, rel=0.01)


def test_a_job_of_scores_is_foretold_with_its_logits():
    spec, flags = small_llama(), {"device": "cpu", "memory__host": "2GiB"}
    asked = Workload(batch=40, prompt_len=100, gen_len=1, num_requests=40)
    plain = plan_of(spec, asked, **flags)
    whole, few = (
        plan_of(spec, replace(asked, logit_rows=round(4000 * share), logit_share=share), **flags)
        for share in (1.0, 0.01)
    )
    row_s = [plan.forecast.prefill_s / plan.forecast.full_rows for plan in (plain, whole)]
    assert row_s[1] > 1.2 * row_s[0]
    assert few.forecast.prefill_s == pytest.approx(plain.forecast.prefill_s, rel=0.01)
    scored = whole.workload.logits_of(whole.forecast.full_rows)
    assert scored == whole.forecast.full_rows <= whole.workload.logit_rows, "no pass scores more"
    assert few.forecast.full_rows == plain.forecast.full_rows


def test_a_pass_that_a_host_records_costs_what_replaying_does():
    spec = replace(small_llama(), dtype="BF16")
    table = assemble(source_of(spec), 64 * MIB)
    recording = FLAT.model_copy(update={"replayed_op_s": 1e-6})

    def overhead_s(load, *, exact=False, spec=spec, compute=recording, all_stay=True):
        costs = chunk_seconds(spec, table, compute, load, exact=exact, all_stay=all_stay)
        return sum(cost.overhead for cost in costs)

    decode, ops = PassLoad(rows=3, sequences=3, context=40), len(table.chunk_of_op)
    assert overhead_s(decode) == pytest.approx(1e-6 * ops), "nor is a lease"
    one_by_one = overhead_s(decode, compute=FLAT)
    assert one_by_one > 1e-3 * ops
    for other in (
        PassLoad(rows=9, sequences=3, context=40),
        PassLoad(rows=257, sequences=257, context=40),
        PassLoad(rows=1, sequences=1, context=1),
        PassLoad(rows=3, sequences=3, context=40, kv=KvPlan(dtype="INT8")),
    ):
        assert overhead_s(other) == one_by_one
    assert overhead_s(decode, exact=True) == overhead_s(decode)
    leases_s = recording.chunk_overhead_s * sum(bool(chunk.ops) for chunk in table.chunks)
    assert overhead_s(decode, all_stay=False) == pytest.approx(1e-6 * ops + leases_s), "part by part"
    for change in ({"norm": "layer"}, {"activation": "gelu"}, {"gated_mlp": False}):
        assert overhead_s(decode, spec=replace(spec, **change)) == overhead_s(decode)
    for change in ({"dtype": "F32"}, {"dtype": "F16"}):
        assert overhead_s(decode, spec=replace(spec, **change)) == one_by_one


@pytest.mark.parametrize(("batch", "memory"), [(64, 560), (128, 640)])
def test_weights_make_way_for_recorded_passes_of_many_rows(batch, memory):
    """And for them alone: not where graphs are off, nor where that would make something stream, nor where nothing is
    left; few rows take what happens to be left."""
    spec = replace(small_llama(), dtype="BF16")
    workload = Workload(batch=batch, prompt_len=16, gen_len=16)
    budget = Budget(host=memory * MIB)
    wanted = recorded_room(spec, workload, budget, exact=False)
    assert recorded_room(spec, workload, Budget(host=64 * wanted - 64), exact=False) == 0, "more than a part"
    assert 0.5 * MIB < wanted < 32 * MIB

    host = MACHINE.host.model_copy(update={"replayed_op_s": 1e-6})
    recording = MACHINE.model_copy(update={"host": host})

    def planned(memory, machine=recording, **flags):
        return plan_of(spec, workload, machine, device="cpu", exact=False, memory__host=memory, **flags)

    streams = planned(budget.host)
    assert streams.placement.slots and streams.reserve.recorded >= wanted
    assert streams.uses[0].total <= budget.host
    off = planned(budget.host, runtime__graphs="off")
    assert off.reserve.recorded == 0
    assert planned(budget.host, MACHINE).placement == off.placement, (
        "a host that records nothing keeps no room"
    )
    assert streams.forecast.bytes_per_pass["disk"] >= off.forecast.bytes_per_pass["disk"]
    whole = planned("2GiB")
    assert not whole.placement.slots
    held = whole.uses[0].total - whole.reserve.recorded
    assert not planned(held).placement.slots, "all stays, though nothing is left"
    for other in (
        replace(workload, batch=32),
        replace(workload, batch=257),
        replace(workload, kv=KvPlan(dtype="INT8")),
    ):
        assert recorded_room(spec, other, budget, exact=False) == 0
    assert recorded_room(replace(spec, dtype="F32"), workload, budget, exact=False) == 0


def test_exact_mode_has_rates_of_its_own_or_pads():
    assert seconds_per_byte(FLAT, "BF16", 1, exact=False) == pytest.approx(0.1e-9)
    assert seconds_per_byte(FLAT, "BF16", 1, exact=True) == pytest.approx(0.2e-9)
    assert seconds_per_byte(FLAT, "F32", 1, exact=True) == pytest.approx(0.4e-9)
    own = FLAT.model_copy(
        update={"products": FLAT.products | {"BF16 exact": (ProductRate(rows=1, seconds_per_gb=5),)}}
    )
    assert seconds_per_byte(own, "BF16", 1, exact=True) == pytest.approx(5e-9)


def test_a_window_limits_what_attention_sees():
    spec = replace(small_llama(), sliding_window=100, window_layers=(True, False, True, False))
    load = PassLoad(rows=1, sequences=1, context=500)
    assert [visible_keys(spec, layer, load) for layer in range(4)] == [100, 500, 100, 500]
    assert visible_keys(small_llama(), 0, PassLoad(rows=101, sequences=1, context=101)) == 51


def test_a_slow_disk_binds_and_a_slow_processor_binds():
    spec = small_llama()
    machine = Machine(
        name="test",
        host_bytes=GIB,
        disk_read=Link(bytes_per_s=1e9),
        host=Compute(
            products={"BF16": (ProductRate(rows=1, seconds_per_gb=0.1),)},
            attention_flops_per_s=1e15,
            op_overhead_s=0,
            chunk_overhead_s=0,
        ),
    )
    flags = {"device": "cpu", "memory__host": "150MiB"}
    streamed = plan_of(spec, machine=machine, **flags)
    assert streamed.forecast.binding == "disk"
    assert streamed.forecast.pass_s == pytest.approx(streamed.forecast.busy_s["disk"], rel=0.02)
    slow = machine.model_copy(update={"host": machine.host.model_copy(update={"op_overhead_s": 1.0})})
    overhead = plan_of(spec, machine=slow, **flags)
    assert overhead.forecast.binding == "overhead"
    assert overhead.forecast.pass_s == pytest.approx(len(spec.program) - 1, rel=0.05)


def test_the_first_token_waits_for_all_bytes_and_every_prefill_pass():
    spec = small_llama()
    workload = Workload(batch=1, prompt_len=64, gen_len=8)
    one = plan_of(spec, workload, device="cpu", memory__host="2GiB")
    load_s = one.table.total_bytes / MACHINE.disk_read.bytes_per_s
    assert one.forecast.first_token_s >= load_s
    four = plan_of(spec, workload, device="cpu", memory__host="150MiB", runtime__max_rows=16)
    assert four.forecast.first_token_s >= load_s + 3 * four.forecast.prefill_s
    assert four.forecast.job_s == pytest.approx(
        four.forecast.first_token_s + 7 * four.forecast.pass_s,
        rel=0.02,  # the queue's passes are not simulated singly
    )


def test_units_of_the_search_and_of_the_table_are_the_same():
    spec = small_llama()
    units = [size for sizes in layer_sizes(source_of(spec)) for size in sizes]
    assert sorted(chunk.nbytes for chunk in assemble(source_of(spec), 1).streamable) == sorted(units)
