"""Products with weights that are published as [inputs, outputs]: by the compiled kernel, and by torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import write_tiny

from zinfer import LLM, SamplingParams
from zinfer.chunks.table import LOOSE_ALIGN
from zinfer.kernels import columns, products
from zinfer.kernels.columns import FEW, column_linear, few_columns
from zinfer.kernels.native import calls
from zinfer.spec.read import read_spec

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(
    calls.kernels() is None or not calls.kernels().has_products, reason="no AVX-512 bfloat16 here"
)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def relative(found, want):
    return float((found.float() - want).norm() / want.norm())


@pytest.fixture
def asked(monkeypatch):
    """Row counts that the compiled kernel was given."""
    seen, run = [], calls.kernels().columns
    monkeypatch.setattr(calls.kernels(), "columns", lambda x, *rest: seen.append(len(x)) or run(x, *rest))
    return seen


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (31, 7), (32, 33), (70, 37), (17, 1100), (600, 64)])
@pytest.mark.parametrize("rows", [1, 2, 5, 31, 33, 70, 300])
def test_a_product_agrees_with_torch(rows, inputs, outputs, with_bias, unit):
    x, weight, bias = noise(rows, inputs), noise(inputs, outputs, seed=1), noise(outputs, seed=2)
    want = x.float() @ weight.float() + (bias.float() if with_bias else 0)
    found = calls.kernels().columns(x, weight, bias if with_bias else None)
    assert found.shape == want.shape
    assert relative(found, want) < 4e-3
    wrong = calls.kernels().columns(x, weight, None if with_bias else bias)  # the mutation
    assert relative(wrong, want) > 4e-3


@given(
    rows=st.integers(1, 70),
    inputs=st.integers(2, 120),
    outputs=st.integers(1, 300),
    threads=st.integers(1, 5),
    may_use_amx=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_rows_bits_depend_on_the_row_alone(rows, inputs, outputs, threads, may_use_amx):
    """Whatever the other rows, and however outputs are shared among threads: weights that cancel show any order."""
    x, weight_OI = products.cancelling(outputs, inputs, BF16, "cpu")
    x, weight = x.repeat(14, 1)[:rows], weight_OI.t().contiguous()
    found, before = calls.kernels(), torch.get_num_threads()
    found.allow_amx(may_use_amx)
    torch.set_num_threads(1)
    try:
        alone = torch.cat([found.columns(x[row : row + 1], weight) for row in range(min(rows, 5))])
        torch.set_num_threads(threads)
        together = found.columns(x, weight)
    finally:
        torch.set_num_threads(before)
        found.allow_amx(True)
    assert torch.equal(together, alone.repeat(14, 1)[:rows])


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1.0, 1e30])
def test_a_few_rows_have_the_bits_of_many(scale, unit):
    """A row by itself goes through other instructions than one of many on the matrix unit, tiny numbers too."""
    x, weight = noise(40, 200) * scale**0.5, noise(200, 150, seed=1) * scale**0.5
    together = calls.kernels().columns(x, weight)
    assert scale == 1e-38 or together.abs().max() > 0
    for rows in (1, 2, 3, 4, 17):
        assert torch.equal(calls.kernels().columns(x[:rows], weight), together[:rows]), rows


def test_another_order_of_adding_would_be_seen(unit):
    x, weight_OI = products.cancelling(130, 1030, BF16, "cpu")
    weight, order = weight_OI.t().contiguous(), torch.arange(1030).roll(256)
    found = calls.kernels().columns(x, weight)
    assert not torch.equal(found, calls.kernels().columns(x[:, order], weight[order]))


def test_exact_rows_are_all_its_own_and_others_while_it_is_faster(asked, monkeypatch):
    monkeypatch.setattr(columns, "few_columns", lambda inputs, outputs: 4)
    weight, bias = noise(64, 40), noise(40, seed=2)
    for rows in (1, 2, 4, 5):
        for exact in (False, True):
            x = noise(rows, 64, seed=rows)
            want = x.float() @ weight.float() + bias.float()
            assert relative(column_linear(x, weight, bias, exact=exact), want) < 4e-3
    assert asked == [1, 1, 2, 2, 4, 4, 5]


def test_what_it_does_not_serve_goes_to_torch(asked):
    weight = noise(64, 40)
    x = noise(3, 64).float()
    assert torch.equal(column_linear(x, weight.float(), exact=False), x @ weight.float())
    apart = noise(64, 80)[:, ::2]
    assert (
        relative(column_linear(noise(3, 64), apart, exact=True), noise(3, 64).float() @ apart.float()) < 4e-3
    )
    learned = noise(3, 64).requires_grad_()
    column_linear(learned, weight, exact=True).sum().backward()
    assert learned.grad is not None
    assert not asked


def test_how_many_are_few_is_timed_once(monkeypatch):
    timed = []
    monkeypatch.setattr(columns, "remembered", lambda _question, _is_answer, find: find())

    def fastest(runs):
        timed.append([run().shape for run in runs.values()])
        return answers.pop(0)

    monkeypatch.setattr(columns, "fastest", fastest)
    spec = read_spec(CONFIG, None)
    for answers, want in ((["native", "torch"], FEW[0]), (["native"] * len(FEW), FEW[-1]), (["torch"], 1)):
        columns.few_columns.cache_clear()
        columns.prepare(spec, "cpu", exact=True)
        columns.prepare(spec, "cuda", exact=False)
        assert not timed
        few_columns(64, 40)
        assert few_columns(64, 40) == want
        assert not answers
        timed.clear()
    columns.few_columns.cache_clear()
    answers = ["torch"] * 4  # as many shapes as a layer has
    columns.prepare(spec, "cpu", exact=False)
    assert not answers
    columns.few_columns.cache_clear()


CONFIG = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 100,
    "torch_dtype": "bfloat16",
}


def test_a_plan_is_told_that_nothing_is_padded(tmp_path):
    """And that a weight may lie at any address: no library multiplies with it."""
    folder = write_tiny("gpt2", tmp_path)
    with LLM(folder, device="cpu", machine="sim-default", threads=1, exact=True) as llm:
        sizes = dict(llm.model.spec.product_sizes)
        assert llm.plan.align == LOOSE_ALIGN
    assert sizes["qkv"] == sizes["down"] == ()


def test_weights_at_any_address_give_the_same_bits(unit):
    x, buffer = noise(5, 70), torch.zeros(70 * 48 + 40, dtype=BF16)
    weight, found = noise(70, 48, seed=1), calls.kernels()
    want, normed = found.columns(x, weight), found.layer_norm(x, x[0], x[1], 1e-5)
    for start in range(0, 36, 5):
        moved = buffer[start : start + weight.numel()].view(weight.shape).copy_(weight)
        assert torch.equal(found.columns(x, moved), want)
        scale = buffer[start : start + 70].copy_(x[0])
        assert torch.equal(found.layer_norm(x, scale, x[1], 1e-5), normed)


def test_a_whole_model_in_exact_mode_is_as_close_to_torch_as_a_rounding(tmp_path, asked, request):
    folder, params = write_tiny("gpt2", tmp_path), SamplingParams(max_tokens=1, logprobs=3)

    def logits():
        with LLM(folder, device="cpu", machine="sim-default", threads=1, exact=True) as llm:
            assert llm.generate([[1, 2, 3]], params)
            return llm.logits([5, 9, 2, 14, 3])

    found = logits()
    assert asked
    request.getfixturevalue("torch_kernels")
    asked.clear()
    assert relative(found, logits()) < 2e-2
    assert not asked
