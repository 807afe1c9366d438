"""KV pages below a device, and in eight bits: same tokens wherever they lie, counted links, bounded error."""

import json

import pytest
import torch
from tiny_models import write_tiny

from zinfer import LLM, SamplingParams
from zinfer.api import DEMO
from zinfer.chunks.pack import assemble
from zinfer.config.profiles import SIM_DEFAULT, load_machine
from zinfer.errors import BudgetError
from zinfer.kvcache import planes
from zinfer.kvcache.cache import PagedKv, PagedView
from zinfer.kvcache.pages import kv_cache_bytes
from zinfer.kvcache.planes import Int8Planes, make_planes
from zinfer.layers.packed import Span
from zinfer.plan.kv import kv_plans
from zinfer.plan.place import smallest_budget
from zinfer.plan.records import KvPlan, Tier
from zinfer.runtime.executor import Executor

PROMPTS = [[5, 9, 200, 31, 7, 44], [17], [3, 3, 8, 120, 77, 45, 90, 14, 2, 60, 333] * 6] + [[9, 8] * 30] * 3
GREEDY = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)
FIXED = {"max_rows": 24, "max_batch": 6, "threads": 1}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny("llama", tmp_path_factory.mktemp("tiny") / "model")


def machine_file(folder, side):
    """A machine on which attention is cheaper on that side: the host computes fast, or the links and the device do."""
    machine = load_machine(SIM_DEFAULT)
    slow, fast = {"bytes_per_s": 2e6, "latency_s": 1e-6}, {"bytes_per_s": 24e9, "latency_s": 1e-6}
    rate = {"host": 1e12, "device": 1e6}[side]
    host = machine.host.model_dump() | {"attention_flops_per_s": rate}
    links = {"h2d": fast if side == "device" else slow, "d2h": fast if side == "device" else slow}
    path = folder / f"{side}.json"
    path.write_text(json.dumps(machine.model_dump() | links | {"host": host}))
    return path


def run(folder, **options):
    """Tokens, logits and what the passes moved, with the books checked after every pass."""
    with LLM(folder, **{**FIXED, **options}) as llm:
        tokens = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]
        passes = list(llm.stats.passes)
        plan = llm.plan
        return tokens, llm.logits(PROMPTS[0]), plan, passes


@pytest.fixture
def balanced(monkeypatch):
    """Counts passes after which every ledger balanced."""
    plain, counts = Executor.run, []

    def checked(self, batches):
        out = plain(self, batches)
        self.manager.check()
        counts.append(len(batches))
        return out

    monkeypatch.setattr(Executor, "run", checked)
    return counts


@pytest.mark.parametrize("side", ["host", "device"])
@pytest.mark.parametrize("kv_dtype", ["model", "int8"])
def test_a_cache_too_large_for_the_device_completes_where_the_plan_says(
    side, kv_dtype, tiny, tmp_path, balanced
):
    common = {"kv_dtype": kv_dtype, "machine": machine_file(tmp_path, side)}
    tokens, logits, plan, _ = run(tiny, device="sim", memory={"device": "1GiB"}, kv="device", **common)
    assert plan.workload.kv == KvPlan(Tier.DEVICE, "INT8" if kv_dtype == "int8" else None)
    with LLM(tiny, device="cpu", machine="sim-default") as llm:
        spec, table = llm.model.spec, assemble(llm.model.source, 1)
    least = smallest_budget(table, compute_tier=Tier.DEVICE, reserve=plan.reserve)
    small = {"device": least.device - plan.reserve.kv // 2, "host": "64MiB"}
    with pytest.raises(BudgetError):
        run(tiny, device="sim", memory=small, kv="device", **common)

    del balanced[:]
    far_tokens, far_logits, plan, passes = run(tiny, device="sim", memory=small, **common)
    assert plan.workload.kv.tier is Tier.HOST
    assert plan.workload.kv.attend == side
    assert far_tokens == tokens
    assert torch.equal(far_logits, logits)
    assert len(balanced) > len(passes) > 9

    crossing = 2 * spec.num_kv_heads + (spec.num_heads if side == "host" else 0)
    for one in passes:
        assert one.num_bytes["d2h"] == one.rows * spec.num_layers * crossing * spec.head_dim * 2
    device, host = plan.uses
    assert device.kv == 0
    assert host.kv == plan.kv_tokens * spec.kv_token_bytes(plan.workload.kv.dtype or "BF16") > 0
    assert host.total <= host.budget


def test_the_cache_stays_on_a_device_that_has_room(tiny):
    with LLM(tiny, device="sim", machine="sim-default", **FIXED) as llm:
        llm.generate(PROMPTS, GREEDY)
        assert llm.plan.workload.kv == KvPlan(Tier.DEVICE)
        assert "d2h" not in llm.stats.passes[0].num_bytes
        resolved, spec, machine = llm.model.resolved, llm.model.spec, llm.model.machine
        near, far = kv_plans(spec, resolved, machine, llm.plan.workload)
        assert (near.attend, far.tier) == ("resident", Tier.HOST)


def test_pages_that_come_up_are_kept_for_the_other_pieces_of_their_sequence(tmp_path, monkeypatch):
    folder = write_tiny("llama", tmp_path / "model", num_attention_heads=8, num_key_value_heads=1)
    options = {"device": "sim", "machine": machine_file(tmp_path, "device"), "kv": "host", "max_rows": 900}

    def blocks_up():
        """Whole blocks of a layer that came up, on average."""
        with LLM(folder, **{**FIXED, **options}) as llm:
            llm.logits([7] * 250)
            (one,) = llm.stats.passes
            spec = llm.model.spec
            assert llm.plan.workload.kv.attend == "device"
            weights = sum(chunk.nbytes for chunk in llm.plan.table.streamable)
            return (one.num_bytes["h2d"] - weights) / (256 * spec.kv_token_bytes("BF16"))

    assert 1 <= blocks_up() <= 3, "a block, cut to a few sizes"
    monkeypatch.setattr(PagedView, "read", PagedView._read)
    assert blocks_up() > 6, "sixteen pieces of rows"


def rows_of(count, kv_heads=2, dim=16):
    draw = torch.Generator().manual_seed(count)
    return torch.randn(2, count, kv_heads, dim, generator=draw) * torch.logspace(-3, 3, count)[:, None, None]


def test_eight_bits_are_off_by_at_most_half_a_step():
    plane = Int8Planes(torch.empty(0), torch.empty(0))
    rows = rows_of(50)
    back = plane.decode(plane.encode(rows))
    step = rows.abs().amax(-1, keepdim=True) / 127
    assert ((back - rows).abs() <= 0.5001 * step).all()
    assert ((back - rows).abs() > 0.4 * step).any()
    assert torch.equal(plane.decode(plane.encode(torch.zeros(2, 3, 2, 16))), torch.zeros(2, 3, 2, 16))
    for bad in (torch.nan, torch.inf):
        rows[0, 1, 0, 3] = bad
        assert not plane.decode(plane.encode(rows))[0, 1, 0].isfinite().all()
        assert plane.decode(plane.encode(rows))[0, 1, 1].isfinite().all()


@pytest.mark.parametrize("dtype", ["BF16", "F32", "INT8"])
def test_pages_cost_what_the_plan_counts(dtype):
    made = make_planes(3, 2, 16, 5, dtype)
    assert sum(x.untyped_storage().nbytes() for x in made.tensors) == kv_cache_bytes(3, 2, 16, 5, dtype)
    assert kv_cache_bytes(1, 1, 64, 1, "INT8") == 16 * 2 * (64 + 4)


def test_int8_pages_are_spilled_and_moved_like_any(tmp_path):
    kv = PagedKv(num_layers=2, num_kv_heads=2, head_dim=16, num_pages=8, dtype="INT8", spill_folder=tmp_path)
    kv.open(1, 40)
    rows = rows_of(40)
    view = kv.view([1], (0, 40))
    for layer in (0, 1):
        view.stage(layer, *rows)
    view.commit([[*range(20), 25, 39]])

    def held():
        view = kv.view([1], (0, 0))
        return torch.stack(
            [torch.cat(view.read(layer, view.locate([Span(0, 0, 22)], 22))) for layer in (0, 1)]
        )

    kept = rows[:, [*range(20), 25, 39]]
    assert torch.equal(held()[1], Int8Planes.decode(view._planes, view._planes.encode(kept)))
    before = held()
    kv.spill(1)
    kv.open(2, 5)
    assert kv.restore(1, 40)
    assert torch.equal(held(), before)


def distance(prompt, **options):
    """How far int8 pages move the bundled model's distributions: the largest KL divergence over a text, in nats."""
    log_probs = []
    for kv_dtype in ("model", "int8"):
        with LLM(DEMO, device="cpu", machine="sim-default", kv_dtype=kv_dtype, threads=1, **options) as llm:
            log_probs.append(llm.logits(prompt).double().log_softmax(-1))
    return float((log_probs[0].exp() * (log_probs[0] - log_probs[1])).sum(-1).max())


TEXT = (
    "import os\n\n\ndef walk(folder):\n    for name in sorted(os.listdir(folder)):\n        yield name\n" * 3
)


def test_int8_pages_hardly_move_what_the_model_says(monkeypatch):
    assert 0 < distance(TEXT) < 2e-3
    plain = Int8Planes.decode
    monkeypatch.setattr(
        planes.Int8Planes, "decode", lambda self, parts: plain(self, (parts[0], parts[1].roll(1, -1)))
    )
    assert distance(TEXT) > 2e-2, "scales of the wrong head would be seen"
