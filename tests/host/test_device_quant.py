"""Quantised products by a device's kernels, in Triton's interpreter: against slow twins, and when they are taken."""

from dataclasses import replace

import kernel_parity
import pytest
import torch
from kernel_parity import fused_error, interprets, quant_case, slot_difference
from plan_of import small_llama

from zinfer.kernels import choice, fused_quant, quant, served
from zinfer.kernels.fused_quant import MOST_ROWS, fused, num_splits
from zinfer.kernels.panels import dequantise
from zinfer.plan.profile import reserve_for
from zinfer.plan.records import Workload
from zinfer.spec.quant import FORMATS, GPU_SLOT_BYTES, SLOT_BYTES, slot_outputs
from zinfer.spec.stored import as_stored, workspace_bytes

pytestmark = pytest.mark.skipif(
    not interprets(), reason="Triton's interpreter is off: tests/gpu has the same cases for the device"
)

CLOSE = {torch.bfloat16: 6e-3, torch.float16: 8e-4}


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize(("rows", "splits", "panel"), [(1, 1, 64), (3, 2, 32), (16, 3, 64)])
def test_the_fused_product_agrees_with_the_slow_twin(rows, splits, panel, weights, dtype):
    """200 outputs leave a rest in the last panel; 5 groups do not share out evenly."""
    assert fused_error("cpu", dtype, weights, rows, 200, 320, splits=splits, panel=panel) < CLOSE[dtype]


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("panel", [32, 64])
def test_the_slot_is_unpacked_bit_for_bit(weights, panel):
    assert slot_difference("cpu", weights, 100, 256, panel) == 0


def test_a_slot_unpacked_from_other_groups_would_be_seen(monkeypatch):
    fill = kernel_parity.fill_slot
    monkeypatch.setattr(
        kernel_parity, "fill_slot", lambda weight, slot: fill(mutated(weight, "groups"), slot)
    )
    assert slot_difference("cpu", "int4", 100, 256) > 1000


def mutated(weight, what):
    """The weight as a kernel would see it that reads one thing wrongly."""
    match what:
        case "halves":
            return replace(weight, nibbles=weight.nibbles << 4 | weight.nibbles >> 4)
        case "zeros":
            scales = weight.scales.clone()
            scales[..., 1] = 0
            return replace(weight, scales=scales)
        case "low":
            return replace(weight, low=weight.nibbles)
        case "groups":
            return replace(weight, scales=weight.scales.roll(1, 0))


@pytest.mark.parametrize("what", ["halves", "zeros", "low", "groups"])
def test_a_kernel_that_reads_one_thing_wrongly_would_be_seen(what):
    x, weight = quant_case("cpu", torch.float16, "int8", 2, 130, 256)
    want = x.float() @ dequantise(weight).t()
    error = (fused(x, mutated(weight, what), splits=2).float() - want).norm() / want.norm()
    assert error > 5 * CLOSE[torch.float16]


def test_a_rows_bits_do_not_depend_on_its_mates():
    x, weight = quant_case("cpu", torch.bfloat16, "int4", MOST_ROWS, 70, 256)
    whole = fused(x, weight)
    for rows in (1, 5):
        assert torch.equal(fused(x[:rows].contiguous(), weight), whole[:rows])


def test_splits_fill_the_device_and_are_never_tiny(monkeypatch):
    num_splits.cache_clear()
    monkeypatch.setattr(fused_quant, "num_cores", lambda device: 132)
    device = torch.device("meta")
    assert num_splits(64, 64, device) == 16
    assert num_splits(64, 8, device) == 2
    assert num_splits(500, 64, device) == 4
    assert num_splits(3000, 64, device) == 1
    num_splits.cache_clear()


@pytest.fixture
def as_device(monkeypatch):
    """The CPU as a device: it has no kernel of torch's, and Triton's are taken up to four rows."""
    taken = []

    def noted(name, run):
        def noting(*args, **options):
            taken.append(name)
            return run(*args, **options)

        return noting

    monkeypatch.setattr(quant, "has_kernel", lambda panel, device: False)
    monkeypatch.setattr(quant, "fused_rows", lambda *case: 4)
    monkeypatch.setattr(served, "serves", lambda device_type: True)
    monkeypatch.setattr(fused_quant, "fused", noted("fused", fused_quant.fused))
    monkeypatch.setattr(fused_quant, "fill_slot", noted("slot", fused_quant.fill_slot))
    return taken


@pytest.mark.parametrize(
    ("rows", "exact", "kernel"),
    [(1, False, "fused"), (4, False, "fused"), (5, False, "slot"), (4, True, "slot")],
)
def test_few_rows_are_fused_and_more_go_through_the_slot(rows, exact, kernel, as_device):
    x, weight = quant_case("cpu", torch.bfloat16, "int4", rows, 130, 128)
    bias = torch.randn(130).bfloat16()
    found = quant.quant_linear(x, weight, bias, exact=exact)
    want = x.float() @ dequantise(weight).t() + bias.float()
    assert (found.float() - want).norm() / want.norm() < 1e-2
    assert set(as_device) == {kernel}


def test_the_crossing_is_found_once_per_shape(monkeypatch):
    """The first row count at which the fused product is not the faster one ends the search."""
    asked = []

    def fastest(paths, clock):
        rows = paths["fused"].args[0].shape[0]
        asked.append(rows)
        return "fused" if rows < 4 else "unpacked"

    monkeypatch.setattr(served, "serves", lambda device_type: True)
    monkeypatch.setattr(quant, "fastest", fastest)
    quant.fused_rows.cache_clear()
    case = ("int8", 64, 77, 128, "cpu")
    assert [quant.fused_rows(*case), quant.fused_rows(*case)] == [2, 2]
    assert asked == [1, 2, 4]
    quant.fused_rows.cache_clear()
    assert quant.fused_rows(*case) == 2  # remembered in the machine's file
    assert len(asked) == 3
    quant.fused_rows.cache_clear()


def test_nothing_is_fused_on_a_processor():
    assert quant.fused_rows("int4", 64, 128, 128, "cpu") == 0
    assert choice.device_clock("cpu")() <= choice.device_clock("cpu")()


def test_a_gpu_has_a_larger_slot_and_the_plan_counts_it():
    spec = as_stored(small_llama(), "int4", "panels-64")
    assert slot_outputs(4096, 64, GPU_SLOT_BYTES) == 16 * slot_outputs(4096, 64, SLOT_BYTES)
    workload = Workload(batch=1, prompt_len=4, gen_len=4)
    small, large = (reserve_for(spec, workload, exact=False, device=name) for name in ("cpu", "cuda:0"))
    more = workspace_bytes(spec, "cuda") - workspace_bytes(spec, "cpu")
    assert large.activations - small.activations == more
