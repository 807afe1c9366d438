"""Products: every form against the dense one, and in exact mode bits that depend on the row alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zinfer.kernels import products
from zinfer.kernels.choice import agreeing_sizes, cover, fastest
from zinfer.kernels.native.calls import kernels
from zinfer.kernels.products import linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = [1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 64, 65, 130, 257, 300]


def cancelling(rows, inputs, outputs, dtype, transposed=False):
    """Products that cancel but for rounding, so that the order of adding is plain to see in the result."""
    a, b = torch.randn(rows, inputs // 2).to(dtype), torch.randn(outputs, inputs // 2).to(dtype)
    shuffled = torch.randperm(inputs // 2)
    x, weight = torch.cat([16 * a, 16 * a[:, shuffled]], 1), torch.cat([b, -b[:, shuffled]], 1)
    bias = torch.full((outputs,), 2.0**-20, dtype=dtype)
    return x, weight.t().contiguous() if transposed else weight, bias


def problem(rows, inputs, outputs, dtype, transposed=False):
    x = torch.randn(rows, inputs).to(dtype)
    weight = (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
    bias = torch.randn(outputs).to(dtype)
    return x, weight.t().contiguous() if transposed else weight, bias


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 9, 70])
def test_agrees_with_the_dense_form(rows, dtype, transposed, exact):
    x, weight, bias = problem(rows, 96, 40, dtype, transposed)
    weight_OI = weight.t() if transposed else weight
    want = x.double() @ weight_OI.double().t()
    close = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    got = linear(x, weight, exact=exact, transposed=transposed)
    torch.testing.assert_close(got.double(), want, atol=close, rtol=close)
    got = linear(x, weight, bias, exact=exact, transposed=transposed)
    torch.testing.assert_close(got.double(), want + bias.double(), atol=close, rtol=close)
    assert got.dtype == dtype


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(34, 97), (256, 256), (768, 300), (3072, 768), (1000, 64)])
def test_exact_bits_depend_on_the_row_alone(inputs, outputs, dtype, transposed):
    x, weight, bias = cancelling(300, inputs, outputs, dtype, transposed)
    for with_bias in (None, bias):
        whole = linear(x, weight, with_bias, exact=True, transposed=transposed)
        for rows in ROWS:
            start = (rows * 7) % (301 - rows)
            part = linear(x[start : start + rows], weight, with_bias, exact=True, transposed=transposed)
            assert torch.equal(part, whole[start : start + rows]), rows


def test_without_the_rule_rows_would_differ(monkeypatch):
    """Somewhere among these shapes a plain product gives a row other bits when it is fed alone."""
    monkeypatch.setattr(products, "cover", lambda rows, sizes: [(0, rows, rows)])
    differing = 0
    for dtype in DTYPES:
        for inputs, outputs in [(768, 300), (3072, 768), (5632, 256)]:
            x, weight, _ = cancelling(300, inputs, outputs, dtype)
            whole = linear(x, weight, exact=True)
            differing += any(
                not torch.equal(linear(x[:rows], weight, exact=True), whole[:rows]) for rows in (1, 2, 5, 33)
            )
    assert differing


def stable(x):
    return torch.stack([row.cumsum(0) for row in x])


def test_sizes_that_differ_are_kept_apart():
    def product(x):
        return stable(x) + (0 if len(x) >= 8 else 1e-3)

    x = torch.randn(5, 16)
    assert agreeing_sizes(stable, x, (1, 4, 16, 64)) == (1, 4, 16, 64)
    assert agreeing_sizes(product, x, (1, 4, 16, 64)) == (16, 64)


def test_without_trust_every_row_runs_alone():
    def by_place(x):
        return stable(x) + torch.arange(len(x))[:, None]

    assert agreeing_sizes(by_place, torch.randn(5, 16), (8, 16, 64)) == (1,)


@given(st.integers(1, 1000), st.sets(st.sampled_from([1, 2, 4, 16, 32, 64, 128, 256]), min_size=1))
@settings(max_examples=100)
def test_cover_holds_every_row_once(rows, sizes):
    sizes = tuple(sorted(sizes))
    pieces = cover(rows, sizes)
    assert [row for start, stop, _ in pieces for row in range(start, stop)] == list(range(rows))
    assert all(0 < stop - start <= size and size in sizes for start, stop, size in pieces)


class Clock:
    """Time that passes only when something is run."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def taking(self, *seconds):
        turns = iter(seconds * 10)

        def run():
            self.now += next(turns)

        return run


def test_the_fastest_must_be_clearly_faster_than_the_first():
    clock = Clock()
    even = {"first": clock.taking(1.0), "other": clock.taking(0.95)}
    assert fastest(even, clock) == "first"
    uneven = {"first": clock.taking(1.0), "other": clock.taking(9, 0.8, 9), "slow": clock.taking(2)}
    assert fastest(uneven, clock) == "other"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kernel", products.KERNELS)
def test_every_kernel_for_one_row_agrees(monkeypatch, kernel, with_bias, dtype):
    x, weight, bias = problem(1, 96, 40, dtype)
    monkeypatch.setattr(products, "row_kernel", lambda *case: kernel)
    got = linear(x, weight, bias if with_bias else None, exact=False)
    want = x.double() @ weight.double().t() + (bias.double() if with_bias else 0)
    torch.testing.assert_close(got.double(), want, atol=3e-2, rtol=3e-2)
    assert got.shape == (1, 40)
    assert torch._C._get_mkldnn_enabled()


def test_choices_are_made_ahead_and_kept(monkeypatch):
    from zinfer.spec.records import ModelSpec, Op, WeightRef

    def op(name, shape, bias):
        biases = (WeightRef("bias", name, 0, 48, (48,)),) if bias else ()
        return Op(0, "q", 0, (WeightRef("matrix", name, 0, shape[0], shape), *biases), transposed=True)

    sizes = dict.fromkeys(
        [
            "num_layers",
            "model_dim",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "mlp_dim",
            "vocab_size",
            "max_context",
        ],
        1,
    )
    program = (op("a", (24, 48), True), op("b", (48, 24), False), Op(0, "norm", 0, ()))
    spec = ModelSpec("X", "x", "BF16", **sizes, norm="rms", norm_eps=1e-5, transposed=True, program=program)
    asked = []
    for name in ("row_sizes", "row_kernel"):
        monkeypatch.setattr(products, name, lambda *case, name=name: asked.append((name, *case[2:6])))
    if kernels() is not None and kernels().has_products:
        products.prepare(spec, "cpu", exact=True)
        products.prepare(spec, "cpu", exact=False)
        assert not asked, "compiled columns have nothing to agree on and nobody to be compared with"
    monkeypatch.setattr(products, "kernels", lambda: None)
    products.prepare(spec, "cpu", exact=True)
    products.prepare(spec, "cpu", exact=False)
    assert asked == [
        ("row_sizes", 48, 24, True, True),
        ("row_sizes", 24, 48, True, False),
        ("row_kernel", 48, 24, True, True),
        ("row_kernel", 24, 48, True, False),
    ]


@pytest.mark.parametrize("transposed", [True, False])
def test_a_choice_is_measured_once(monkeypatch, transposed):
    calls = []
    monkeypatch.setattr(
        products, "fastest", lambda candidates, clock: calls.append(list(candidates)) or "vector"
    )
    monkeypatch.setattr(products, "remembered", lambda _question, _is_answer, find: find())
    products.row_kernel.cache_clear()
    for _ in range(3):
        assert products.row_kernel(torch.bfloat16, "cpu", 40, 96, transposed, True) == "vector"
    left_out = (
        {"triton"} if products.compiled(torch.bfloat16, "cpu", 96, transposed) else {"triton", "native"}
    )
    assert calls == [[name for name in products.KERNELS if name not in left_out]]
    assert products.row_kernel(torch.float32, "cpu", 40, 96, transposed, True) == "linear"
    products.row_kernel.cache_clear()


def test_a_bulk_is_cut_into_the_largest_size():
    assert cover(300, (1, 16, 64, 256)) == [(0, 256, 256), (256, 300, 64)]
    assert cover(3, (1, 16, 64)) == [(0, 3, 16)]
    assert cover(130, (64, 128)) == [(0, 128, 128), (128, 130, 64)]


@pytest.mark.parametrize("exact", [True, False])
def test_gradients_reach_input_weight_and_bias(exact):
    for dtype, rows in ((torch.float32, 5), (torch.bfloat16, 1), (torch.bfloat16, 5)):
        x, weight, bias = (part.requires_grad_() for part in problem(rows, 12, 7, dtype))
        grads = torch.autograd.grad(linear(x, weight, bias, exact=exact).sum(), (x, weight, bias))
        want = torch.autograd.grad((x @ weight.t() + bias).sum(), (x, weight, bias))
        for got, wanted in zip(grads, want, strict=True):
            torch.testing.assert_close(got, wanted)


def test_kernels_are_timed_on_weights_that_no_cache_holds(monkeypatch):
    seen = []

    def kernel(_x, weight, _bias):
        seen.append(weight.data_ptr())

    monkeypatch.setattr(products, "KERNELS", {"one": kernel, "other": kernel})
    monkeypatch.setattr(products, "remembered", lambda _question, _is_answer, find: find())
    monkeypatch.setattr(products, "_COLD_BYTES", 10 * 40 * 96 * 2)
    products.row_kernel.cache_clear()
    products.row_kernel(torch.bfloat16, "cpu", 40, 96, False, False)
    products.row_kernel.cache_clear()
    assert all(len(set(seen[at : at + 10])) == 10 for at in range(len(seen) - 10)), (
        "weights came from a cache"
    )
