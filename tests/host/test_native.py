"""The kernels that are compiled on this machine: against their twins, and what happens where there are none."""

import logging
import stat
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from kernel_parity import CLOSE, WRONG_ROWS, paged_error, pages_case, rows_error
from published import llama
from tiny_models import write_tiny

from zinfer import LLM, SamplingParams
from zinfer.kernels import products, quant
from zinfer.kernels.native import build, calls, signatures
from zinfer.kernels.panels import QuantWeight, dequantise
from zinfer.kernels.quantise import quantise
from zinfer.kernels.row_kernels import row_kernels
from zinfer.spec.read import read_spec

BF16 = torch.bfloat16
needs_kernels = pytest.mark.skipif(calls.kernels() is None, reason="no C compiler here")
needs_products = pytest.mark.skipif(
    calls.kernels() is None or not calls.kernels().has_products, reason="no AVX-512 bfloat16 here"
)


def library(folder):
    return build.library(signatures.SOURCES, signatures.FLAGS, folder)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def relative(found, want):
    return float((found.float() - want).norm() / want.norm())


@pytest.fixture
def fresh(monkeypatch):
    """The module asks anew, and forgets what it heard here."""
    monkeypatch.setattr(calls, "remembered", lambda _question, _is_answer, find: find())
    calls.kernels.cache_clear()
    yield
    calls.kernels.cache_clear()


@needs_kernels
@pytest.mark.parametrize("kernel", ["norm", "layer norm", "rotate", "gate"])
def test_rows_agree_with_their_twins(kernel):
    assert rows_error("cpu", BF16, kernel, calls.kernels()) < 8e-3  # one rounding


@needs_kernels
@pytest.mark.parametrize(
    ("kernel", "name", "wrong"),
    [
        *WRONG_ROWS,
        ("norm", "norm", lambda run: lambda x, weight, eps: run(x, weight, 1.0)),
        ("layer norm", "layer_norm", lambda run: lambda x, weight, bias, eps: run(x, bias, weight, eps)),
        ("layer norm", "layer_norm", lambda run: lambda x, weight, bias, eps: run(x, weight, None, eps)),
        ("layer norm", "layer_norm", lambda run: lambda x, weight, bias, eps: run(x, weight, bias, 1.0)),
    ],
)
def test_a_row_kernel_that_reads_one_thing_wrongly_would_be_seen(kernel, name, wrong, monkeypatch):
    found = calls.kernels()
    monkeypatch.setattr(found, name, wrong(getattr(found, name)))
    assert rows_error("cpu", BF16, kernel, found) > 3e-2


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_rows_bits_depend_on_the_row_alone(threads):
    """Also where rows are shared among threads: enough of them for several pieces."""
    found, before = calls.kernels(), torch.get_num_threads()
    x, weight = noise(70, 1000), noise(1000)
    alone = found.norm(x[41:42], weight, 1e-5), found.layer_norm(x[41:42], weight, x[3], 1e-5)
    torch.set_num_threads(threads)
    try:
        together = found.norm(x, weight, 1e-5), found.layer_norm(x, weight, x[3], 1e-5)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together[0][41], alone[0][0])
    assert torch.equal(together[1][41], alone[1][0])


@needs_kernels
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"window": 50},
        {"cap": 2.0},
        {"heads": 6, "kv_heads": 2, "dim": 48},
        {"heads": 8, "kv_heads": 1, "dim": 64, "window": 3},
        {"heads": 8, "kv_heads": 1, "dim": 64, "cap": 2.0, "page_tokens": 1},
        {"heads": 4, "kv_heads": 2, "dim": 32, "page_tokens": 8},
        {"heads": 4, "kv_heads": 4, "dim": 128},
        {"heads": 64, "kv_heads": 2, "dim": 96},
        {"heads": 2, "kv_heads": 1, "dim": 256},
    ],
    ids=str,
)
def test_attention_over_pages_agrees_with_its_twin(shape, unit):
    assert paged_error("cpu", BF16, [1, 32, 33, 130, 300], native=calls.kernels(), **shape) < CLOSE[BF16]


@needs_kernels
@pytest.mark.parametrize("wrong", ["table", "lengths", "keys", "values"])
@pytest.mark.parametrize("dim", [16, 64])
def test_attention_that_reads_one_thing_wrongly_would_be_seen(dim, wrong, unit):
    q, (plane,), pages = pages_case("cpu", BF16, [40, 130], dim=dim)
    k, v = plane.unbind()
    given = {"keys": k, "values": v, "table": pages.table, "lengths": pages.lengths}
    options = {"scale": 0.25, "window": None, "cap": 0.0}
    right = calls.kernels().attend(q, k, v, pages.table, pages.lengths, 16, **options)
    given[wrong] = given[wrong] - 1 if wrong == "lengths" else given[wrong].flip(0)
    found = calls.kernels().attend(
        q, *(given[name] for name in ("keys", "values", "table", "lengths")), 16, **options
    )
    assert (found.float() - right.float()).abs().max() > CLOSE[BF16]


@needs_kernels
@pytest.mark.parametrize("dim", [16, 64])
def test_a_rows_attention_depends_on_no_batch_mate(dim, unit):
    q, (plane,), pages = pages_case("cpu", BF16, [5, 70, 200], dim=dim)
    options = {"scale": 0.25, "window": None, "cap": 0.0}
    together = calls.kernels().attend(q, *plane.unbind(), pages.table, pages.lengths, 16, **options)
    alone = calls.kernels().attend(
        q[1:2], *plane.unbind(), pages.table[1:2], pages.lengths[1:2], 16, **options
    )
    assert torch.equal(together[1:2], alone)


@needs_kernels
@pytest.mark.parametrize("shape", [(32, 4, 64), (4, 4, 128), (71, 71, 64), (8, 1, 48)], ids=str)
def test_a_tile_may_have_any_number_of_rows(shape, unit):
    """More than a unit takes at a time are cut where they are attended: the same bits."""
    (heads, kv_heads, dim), num_rows = shape, 300
    lengths = list(range(20, 20 + num_rows))
    q, (plane,), pages = pages_case("cpu", BF16, lengths[-1:], heads=heads, kv_heads=kv_heads, dim=dim)
    q = noise(num_rows, heads, dim)
    found, every = calls.kernels(), torch.tensor(lengths, dtype=torch.int32)
    assert num_rows > found.tile_rows(heads, kv_heads, dim)

    def attended(bounds):
        tiles = torch.tensor(bounds, dtype=torch.int32), torch.zeros(len(bounds) - 1, dtype=torch.int32)
        options = {"scale": dim**-0.5, "window": 90, "cap": 0.0, "tiles": tiles}
        return found.attend(q, *plane.unbind(), pages.table, every, 16, **options)

    assert torch.equal(attended([0, num_rows]), attended(range(num_rows + 1)))


@needs_kernels
def test_both_units_attend_the_same_rows():
    """Close to each other, and not the same: who attends is known."""
    found = calls.kernels()
    if not found.has_amx:
        pytest.skip("no AMX here")
    q, (plane,), pages = pages_case("cpu", BF16, [70, 200], dim=64)

    def attended():
        options = {"scale": 0.25, "window": None, "cap": 0.0}
        return found.attend(q, *plane.unbind(), pages.table, pages.lengths, 16, **options)

    matrix = attended()
    found.allow_amx(False)
    try:
        vector = attended()
    finally:
        found.allow_amx(True)
    assert not torch.equal(matrix, vector)
    assert (matrix.float() - vector.float()).abs().max() < CLOSE[BF16]


@needs_kernels
@pytest.mark.parametrize("width", [1, 63, 64, 65, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("odd", [None, float("nan"), float("-inf"), float("inf")])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_largest_is_the_first_of_equals_wherever_it_lies(width, odd, threads):
    draw = torch.Generator().manual_seed(width)
    rows = torch.randint(-2, 3, (40, width), generator=draw).float()  # most have several of the largest
    if odd is not None:
        rows[torch.rand(rows.shape, generator=draw) < 2 / width] = odd
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tops, at = calls.kernels().largest(rows)
    finally:
        torch.set_num_threads(before)
    want = torch.from_numpy(rows.numpy().argmax(-1))
    assert at.tolist() == want.tolist()
    assert torch.equal(tops.nan_to_num(9), rows.gather(-1, want[:, None])[:, 0].nan_to_num(9))
    last = width - 1 - rows.numpy()[:, ::-1].argmax(-1)
    assert width == 1 or last.tolist() != at.tolist()  # taking the last of equals would be seen


@needs_kernels
def test_which_heads_it_takes():
    for heads, kv_heads, dim in [(32, 4, 64), (71, 71, 64), (64, 1, 128), (8, 8, 256), (32, 32, 80)]:
        assert calls.Kernels.attends(heads, kv_heads, dim)
    for heads, kv_heads, dim in [(71, 1, 64), (8, 8, 24), (8, 8, 512), (64, 1, 256)]:
        assert not calls.Kernels.attends(heads, kv_heads, dim)
    found = calls.kernels()
    for heads, kv_heads, dim in [(32, 4, 64), (64, 1, 128), (8, 8, 256), (8, 8, 48)]:
        rows, group = found.tile_rows(heads, kv_heads, dim), heads // kv_heads
        queries, elements = (256, 16384) if found.has_amx and dim % 32 == 0 else (64, 8192)
        assert rows * group <= queries and rows * group * dim <= elements
        assert (rows + 1) * group > queries or (rows + 1) * group * dim > elements


@needs_kernels
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_a_whole_model_through_all_kernels(family, tmp_path, monkeypatch):
    """Decode of several sequences: close to what torch makes of the same weights, and every kernel had its part."""
    folder, seen = write_tiny(family, tmp_path, "bfloat16", num_hidden_layers=2), set()
    prompts = [[5, 9, 2, 14, 3, 77, 8], [400, 401], [3, 1, 4, 1, 5]]
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True, logprobs=2)

    def two_tokens():
        with LLM(folder, device="cpu", machine="sim-default", threads=1, exact=False) as llm:
            outputs = [each.outputs[0] for each in llm.generate(prompts, params)]
        return [(each.token_ids[0], [max(token.values()) for token in each.logprobs]) for each in outputs]

    for name in ("norm", "rotate", "gated", "attend"):
        monkeypatch.setattr(calls.kernels(), name, _seen(name, getattr(calls.kernels(), name), seen))
    found = two_tokens()
    assert seen == {"norm", "rotate", "gated", "attend"}
    for module in (
        "kernels.columns",
        "kernels.row_kernels",
        "kernels.products",
        "kernels.quant",
        "layers.tiles",
    ):
        monkeypatch.setattr(f"zinfer.{module}.kernels", lambda: None)
    seen.clear()
    alike = [pair for pair in zip(found, two_tokens(), strict=True) if pair[0][0] == pair[1][0]]
    assert not seen
    assert alike, "of three tokens none was the same"
    for (_, ours), (_, torchs) in alike:
        assert ours == pytest.approx(torchs, abs=0.05)


def _seen(name, run, seen):
    return lambda *args, **options: seen.add(name) or run(*args, **options)


@needs_products
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (7, 31), (33, 32), (37, 70), (130, 4099)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 13, 17, 33, 80])
def test_a_product_agrees_with_torch(rows, outputs, inputs, with_bias, unit):
    x, weight, bias = noise(rows, inputs), noise(outputs, inputs, seed=1), noise(outputs, seed=2)
    want = x.float() @ weight.float().t() + (bias.float() if with_bias else 0)
    found = calls.kernels().dense(x, weight, bias if with_bias else None)
    assert found.shape == want.shape
    assert relative(found, want) < 4e-3


@needs_products
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_products_bits_depend_on_the_row_alone(threads, unit):
    """Weights that cancel leave what one order of adding leaves, and no other."""
    x, weight = products.cancelling(130, 4099, BF16, "cpu")
    x = x.repeat(8, 1)[:38]  # tiles of 5 and 6 rows
    found, before = calls.kernels(), torch.get_num_threads()
    alone = [found.dense(x[row : row + 1], weight) for row in range(len(x))]
    assert alone[0].float().abs().max() > 0
    torch.set_num_threads(threads)
    try:
        assert torch.equal(found.dense(x, weight), torch.cat(alone))
        for rows in range(2, 9):
            assert torch.equal(found.dense(x[2 : 2 + rows], weight), torch.cat(alone[2 : 2 + rows]))
    finally:
        torch.set_num_threads(before)
    # The mutation: the same sums in another order are other numbers.
    order = torch.arange(4099).roll(1000)
    assert not torch.equal(
        found.dense(x[:, order].contiguous(), weight[:, order].contiguous()), torch.cat(alone)
    )


@needs_products
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 4099), (3, 17_500), (1201, 70), (517, 1024), (64, 4099)])
def test_the_bits_of_one_row_depend_on_no_thread(outputs, inputs, with_bias, unit):
    """Outputs are shared in runs there, in tiles where rows are several."""
    found, before = calls.kernels(), torch.get_num_threads()
    x, weight = products.cancelling(outputs, inputs, BF16, "cpu")
    x, bias = x[:1], noise(outputs, seed=2) if with_bias else None
    want = found.dense(x.repeat(3, 1), weight, bias)[1:2]
    assert want.float().abs().max() > 0
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            assert torch.equal(found.dense(x, weight, bias), want), threads
    finally:
        torch.set_num_threads(before)
    # The mutation: the same products added up in another order.
    order = torch.arange(inputs).roll(inputs // 3)
    moved = found.dense(x[:, order].contiguous(), weight[:, order].contiguous(), bias)
    assert outputs == 1 or with_bias or not torch.equal(moved, want)  # a bias hides what is left of the sums


@needs_products
@pytest.mark.parametrize("rows", [255, 256, 257, 600])
def test_many_rows_are_multiplied_in_blocks(rows, unit):
    """Each row by itself is the slow twin; 600 are three blocks, and no tile reaches from one into the next."""
    x, weight, bias = noise(rows, 100), noise(75, 100, seed=1), noise(75, seed=2)
    found = calls.kernels()
    alone = torch.cat([found.dense(x[row : row + 1], weight, bias) for row in range(rows)])
    assert torch.equal(found.dense(x, weight, bias), alone)
    x[-1] = x[-2]  # the mutation, in the last row of the last block
    assert not torch.equal(found.dense(x, weight, bias), alone)


@needs_products
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5, 24, 257])
def test_a_product_goes_into_columns_of_a_wider_matrix(rows, dtype, unit):
    """What lies beside them stays, and numbers in float32 are rounded to bfloat16 all the same."""
    x, weight, bias = noise(rows, 100), noise(75, 100, seed=1), noise(75, seed=2)
    found, wide = calls.kernels(), torch.full((rows, 80), 7.0, dtype=dtype)
    into = wide[:, 2:77]
    assert found.dense(x, weight, bias, into) is into
    assert torch.equal(into, found.dense(x, weight, bias).to(dtype))
    assert bool((wide[:, :2] == 7).all()) and bool((wide[:, 77:] == 7).all())
    assert not torch.equal(into, x.float() @ weight.float().t() + bias.float())


@needs_products
def test_rows_may_be_packed_by_every_piece(unit):
    """Without scratch memory the same bits: the packed rows are read in one order."""
    x, weight, y = noise(23, 100), noise(75, 100, seed=1), torch.empty(23, 75, dtype=BF16)
    calls.kernels()._do(
        "zinfer_dense", *(t.data_ptr() for t in (x, weight)), None, y.data_ptr(), None, 23, 75, 100, 75, False
    )
    assert torch.equal(y, calls.kernels().dense(x, weight))


@needs_products
def test_both_units_multiply_the_same_numbers():
    """What they round alike shows that both were used; what they round otherwise, that they are two."""
    found = calls.kernels()
    if not found.has_amx:
        pytest.skip("no AMX here")
    x, weight = noise(40, 4099), noise(70, 4099, seed=1)
    cancelled = products.cancelling(130, 4099, BF16, "cpu")
    on_matrix, left = found.dense(x, weight), found.dense(*cancelled)
    found.allow_amx(False)
    try:
        assert relative(on_matrix, found.dense(x, weight).float()) < 4e-3
        assert not torch.equal(left, found.dense(*cancelled))
    finally:
        found.allow_amx(True)


@needs_products
@pytest.mark.parametrize("rows", [1, 20, 50, 257])
@pytest.mark.parametrize(("outputs", "inputs"), [(300, 2048), (37, 70), (130, 4128)])
def test_where_a_weight_lies_changes_no_bit(rows, outputs, inputs, unit):
    """In a published file it lies across the lines of the cache, which many rows meet in a copy."""
    x, weight = noise(rows, inputs), noise(outputs, inputs, seed=1)
    around = torch.zeros(weight.numel() + 40, dtype=BF16)
    across = around[28 : 28 + weight.numel()].view(outputs, inputs).copy_(weight)
    assert across.data_ptr() % 64 and not weight.data_ptr() % 64
    want = calls.kernels().dense(x, weight)
    assert torch.equal(calls.kernels().dense(x, across), want)
    across[-1, -1] += 1  # the mutation: the last element of the last tile
    assert not torch.equal(calls.kernels().dense(x, across), want)


@needs_products
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_nothing_beyond_a_weights_edge_is_multiplied(rows, unit):
    """A row that ends in the middle of a tile lies before the next one, whose numbers may be anything."""
    whole = torch.full((40, 70), torch.nan, dtype=BF16)
    whole[:37, :] = noise(37, 70, seed=1)
    x = noise(rows, 70)
    want = x.float() @ whole[:37].float().t()
    assert relative(calls.kernels().dense(x, whole[:37]), want) < 4e-3
    whole[:-3, -1] = torch.nan  # the mutation: a NaN inside is seen
    assert bool(calls.kernels().dense(x, whole[:37]).isnan().all())


@needs_products
@pytest.mark.parametrize("panel", [32, 64])
@pytest.mark.parametrize("weights", ["int4", "int8"])
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 19, 37, 300])
def test_a_quantised_product_agrees_with_its_twin(rows, weights, panel, unit):
    weight = quantise(noise(panel + 9, 192).float() + 0.3, weights, panel)
    x = noise(rows, 192, seed=1)
    want = x.float() @ dequantise(weight).t()
    found = calls.kernels().quant(x, weight)
    assert found.shape == (rows, panel + 9)
    assert relative(found, want) < 4e-3
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(found[row : row + 1], calls.kernels().quant(x[row : row + 1], weight))
    x[rows // 2, 100] += 1  # the mutation
    assert not torch.equal(found, calls.kernels().quant(x, weight))


@needs_products
@pytest.mark.parametrize(
    ("weights", "part"),
    [("int4", "nibbles"), ("int4", "scales"), ("int8", "nibbles"), ("int8", "low"), ("int8", "scales")],
)
def test_a_quantised_product_reads_every_part(weights, part, unit):
    weight = quantise(noise(64, 128).float() + 0.3, weights, 64)
    x = noise(2, 128, seed=1)
    want = x.float() @ dequantise(weight).t()
    parts = {name: getattr(weight, name) for name in ("nibbles", "scales", "low")}
    changed = parts[part].flip(1)
    assert not torch.equal(changed, parts[part])
    found = calls.kernels().quant(x, QuantWeight(**(parts | {part: changed}), outputs=64))
    assert relative(found, want) > 8e-3


@needs_products
def test_a_few_rows_go_where_they_are_faster(monkeypatch):
    seen = []
    dense = calls.kernels().dense
    monkeypatch.setattr(calls.kernels(), "dense", lambda *args: seen.append(args[0].shape[0]) or dense(*args))
    monkeypatch.setattr(products, "few_rows", lambda *case: 4)
    monkeypatch.setattr(products, "row_kernel", lambda *case: "native")
    weight = noise(40, 64)
    for rows in (1, 2, 4, 5):
        found = products.linear(noise(rows, 64, seed=rows), weight, exact=False)
        assert relative(found, noise(rows, 64, seed=rows).float() @ weight.float().t()) < 4e-3
    assert seen == [1, 2, 4]
    products.linear(noise(2, 64), noise(64, 40), exact=False, transposed=True)
    products.linear(noise(2, 64), noise(64, 40), exact=True, transposed=True)
    assert seen == [1, 2, 4]


@needs_products
def test_nothing_is_timed_while_a_pass_is_recorded(monkeypatch):
    """Its steps would be written down, and what it makes up is no step."""
    noted = []
    for name in ("few_rows", "row_kernel"):
        monkeypatch.setattr(products, name, lambda *case: pytest.fail("timed"))
    with calls.notes(lambda name, *arguments: noted.append(name)):
        for rows in (1, 3, 300):
            products.linear(noise(rows, 64), noise(40, 64), exact=False)
    assert noted == ["zinfer_dense"] * 3


@needs_products
@pytest.mark.parametrize("has_amx", [True, False])
def test_more_rows_than_are_timed_go_where_blocks_of_them_are_faster(has_amx, monkeypatch):
    seen = []
    dense = calls.kernels().dense
    monkeypatch.setattr(calls.kernels(), "dense", lambda *args: seen.append(args[0].shape[0]) or dense(*args))
    monkeypatch.setattr(calls.kernels(), "has_amx", has_amx)
    for few in (128, 256):
        monkeypatch.setattr(products, "few_rows", lambda *case, few=few: few)
        products.linear(noise(300, 64), noise(40, 64), exact=False)
        assert seen == ([300] if has_amx and few == 256 else [])


@needs_products
def test_exact_rows_are_the_compiled_kernels_at_any_number():
    """Whatever has no padding has no row counts to agree on either: the plan is told so."""
    weight, x = noise(40, 64), noise(300, 64, seed=1)
    whole = products.linear(x, weight, exact=True)
    assert torch.equal(whole, calls.kernels().dense(x, weight))
    for rows in (1, 7, 299):
        assert torch.equal(products.linear(x[:rows], weight, exact=True), whole[:rows])
    spec = read_spec(llama(64, 128, 1, 4, 2, 100) | {"torch_dtype": "bfloat16"})
    assert dict(products.with_product_sizes(spec, "cpu").product_sizes)["q"] == ()
    wide = read_spec(llama(64, 128, 1, 4, 2, 100) | {"torch_dtype": "float32"})
    assert dict(products.with_product_sizes(wide, "cpu").product_sizes)["q"] != ()


@needs_products
def test_what_is_too_wide_for_a_threads_stack_is_torchs(monkeypatch):
    monkeypatch.setattr(products, "MOST_INPUTS", 63)
    monkeypatch.setattr(calls.kernels(), "dense", None)
    assert products.linear(noise(3, 64), noise(40, 64), exact=True).shape == (3, 40)


@needs_products
def test_how_many_are_few_is_timed_once(monkeypatch):
    timed = []
    monkeypatch.setattr(products, "remembered", lambda _question, _is_answer, find: find())
    monkeypatch.setattr(
        products,
        "fastest",
        lambda runs: timed.append(list(runs)) or ("native" if len(timed) < 3 else "torch"),
    )
    products.few_rows.cache_clear()
    for _ in range(2):
        assert products.few_rows(BF16, "cpu", 40, 64, False, False) == 4
    assert timed == [["native", "torch"]] * 3
    assert products.few_rows(BF16, "cpu", 40, 64, True, False) == 1
    assert products.few_rows(torch.float32, "cpu", 40, 64, False, False) == 1
    products.few_rows.cache_clear()


def test_gradients_and_other_dtypes_keep_torchs_code():
    assert row_kernels(torch.ones(2)) is None
    x = torch.ones(2, dtype=BF16, requires_grad=True)
    assert row_kernels(torch.ones(2, dtype=BF16), x) is None
    with torch.no_grad():
        assert row_kernels(x) is calls.kernels()


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_without_kernels_torch_does_the_work(weights, monkeypatch):
    weight, x = quantise(noise(64, 128).float(), weights, 64), noise(3, 128, seed=1)
    for module in (products, quant):
        monkeypatch.setattr(module, "kernels", lambda: None)
    assert products.few_rows.__wrapped__(BF16, "cpu", 64, 128, False, False) == 1
    assert "native" not in products._candidates(BF16, "cpu", 128, False)
    if quant.has_kernel.__wrapped__(64, "cpu"):
        assert relative(quant.packed(x, weight), x.float() @ dequantise(weight).t()) < 8e-3


def test_a_machine_without_a_compiler_has_none(monkeypatch, tmp_path):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(build.metadata, "version", _not_installed)
    assert build.compiler() is None
    assert library(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(build.metadata, "version", lambda name: "0.17")
    assert build.compiler()[-3:] == ("-m", "ziglang", "cc")


def _not_installed(name):
    raise PackageNotFoundError(name)


def a_compiler(folder, body):
    path = folder / "cc"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return (str(path),)


def test_a_compiler_that_cannot_is_asked_once(monkeypatch, tmp_path, caplog):
    command = a_compiler(tmp_path, f"echo x >> {tmp_path}/asked; echo no such option >&2; exit 1")
    monkeypatch.setattr(build, "compiler", lambda: command)
    with caplog.at_level(logging.WARNING, "zinfer"):
        assert library(tmp_path / "native") is None
        assert library(tmp_path / "native") is None
    assert (tmp_path / "asked").read_text() == "x\n"
    assert len(caplog.records) == 1
    (failed,) = (tmp_path / "native").iterdir()
    assert failed.read_text() == "no such option\n"


def test_a_compiler_that_makes_nothing_or_takes_too_long_has_failed(monkeypatch, tmp_path):
    for number, body in enumerate(["exit 0", "exec sleep 5"]):
        monkeypatch.setattr(build, "_TIMEOUT_S", 0.2)
        monkeypatch.setattr(build, "compiler", lambda body=body: a_compiler(tmp_path, body))
        assert library(tmp_path / str(number)) is None
        assert [path.suffix for path in (tmp_path / str(number)).iterdir()] == [".failed"]


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_code_that_others_could_have_written_is_not_run(mode, tmp_path, caplog):
    folder = tmp_path / "native"
    folder.mkdir()
    folder.chmod(mode)
    assert library(folder) is None
    if build.compiler() is not None:
        assert "others may write" in caplog.text


@needs_kernels
def test_a_library_is_made_once_for_a_machine_and_a_source(monkeypatch, tmp_path):
    first = library(tmp_path / "native")
    made = first.stat().st_mtime_ns
    assert library(tmp_path / "native") == first
    assert first.stat().st_mtime_ns == made
    assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    named = {first.name}
    monkeypatch.setattr(build, "_processor", lambda: ("another",))
    named.add(f"attention-{build._digest(build.compiler(), signatures.SOURCES)}.so")
    monkeypatch.setattr(build, "fingerprint", lambda: "another torch")
    named.add(f"attention-{build._digest(build.compiler(), signatures.SOURCES)}.so")
    assert len(named) == 3


@needs_kernels
def test_a_library_is_tried_once_and_again_when_it_or_its_caller_has_changed(monkeypatch, tmp_path, fresh):
    """Only that it was right is remembered, and only of this very file and the code that calls it."""
    path = tmp_path / "kernels.so"
    path.write_bytes(b"first")
    caller = tmp_path / "caller.py"
    caller.write_text("one")
    answers, tried, says = {}, [], [""]

    def remembered(question, is_answer, find):
        if not is_answer(answers.get(question)):
            answers[question] = find()
        return answers[question]

    monkeypatch.setattr(calls, "remembered", remembered)
    monkeypatch.setattr(calls, "library", lambda sources, flags: path)
    monkeypatch.setattr(calls, "Kernels", lambda path, threads: "kernels")
    monkeypatch.setattr(calls, "__file__", str(caller))
    monkeypatch.setattr(calls.trials, "wrong", lambda found: (tried.append(found), says[0])[1])

    def ask():
        calls.kernels.cache_clear()
        return calls.kernels()

    assert [ask(), ask()] == ["kernels"] * 2
    assert len(tried) == 1
    path.write_bytes(b"another")
    assert [ask(), ask()] == ["kernels"] * 2
    assert len(tried) == 2
    caller.write_text("two")
    says[0] = "norm"
    assert [ask(), ask()] == [None] * 2, "what was wrong is tried again"
    assert len(tried) == 4
    says[0] = ""
    assert [ask(), ask()] == ["kernels"] * 2
    assert len(tried) == 5


@needs_kernels
def test_a_kernel_that_is_wrong_does_not_serve(monkeypatch, caplog, fresh):
    norm = calls.Kernels.norm
    monkeypatch.setattr(calls.Kernels, "norm", lambda self, x, weight, eps: norm(self, x, weight, eps) * 1.1)
    assert calls.kernels() is None
    assert calls.kernels() is None
    assert [record.message for record in caplog.records] == [
        "the compiled kernels give wrong numbers (norm): slower torch code replaces them"
    ]


@needs_kernels
@pytest.mark.parametrize("content", [b"", b"no library at all"])
def test_a_library_that_does_not_load_does_not_serve(content, monkeypatch, tmp_path, caplog, fresh):
    path = tmp_path / "kernels.so"
    path.write_bytes(content)
    monkeypatch.setattr(calls, "library", lambda sources, flags: path)
    assert calls.kernels() is None
    assert "do not load" in caplog.text


def test_without_torchs_threads_there_are_none(monkeypatch, fresh):
    monkeypatch.setattr(calls, "_openmp", lambda: None)
    assert calls.kernels() is None
