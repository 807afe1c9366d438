"""Every kernel against its twin on a real device: the cases that the CPU suite runs in Triton's interpreter."""

import pytest
import torch
from kernel_parity import (
    CLOSE,
    ROWS_CLOSE,
    fused_error,
    paged_error,
    pages_case,
    quant_case,
    rows_error,
    slot_difference,
)
from sampling_rows import mixed_rows
from tiny_models import write_tiny

from zinfer import LLM, SamplingParams
from zinfer.kernels import choice, lossless, products, quant, served
from zinfer.kernels.exponents import packed_without_loss
from zinfer.kernels.paged import paged_decode, paged_decode_twin
from zinfer.kernels.panels import dequantise
from zinfer.layers.varlen import varlen_serves
from zinfer.sampling.sample import sample

pytestmark = pytest.mark.gpu

DEVICE = "cuda:0"
SHAPES = [
    {},
    {"splits": 3},
    {"splits": 2, "window": 40},
    {"cap": 2.0},
    {"is_int8": True, "splits": 2},
    {"heads": 32, "kv_heads": 8, "dim": 128},
    {"heads": 6, "kv_heads": 3, "dim": 12},
    {"heads": 4, "kv_heads": 1, "dim": 80, "splits": 5},
    {"heads": 8, "kv_heads": 8, "dim": 256, "page_tokens": 32},
]


def test_triton_works_here():
    """Where it does not, everything below would compare twins with twins."""
    assert served.serves("cuda")


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_paged_decode(shape, dtype):
    assert paged_error(DEVICE, dtype, [1, 70, 2000], **shape) < CLOSE[dtype]


def test_a_wrong_page_would_be_seen():
    q, planes, pages = pages_case(DEVICE, torch.bfloat16, [70, 200])
    want = paged_decode_twin(q, planes, pages, scale=0.25)
    pages.table[0, 0] += 1
    assert (paged_decode(q, planes, pages, scale=0.25) - want).abs().max() > 2 * CLOSE[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(32, 8, 128), (12, 12, 64)])
def test_torchs_packed_attention_serves(heads, dtype):
    """torch 2.10 and later have it for half precision; an older one is said so and not failed."""
    pytest.importorskip("torch.nn.attention.varlen")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    assert varlen_serves(dtype, *heads, "cuda", False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize(("rows", "splits", "panel"), [(1, None, 64), (3, 2, 32), (16, 7, 64)])
def test_fused_quantised_products(rows, splits, panel, weights, dtype):
    close = {torch.bfloat16: 6e-3, torch.float16: 8e-4}[dtype]
    assert fused_error(DEVICE, dtype, weights, rows, 1100, 1344, splits=splits, panel=panel) < close


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("panel", [32, 64])
def test_the_slot_is_unpacked_bit_for_bit(weights, panel):
    assert slot_difference(DEVICE, weights, 1100, 1344, panel) == 0


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 40, 1100])
def test_quantised_products_of_any_number_of_rows(rows, exact):
    x, weight = quant_case(DEVICE, torch.bfloat16, "int4", rows, 700, 512)
    want = x.float() @ dequantise(weight).t()
    found = quant.quant_linear(x, weight, exact=exact)
    assert (found.float() - want).norm() / want.norm() < 1e-2
    assert quant.fused_rows("int4", 64, 700, 512, "cuda") in (0, 1, 2, 4, 8, 16)


@pytest.mark.parametrize("dtype", ROWS_CLOSE, ids=str)
@pytest.mark.parametrize("kernel", ["norm", "rotate", "gate", "one row"])
def test_row_kernels(kernel, dtype):
    assert rows_error(DEVICE, dtype, kernel) < ROWS_CLOSE[dtype]


def test_the_one_row_product_is_chosen_by_measurement():
    name = products.row_kernel(torch.bfloat16, "cuda", 4096, 4096, False, False)
    assert name in ("linear", "triton")


def test_the_devices_clock_waits_for_the_device():
    clock = choice.device_clock("cuda")
    begin_s = clock()
    torch.cuda._sleep(20_000_000)  # some 10 ms of the device's time
    assert clock() - begin_s > 0.002


def test_draws_on_the_device_are_the_hosts():
    logits, rows = mixed_rows(count=64, vocab=4000)
    assert [each.token_id for each in sample(logits.to(DEVICE), rows)] == [
        each.token_id for each in sample(logits, rows)
    ]


def test_one_copy_brings_a_batchs_draws(monkeypatch):
    logits, rows = mixed_rows(count=64, vocab=4000)
    logits = logits.to(DEVICE)
    sample(logits, rows)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        sample(logits, rows)
    copies = [event for event in profile.events() if "Memcpy DtoH" in event.name]
    assert len(copies) == 1


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "phi3", "gpt_neox"])
def test_a_whole_model_gives_the_cpus_logits(family, exact, tmp_path):
    folder = write_tiny(family, tmp_path)
    prompts = [[5, 9, 2, 14, 3, 77, 8], [400, 401], [3, 1, 4, 1, 5]]
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=1)
    found = {}
    for device in ("cpu", DEVICE):
        with LLM(folder, device=device, exact=exact) as llm:
            found[device] = [each.outputs[0] for each in llm.generate(prompts, params)]
    for mine, want in zip(found[DEVICE], found["cpu"], strict=True):
        first = [next(iter(token.values())) for token in mine.logprobs[:1]]
        assert first == pytest.approx([next(iter(token.values())) for token in want.logprobs[:1]], abs=0.1)


def test_lossless_weights_are_unpacked_bit_for_bit():
    weight = (0.02 * torch.randn(700, 1024)).to(torch.bfloat16)
    weight[3, :4] = torch.tensor([torch.nan, torch.inf, 1e-40, -0.0])
    packed = packed_without_loss(weight)
    there = packed.to(torch.device(DEVICE))
    assert torch.equal(lossless.unpacked(there).cpu().view(torch.int16), weight.view(torch.int16))
    x = torch.randn(5, 1024, dtype=torch.bfloat16, device=DEVICE)
    got, want = (lossless.lossless_linear(x, there, exact=False), x @ weight.to(DEVICE).t())
    got, want = (torch.cat([each[:, :3], each[:, 4:]], 1) for each in (got, want))  # row 3 holds a nan
    assert float((got.float() - want.float()).norm() / want.float().norm()) < 0.01
