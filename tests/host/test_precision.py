"""A GPU without bfloat16, with a made-up compute capability: float16 instead, said once, or one typed error."""

import logging
from dataclasses import replace

import pytest
import torch
from plan_of import small_llama
from tiny_models import write_tiny

from zinfer import LLM, SamplingParams
from zinfer.errors import MachineError
from zinfer.kernels import precision
from zinfer.kernels.precision import computable
from zinfer.plan.profile import reserve_for
from zinfer.plan.records import Workload
from zinfer.runtime import model as model_module
from zinfer.spec.cost import converted_bytes
from zinfer.spec.stored import as_stored

RUN = {"device": "cpu", "machine": "sim-default", "threads": 1}
PROMPT = [5, 9, 2, 14, 3, 77, 8]


@pytest.fixture
def turing(monkeypatch):
    monkeypatch.setattr(precision, "capability", lambda device: (7, 5))


def test_an_old_gpu_computes_in_float16_and_says_so(turing, caplog):
    spec = replace(small_llama(), dtype="BF16")
    with caplog.at_level(logging.WARNING, "zinfer"):
        found = computable(spec, "cuda:1")
    assert (found.dtype, found.stored_dtype) == ("F16", "BF16")
    (record,) = caplog.records
    assert "cuda:1 (compute capability 7.5) has no bfloat16" in record.getMessage()


@pytest.mark.parametrize(
    ("dtype", "device"), [("F16", "cuda:0"), ("F32", "cuda:0"), ("BF16", "cpu"), ("BF16", "sim")]
)
def test_what_needs_no_bfloat16_stays_as_it_is(dtype, device, turing):
    spec = replace(small_llama(), dtype=dtype)
    assert computable(spec, device) is spec


def test_a_newer_gpu_keeps_bfloat16(monkeypatch):
    monkeypatch.setattr(precision, "capability", lambda device: (8, 0))
    spec = replace(small_llama(), dtype="BF16")
    assert computable(spec, "cuda:0") is spec


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantised_weights_are_refused_there(weights, turing):
    spec = as_stored(replace(small_llama(), dtype="BF16"), weights, "panels-64")
    with pytest.raises(MachineError) as caught:
        computable(spec, "cuda:0")
    assert caught.value.code == "ZI-5361"
    assert weights in caught.value.message
    assert "--device cpu" in caught.value.remedy


def test_the_plan_counts_the_weights_that_an_op_converts(turing):
    spec = replace(small_llama(), dtype="BF16")
    other = computable(spec, "cuda:0")
    workload = Workload(batch=1, prompt_len=4, gen_len=4)
    more = converted_bytes(other)
    assert converted_bytes(spec) == 0
    matrix = max(2 * part.numel for op in spec.program for part in op.reads if part.role == "matrix")
    assert matrix <= more <= matrix + 2 * 2 * spec.model_dim  # with the norm that the same op reads
    found, want = (reserve_for(each, workload, exact=False) for each in (other, spec))
    assert found.activations - want.activations == more


def test_a_published_bfloat16_model_runs_in_float16(tmp_path, turing, monkeypatch):
    """The whole engine, on the CPU in the place of the device: float16 is nearer to fp32 than bfloat16 is."""
    folder = write_tiny("qwen3", tmp_path)
    logits = {}
    for name in ("bf16", "f16"):
        if name == "f16":
            monkeypatch.setattr(model_module, "computable", lambda spec, device: computable(spec, "cuda:0"))
        with LLM(folder, **RUN) as llm:
            logits[name] = llm.logits(PROMPT)
            assert llm.model.spec.dtype == ("F16" if name == "f16" else "BF16")
            params = SamplingParams(max_tokens=2, temperature=0)
            assert len(llm.generate([PROMPT], params)[0].outputs[0].token_ids) == 2
    difference = (logits["f16"] - logits["bf16"]).abs().max()
    assert 0 < difference < 0.05 * logits["bf16"].abs().max()
    assert torch.isfinite(logits["f16"]).all()


def test_activations_that_overflow_float16_are_refused(tmp_path, turing, monkeypatch):
    folder = write_tiny("llama", tmp_path)
    monkeypatch.setattr(model_module, "computable", lambda spec, device: computable(spec, "cuda:0"))
    rows = "zinfer.models.decoder.rms_norm"
    monkeypatch.setattr(rows, lambda x, weight, eps: x * 1e30)
    with LLM(folder, **RUN) as llm, pytest.raises(MachineError) as caught:
        llm.generate([PROMPT], SamplingParams(max_tokens=1))
    assert caught.value.code == "ZI-5501"
