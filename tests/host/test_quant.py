"""Quantised weights: what rounding costs, both paths against the slow twin, bits that depend on the row alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_of import spec_of

from zinfer.chunks.encode import Misfit
from zinfer.kernels import quant
from zinfer.kernels.panels import QuantWeight, dequantise, pack_nibbles, unpack_nibbles
from zinfer.kernels.quant import has_kernel, made_up, native_layout, packed, quant_linear, unpacked
from zinfer.kernels.quantise import Quantiser, misfit_of, quantise
from zinfer.spec.quant import FORMATS, PANELS, WEIGHT_BYTES

LIMITS = {"int8": 0.006, "int4": 0.11}
CLOSE = 0.006  # of the result's norm: a few roundings to bf16
ROWS = [1, 2, 3, 5, 8, 17, 33, 64, 130]
SHAPES = [(200, 128), (64, 320), (1300, 2048)]  # (outputs, inputs): a rest, one panel, more than one slot

needs_kernel = pytest.mark.skipif(not has_kernel(64, "cpu"), reason="this processor reads no panels of 64")


def gaussian(outputs, inputs, seed=0):
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * 0.02


def assert_close(got, x, weight, bias=None, close=CLOSE):
    want = x.double() @ dequantise(weight).double().t() + (0 if bias is None else bias.double())
    assert got.shape == want.shape
    assert float((got.double() - want).norm() / want.norm()) < close


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("panel", PANELS.values())
def test_rounding_costs_no_more_than_promised(weights, panel):
    matrix = gaussian(512, 1024).bfloat16().float()
    stored = quantise(matrix, weights, panel)
    misfit = misfit_of(stored, matrix)
    assert float((dequantise(stored) - matrix).norm() / matrix.norm()) == pytest.approx(misfit.rms, rel=1e-4)
    assert 0.5 * LIMITS[weights] < misfit.rms <= LIMITS[weights]
    assert misfit.rms < misfit.worst < 3 * misfit.rms
    assert stored.nbytes == matrix.numel() * WEIGHT_BYTES[weights]


@given(st.sampled_from(list(PANELS.values())), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=30)
def test_nibbles_come_back(panel, panels, groups, seed):
    draw = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 16, (panels * panel, 64 * groups), generator=draw, dtype=torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(values, panel)), values)


@pytest.mark.parametrize("weights", FORMATS)
def test_odd_groups_are_not_lost(weights):
    """Constants, zeros and a lone giant: the scale of a group is never 0, nothing becomes not a number."""
    matrix = torch.zeros(64, 192)
    matrix[1] = 3.0
    matrix[2, 5] = -700.0
    matrix[3] = 1e-30
    got = dequantise(quantise(matrix, weights, 64))
    assert torch.isfinite(got).all()
    assert torch.equal(got[0], torch.zeros(192))
    torch.testing.assert_close(got[1], matrix[1], rtol=0.01, atol=0)
    torch.testing.assert_close(got[2, 5], matrix[2, 5], rtol=0.02, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("exact", [True, False])
def test_the_unpacked_path_agrees_with_the_slow_twin(weights, shape, exact):
    for panel in PANELS.values():
        stored = quantise(gaussian(*shape), weights, panel)
        x = torch.randn(5, shape[1]).bfloat16()
        assert_close(unpacked(x, stored, exact=exact), x, stored)


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", FORMATS)
def test_the_packed_path_agrees_with_the_slow_twin(weights, shape):
    stored = quantise(gaussian(*shape), weights, 64)
    x = torch.randn(5, shape[1]).bfloat16()
    assert_close(packed(x, stored), x, stored)


@pytest.mark.parametrize("path", ["packed", "unpacked"])
@pytest.mark.parametrize("harm", ["nibbles", "low", "scale", "zero"])
def test_a_harmed_part_is_seen_by_both_paths(path, harm):
    """The mutation: every part matters to every path."""
    if path == "packed" and not has_kernel(64, "cpu"):
        pytest.skip("this processor reads no panels of 64")
    stored = quantise(gaussian(128, 128), "int8", 64)
    x = torch.randn(4, 128).bfloat16()
    harmed = QuantWeight(stored.nibbles.clone(), stored.scales.clone(), stored.low.clone(), 128)
    {
        "nibbles": lambda: harmed.nibbles.bitwise_xor_(0x11),
        "low": lambda: harmed.low.bitwise_xor_(0xCC),
        "scale": lambda: harmed.scales[..., 0].mul_(1.1),
        "zero": lambda: harmed.scales[..., 1].add_(0.001),
    }[harm]()
    got = packed(x, harmed) if path == "packed" else unpacked(x, harmed, exact=False)
    with pytest.raises(AssertionError):
        assert_close(got, x, stored)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("exact", [True, False])
def test_results_have_the_models_dtype_and_bias(weights, dtype, exact):
    stored = quantise(gaussian(96, 128), weights, 64)
    x, bias = torch.randn(3, 128).to(dtype), torch.randn(96).to(dtype)
    got = quant_linear(x, stored, bias, exact=exact)
    assert got.dtype == dtype
    assert_close(got, x, stored, bias)


@pytest.mark.parametrize("shape", [(200, 128), (2100, 1024)])
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("kernel", ["compiled", "torch", None])
def test_exact_bits_depend_on_the_row_alone(monkeypatch, weights, shape, kernel):
    """With this processor's kernels and, as on one without, through the slot."""
    if kernel is None:
        monkeypatch.setattr(quant, "has_kernel", lambda panel, device: False)
    elif kernel == "torch":
        monkeypatch.setattr(quant, "_native", lambda panel: None)
    stored = made_up(weights, 64, *shape)
    x = torch.randn(130, shape[1])
    x = torch.cat((16 * x, -16 * x[:, torch.randperm(shape[1])]), 1)[:, : shape[1]].bfloat16()
    whole = quant_linear(x, stored, exact=True)
    for rows in ROWS:
        start = (rows * 7) % (131 - rows)
        part = quant_linear(x[start : start + rows], stored, exact=True)
        assert torch.equal(part, whole[start : start + rows]), rows


def test_without_exact_the_path_follows_the_rows(monkeypatch):
    taken = []
    monkeypatch.setattr(quant, "has_kernel", lambda panel, device: True)
    monkeypatch.setattr(quant, "packed_rows", lambda *case: 8)
    for name in ("packed", "unpacked"):
        monkeypatch.setattr(quant, name, lambda x, w, name=name, **_: taken.append(name) or x[:, :64])
    stored = made_up("int4", 64, 64, 128)
    for rows in (1, 8, 9):
        quant_linear(torch.ones(rows, 128), stored, exact=False)
    assert taken == ["packed", "packed", "unpacked"]


def test_the_crossing_is_measured_once(monkeypatch):
    calls = []
    monkeypatch.setattr(quant, "remembered", lambda _question, _is_answer, find: find())
    monkeypatch.setattr(
        quant, "fastest", lambda paths: calls.append(1) or ("packed" if len(calls) < 4 else "unpacked")
    )
    quant.packed_rows.cache_clear()
    for _ in range(2):
        assert quant.packed_rows("int4", 64, 64, 128, 1) == 4
    assert len(calls) == 4
    quant.packed_rows.cache_clear()


def test_a_kernel_that_computes_something_else_is_not_trusted(monkeypatch):
    monkeypatch.setattr(quant, "packed", lambda x, weight: torch.zeros(len(x), weight.outputs))
    assert not quant.has_kernel.__wrapped__(64, "cpu")
    monkeypatch.setattr(quant, "packed", lambda x, weight: torch.ops.aten.no_such_kernel(x))
    assert not quant.has_kernel.__wrapped__(64, "cpu")
    assert native_layout() in PANELS


@pytest.mark.parametrize("weights", FORMATS)
def test_the_encoder_keeps_numbers_when_it_lays_them_out_anew(weights):
    matrix = gaussian(100, 128).bfloat16()
    raw = bytearray(matrix.view(torch.uint8).numpy().tobytes())
    wide, narrow = Quantiser(weights, "panels-64"), Quantiser(weights, "panels-32")
    first = wide.encode(raw, "BF16", (100, 128))
    again = wide.encode(
        bytearray(matrix.t().contiguous().view(torch.uint8).numpy().tobytes()),
        "BF16",
        (128, 100),
        is_transposed=True,
    )
    assert again == first
    shapes = {"nibbles": (2, 128, 32), "low": (2, 128, 32), "scales": (2, 128, 2)}
    parts = {role: bytearray(part) for role, part in first.parts.items()}
    assert wide.compare(parts, shapes, raw, "BF16", (100, 128)) == first.misfit
    there = narrow.repack(parts, shapes, 100)
    assert there == narrow.encode(raw, "BF16", (100, 128)).parts
    narrow_shapes = {"nibbles": (4, 128, 16), "low": (4, 128, 16), "scales": (2, 128, 2)}
    back = wide.repack({role: bytearray(part) for role, part in there.items()}, narrow_shapes, 100)
    assert back == first.parts


def test_a_misfit_adds_up():
    whole = Misfit(1.0, 100.0, 0.2) + Misfit(3.0, 300.0, 0.1)
    assert (whole.rms, whole.worst) == (0.1, 0.2)
    assert Misfit(0.0, 0.0, 0.0).rms == 0


def test_a_model_without_quantised_weights_asks_for_no_kernel(monkeypatch):
    """Its self-test is worth some milliseconds of a first token, and nobody needs the answer."""
    monkeypatch.setattr(quant, "has_kernel", lambda *_: pytest.fail("a kernel is tried that nobody needs"))
    quant.prepare(spec_of("llama-3.2-1b", num_hidden_layers=2), "cpu", exact=False)
