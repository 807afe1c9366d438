"""Activations and gates by compiled code: a table of all numbers, which has torch's bits wherever an element lies."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_parity import twin
from tiny_models import write_tiny

from zinfer import LLM, SamplingParams
from zinfer.kernels.native import calls
from zinfer.layers import mlp
from zinfer.layers.mlp import ACTIVATIONS, activate, close_gate, open_gate, table

BF16 = torch.bfloat16
KINDS = sorted(ACTIVATIONS)
pytestmark = pytest.mark.skipif(calls.kernels() is None, reason="no C compiler here")


def numbers():
    """All of them, each once: infinities and what is no number too."""
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(BF16)


def noise(*shape, seed=0):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def same(found, want):
    """Bit for bit, but for which zero and which of the numbers that are none."""
    return torch.equal(found.nan_to_num(7.5, 8.5, 9.5), want.nan_to_num(7.5, 8.5, 9.5))


def compiled(x, kind):
    return calls.kernels().activated(x, table(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_becomes_what_torch_makes_of_it(kind):
    x = numbers()
    want = twin(activate, x, kind, exact=True)
    assert same(compiled(x, kind), want)
    assert same(compiled(x.flip(0), kind), want.flip(0))
    assert same(activate(x, kind, exact=True), want)
    assert same(activate(x, kind, exact=False), want)
    other = "relu" if kind != "relu" else "silu"  # the mutation: another table
    assert not same(compiled(x, other), want)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_number_stays_so(kind):
    assert compiled(torch.tensor([float("nan")]).to(BF16), kind).isnan().all()


@pytest.mark.parametrize("kind", ["relu", "gelu"])
@given(start=st.integers(0, 99), width=st.integers(1, 700), threads=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_an_element_does_not_depend_on_where_it_lies(kind, start, width, threads):
    """Odd lengths at odd addresses, in pieces of several threads."""
    before = torch.get_num_threads()
    x, up = noise(80, 1024), noise(80, 1024, seed=1)
    part = slice(start, start + width)
    whole, gated = compiled(x, kind), calls.kernels().gated(x, up, table(kind))
    torch.set_num_threads(threads)
    try:
        assert torch.equal(compiled(x[:, part], kind), whole[:, part])
        assert torch.equal(calls.kernels().gated(x[:, part], up[:, part], table(kind)), gated[:, part])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_is_its_activation_times_the_rows(kind):
    both = noise(5, 1400)
    gate, up = both.chunk(2, -1)
    want = twin(activate, gate.contiguous(), kind, exact=True) * up
    for exact in (False, True):
        opened = open_gate(gate, kind, exact=exact)
        assert opened is gate, "nothing is worked out before the rows are there"
        assert torch.equal(close_gate(opened, up, kind), want)
    assert not torch.equal(close_gate(up, gate, kind), want)  # the mutation: the two change places


def test_who_is_served():
    x = torch.ones(3, requires_grad=True)
    assert activate(x, "gelu", exact=False).requires_grad
    rows = torch.ones(3, dtype=BF16, requires_grad=True)
    assert activate(rows, "gelu", exact=False).grad_fn is not None
    with torch.no_grad():
        assert torch.equal(activate(x, "gelu", exact=True), torch.nn.functional.gelu(x))


def test_a_table_is_made_once_whoever_watches():
    from zinfer.kernels.native.tape import TapeRecorder

    table.cache_clear()
    x, out = noise(3, 40), []
    want = torch.nn.functional.gelu(x)
    replay = TapeRecorder(calls.kernels(), 2**20).record(lambda: out.append(activate(x, "gelu", exact=False)))
    assert table("gelu") is table("gelu")
    replay()
    assert torch.equal(out[0], want)


@pytest.mark.parametrize("kind", ["gelu", "gelu_pytorch_tanh", "quick_gelu", "relu"])
def test_a_model_with_another_gate_gives_torchs_tokens(kind, tmp_path, monkeypatch):
    """A family's gate may be of any kind: the same tokens as by torch's activation, in exact mode too."""
    folder = write_tiny("llama", tmp_path, "bfloat16", hidden_act=kind)
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, logprobs=2)

    def outputs():
        with LLM(folder, device="cpu", machine="sim-default", threads=1, exact=True) as llm:
            outputs = [each.outputs[0] for each in llm.generate([[5, 9, 2, 14], [3, 1]], params)]
        return [(each.token_ids, each.logprobs) for each in outputs]

    seen = []
    gated = calls.kernels().gated
    monkeypatch.setattr(calls.kernels(), "gated", lambda *args, **how: seen.append(1) or gated(*args, **how))
    found = outputs()
    assert seen
    monkeypatch.setattr(mlp, "host_kernels", lambda *tensors: None)
    assert outputs() == found
