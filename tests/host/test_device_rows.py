"""Fused row kernels in Triton's interpreter, whole models through all kernels at once, and which are taken when."""

import builtins
import logging
import sys
from collections import Counter

import pytest
import torch
from kernel_parity import ROWS_CLOSE, WRONG_ROWS, interprets, rows_error
from tiny_models import write_tiny

from zinfer import LLM, SamplingParams
from zinfer.chunks.store import shard
from zinfer.kernels import fused_quant, products, quant, rows, served
from zinfer.kernels.paged import paged_serves
from zinfer.kernels.quantise import Quantiser
from zinfer.kernels.row_kernels import row_kernels
from zinfer.layers import on_device
from zinfer.layers.norm import rms_norm

needs_interpreter = pytest.mark.skipif(
    not interprets(), reason="Triton's interpreter is off: tests/gpu has the same cases for the device"
)
RUN = {"device": "cpu", "machine": "sim-default", "threads": 1, "exact": False}
PROMPTS = [[5, 9, 2, 14, 3, 77, 8], [400, 401], [3, 1, 4, 1, 5]]


@needs_interpreter
@pytest.mark.parametrize("dtype", ROWS_CLOSE, ids=str)
@pytest.mark.parametrize("kernel", ["norm", "rotate", "gate", "one row"])
def test_row_kernels_agree_with_their_twins(kernel, dtype):
    assert rows_error("cpu", dtype, kernel) < ROWS_CLOSE[dtype]


@needs_interpreter
def test_a_row_kernel_that_rounds_nowhere_would_be_seen(monkeypatch):
    """In fp16 the twin rounds the norm before the weight: leaving that out differs in the last place."""
    monkeypatch.setattr(rows, "norm", lambda x, weight, eps: twin_in_fp32(x, weight, eps).to(x.dtype))
    assert rows_error("cpu", torch.float16, "norm") > 4e-4
    monkeypatch.undo()
    assert rows_error("cpu", torch.float16, "norm") < 1e-4


@needs_interpreter
@pytest.mark.parametrize(
    ("kernel", "name", "wrong"),
    [
        *WRONG_ROWS,
        ("one row", "one_row", lambda run: lambda x, weight, bias: run(x, weight, None)),
    ],
)
def test_a_row_kernel_that_reads_one_thing_wrongly_would_be_seen(kernel, name, wrong, monkeypatch):
    monkeypatch.setattr(rows, name, wrong(getattr(rows, name)))
    assert rows_error("cpu", torch.float32, kernel) > 1e-2


def twin_in_fp32(x, weight, eps):
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()


@pytest.fixture
def as_device(monkeypatch):
    """The CPU as a device with Triton, and the calls of each kernel."""
    calls = Counter()

    def noted(module, name):
        run = getattr(module, name)

        def noting(*args, **options):
            calls[name] += 1
            return run(*args, **options)

        monkeypatch.setattr(module, name, noting)

    for module, name in [
        (rows, "norm"),
        (rows, "rotate"),
        (rows, "gated"),
        (on_device, "paged_decode"),
        (fused_quant, "fused"),
        (fused_quant, "fill_slot"),
    ]:
        noted(module, name)
    monkeypatch.setattr(quant, "has_kernel", lambda panel, device: False)
    monkeypatch.setattr(quant, "fused_rows", lambda *case: 4)
    monkeypatch.setattr(served, "serves", lambda device_type: True)
    paged_serves.cache_clear()
    yield calls
    paged_serves.cache_clear()


def generated(folder, **options):
    """Greedy ids of three prompts and log probabilities of the likeliest tokens, by way of the whole engine."""
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True, logprobs=2)
    with LLM(folder, **RUN, **options) as llm:
        outputs = [each.outputs[0] for each in llm.generate(PROMPTS, params)]
    return [output.token_ids for output in outputs], [
        value for output in outputs for token in output.logprobs for value in token.values()
    ]


@needs_interpreter
@pytest.mark.parametrize("family", ["mistral", "qwen3", "phi3"])
def test_a_whole_model_through_all_kernels(family, tmp_path, request):
    folder = write_tiny(family, tmp_path, "float32", num_hidden_layers=2)
    ids, logprobs = generated(folder)
    calls = request.getfixturevalue("as_device")
    found_ids, found_logprobs = generated(folder)
    assert found_ids == ids
    assert found_logprobs == pytest.approx(logprobs, abs=1e-4)
    assert {"norm", "rotate", "gated", "paged_decode"} == set(calls)
    assert calls["paged_decode"] == 2 * 2  # two layers, two decode passes for all sequences together


@needs_interpreter
def test_a_quantised_model_through_all_kernels(tmp_path, request):
    folder = write_tiny("llama", tmp_path / "model", "float32", num_hidden_layers=1)
    shard(folder, tmp_path / "store", encoder=Quantiser("int4", "panels-64"))
    _, logprobs = generated(tmp_path / "store")
    calls = request.getfixturevalue("as_device")
    _, found = generated(tmp_path / "store")
    # bf16 products, rounded in other places; the likeliest token of a random model may change.
    assert abs(found[0] - logprobs[0]) < 0.1
    assert calls["fused"] > 0
    assert calls["fill_slot"] > 0


def test_without_triton_a_device_says_so_once(monkeypatch, caplog):
    real = builtins.__import__

    def refuses(name, *args):
        if name.startswith("triton"):
            raise ImportError("No module named 'triton'")
        return real(name, *args)

    for name in [name for name in sys.modules if name.startswith(("triton", "zinfer.kernels.jit"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuses)
    served._has_triton.cache_clear()
    with caplog.at_level(logging.WARNING, "zinfer"):
        assert [served.serves("cuda"), served.serves("cuda"), served.serves("cpu")] == [False] * 3
    served._has_triton.cache_clear()
    assert len(caplog.records) == 1
    assert "No module named 'triton'): slower torch code replaces its kernels" in caplog.text


def test_a_triton_that_computes_wrongly_is_not_used(monkeypatch, caplog):
    """The first kernel is tried on the device, here made up: its answer is what was there before."""

    class Idle:
        def __getitem__(self, grid):
            return lambda *args, **options: None

    full, idle = torch.full, sys.modules[__name__]
    monkeypatch.setattr(torch, "full", lambda shape, value, device: full(shape, value))
    idle.gate_rows = Idle()
    monkeypatch.setitem(sys.modules, "zinfer.kernels.jit.rows", idle)
    served._has_triton.cache_clear()
    assert not served.serves("cuda")
    served._has_triton.cache_clear()
    assert "wrong numbers" in caplog.text


def test_triton_is_not_asked_for_without_a_device(monkeypatch):
    monkeypatch.setattr(served, "_has_triton", lambda: pytest.fail("asked for"))
    assert not served.serves("cpu")
    assert row_kernels(torch.ones(2)) is None


def test_gradients_keep_torchs_own_code(monkeypatch):
    monkeypatch.setattr(served, "serves", lambda device_type: True)
    x = torch.ones(2, 8, requires_grad=True)
    assert row_kernels(torch.ones(2), x) is None
    rms_norm(x, torch.ones(8), 1e-5).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert row_kernels(x) is rows


def test_the_one_row_kernel_is_a_candidate_on_a_device_only(monkeypatch):
    assert "triton" not in products._candidates(torch.bfloat16, "cpu", 64, False)
    monkeypatch.setattr(served, "serves", lambda device_type: False)
    assert products._candidates(torch.bfloat16, "cuda", 64, False) == ["linear"]
    monkeypatch.setattr(served, "serves", lambda device_type: True)
    assert products._candidates(torch.bfloat16, "cuda", 64, False) == ["linear", "triton"]
    assert products._candidates(torch.bfloat16, "cuda", 64, True) == ["linear"]


@needs_interpreter
def test_the_one_row_kernel_is_taken_where_it_was_the_fastest(monkeypatch):
    """Named once at load, then by the table; a transposed weight has torch's own product."""
    monkeypatch.setattr(products, "_candidates", lambda *case: ["linear", "triton"])
    monkeypatch.setattr(products, "device_name", lambda device: "a device of this test")
    monkeypatch.setattr(products, "fastest", lambda runs, clock: list(runs)[-1])
    case = (torch.float16, "cpu", 33, 70, False, True)
    products.row_kernel.cache_clear()
    assert products.row_kernel(*case) == "triton"
    x, weight, bias = torch.randn(1, 70).half(), torch.randn(33, 70).half(), torch.randn(33).half()
    found = products.linear(x, weight, bias, exact=False)
    torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, bias), atol=2e-2, rtol=2e-3)
    products.row_kernel.cache_clear()
