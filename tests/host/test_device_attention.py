"""Attention by a device's kernels, on the CPU: in Triton's interpreter, with a dense twin for torch's varlen."""

import pytest
import torch
from dense_attention import WORDS, causal, dense, packed, qkv
from kernel_parity import CLOSE, interprets, paged_error, pages_case

from zinfer.kernels import paged, served
from zinfer.kernels.paged import num_splits, paged_decode, paged_decode_twin, paged_partials, paged_serves
from zinfer.kvcache.cache import PagedKv, PagedView
from zinfer.layers import on_device, varlen
from zinfer.layers.attention import attend
from zinfer.layers.partial import Partial

needs_interpreter = pytest.mark.skipif(
    not interprets(), reason="Triton's interpreter is off: tests/gpu has the same cases for the device"
)
pytestmark = needs_interpreter

SHAPES = [
    {},
    {"splits": 3},
    {"splits": 2, "window": 40},
    {"cap": 2.0},
    {"is_int8": True, "splits": 2},
    {"heads": 6, "kv_heads": 3, "dim": 12},
    {"heads": 4, "kv_heads": 1, "dim": 80, "splits": 5},
]


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_paged_decode_agrees_with_its_twin(shape, dtype):
    assert paged_error("cpu", dtype, [1, 130], **shape) < CLOSE[dtype]


@pytest.mark.parametrize("mutation", ["table", "length", "window", "scale"])
def test_a_wrong_page_length_window_or_scale_would_be_seen(mutation):
    q, planes, pages = pages_case("cpu", torch.float32, [70, 200], is_int8=True)
    want = paged_decode_twin(q, planes, pages, scale=0.25, window=40)
    window = 39 if mutation == "window" else 40
    if mutation == "table":
        pages.table[0, -9:] += 1
        pages.table[1, -1] -= 1
    elif mutation == "length":
        pages.lengths.sub_(1)
    elif mutation == "scale":
        planes[1] = planes[1].flip(0)
    found = paged_decode(q, planes, pages, scale=0.25, window=window, splits=2)
    assert (found - want).abs().max() > 1e-3


def test_splits_merge_as_partial_results_do():
    q, planes, pages = pages_case("cpu", torch.float32, [3, 200])
    total, weight, top = paged_partials(q, planes, pages, scale=0.25, splits=4)
    parts = [Partial(total[:, :, i], weight[:, :, i, None], top[:, :, i, None]) for i in range(4)]
    assert not weight[0, :, 1:].any(), "a short sequence leaves splits empty"
    merged = parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3]).result()
    torch.testing.assert_close(merged, paged_decode_twin(q, planes, pages, scale=0.25), atol=2e-5, rtol=0)


def test_splits_fill_the_device_and_are_never_tiny(monkeypatch):
    monkeypatch.setattr("zinfer.kernels.paged.num_cores", lambda device: 100)
    q, _, pages = pages_case("cpu", torch.float32, [1000])
    assert num_splits(q, 2, pages, None) == 3  # 1000 keys are not more than three times four tiles
    assert num_splits(q, 2, pages, 256) == 1
    assert num_splits(q.expand(60, -1, -1), 2, pages, None) == 1  # enough sequences
    assert 1 < num_splits(q.expand(40, -1, -1), 2, pages, None) < 3


@pytest.fixture
def fresh_self_test(monkeypatch):
    monkeypatch.setattr(served, "serves", lambda device_type: True)
    paged_serves.cache_clear()
    yield
    paged_serves.cache_clear()


@pytest.mark.parametrize(("dtype", "is_int8"), [(torch.float32, False), (torch.bfloat16, True)])
def test_the_self_test_passes(dtype, is_int8, fresh_self_test):
    assert paged_serves(dtype, 6, 2, 12, is_int8, "cpu")


def test_a_kernel_that_is_wrong_or_does_not_compile_is_not_used(fresh_self_test, monkeypatch, caplog):
    monkeypatch.setattr(paged, "paged_decode", lambda q, *args, **options: q)
    assert not paged_serves(torch.float32, 4, 2, 12, False, "cpu")

    def refuses(*args, **options):
        raise ValueError("out of resource: shared memory")

    monkeypatch.setattr(paged, "paged_decode", refuses)
    assert not paged_serves(torch.float32, 4, 2, 24, False, "cpu")
    assert [record.getMessage().split("(")[1] for record in caplog.records] == [
        "it gives wrong numbers)",
        "out of resource: shared memory)",
    ]


def test_torchs_packed_attention_is_asked_for_in_its_own_words(monkeypatch):
    """Once as torch 2.13 takes it, once as an older one; right answers serve, and a wrong window does not."""
    from torch.nn.attention import varlen as torchs

    def answered(q, k, v, row_ends, key_ends, scale, window):
        rows, keys = row_ends.diff().tolist(), key_ends.diff().tolist()
        return varlen.varlen_twin(q, k, v, rows, keys, scale=scale, window=window).to(q.dtype)

    def new(q, k, v, row_ends, key_ends, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa == (q.shape[1] != k.shape[1])
        assert window_size[1] == 0
        left = window_size[0]
        return answered(q, k, v, row_ends, key_ends, scale, None if left == -1 else left + 1)

    def old(q, k, v, row_ends, key_ends, max_q, max_k, is_causal=False):
        assert is_causal
        return answered(q, k, v, row_ends, key_ends, q.shape[2] ** -0.5, None)

    def off_by_one(q, k, v, row_ends, key_ends, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        return answered(q, k, v, row_ends, key_ends, scale, window_size[0] + 2)

    found = {}
    monkeypatch.setattr(varlen, "_KERNELLESS", ())
    for function in (new, old, off_by_one):
        monkeypatch.setattr(torchs, "varlen_attn", function)
        for is_windowed in (False, True):
            varlen.varlen_serves.cache_clear()
            case = (torch.bfloat16, 4, 2, 16, "cpu", is_windowed)
            found[function.__name__, is_windowed] = varlen.varlen_serves(*case)
    varlen.varlen_serves.cache_clear()
    assert found.pop(("off_by_one", False)) is False
    assert found == {
        ("new", False): True,
        ("new", True): True,
        ("old", False): True,
        ("old", True): False,
        ("off_by_one", True): False,
    }


@pytest.fixture
def as_device(monkeypatch):
    """The CPU as a device that has all kernels; counts the calls of each."""
    calls = {"varlen": 0, "paged": 0}

    def packed_attention(q, k, v, pack, *, scale, window):
        calls["varlen"] += 1
        rows, keys = (ends.diff().tolist() for ends in (pack.row_ends, pack.key_ends))
        assert (pack.most_rows, pack.most_keys) == (max(rows), max(keys))
        return varlen.varlen_twin(q, k, v, rows, keys, scale=scale, window=window).to(q.dtype)

    def over_pages(*args, **options):
        calls["paged"] += 1
        return paged_decode(*args, **options)

    monkeypatch.setattr(on_device, "varlen_serves", lambda *case: True)
    monkeypatch.setattr(on_device, "varlen", packed_attention)
    monkeypatch.setattr(on_device, "paged_decode", over_pages)
    monkeypatch.setattr(served, "serves", lambda device_type: True)
    paged_serves.cache_clear()
    yield calls
    paged_serves.cache_clear()


COUNTS = [(30, 0), (1, 130), (7, 20), (1, 16), (40, 0), (1, 0)]  # new rows, past


def attended(counts=COUNTS, *, window=None, dtype=torch.float32, kv_word=None, exact=False, ancestors=None):
    """Mixed sequences over a cache; (found, wanted), the latter from a dense mask."""
    kv = PagedKv(num_layers=1, num_kv_heads=2, head_dim=16, num_pages=80, dtype=kv_word or WORDS[dtype])
    drawn = [qkv(past + new + s, dtype=dtype) for s, (new, past) in enumerate(counts)]
    drawn = [tuple(x[: new + past] for x in each) for each, (new, past) in zip(drawn, counts, strict=True)]
    for s, (new, past) in enumerate(counts):
        kv.open(s, 16)
        kv.grow(s, past + new)
        if past:
            view = kv.view([s], (0, past))
            view.stage(0, *(x[:past] for x in drawn[s][1:]))
            view.commit()
    batch = packed([new for new, _ in counts], [past for _, past in counts], ancestors=ancestors)
    rows = [torch.cat([x[i][past:] for x, (_, past) in zip(drawn, counts, strict=True)]) for i in range(3)]
    view = kv.view(range(len(counts)), batch.bounds)
    with torch.no_grad():
        found = attend(*rows, 0, batch, view, scale=0.25, window=window, exact=exact)
    want = [
        dense(q[past:], k, v, causal(new, new + past, window), 0.25)
        for (q, k, v), (new, past) in zip(drawn, counts, strict=True)
    ]
    return found, torch.cat(want)


@pytest.mark.parametrize(("kv_word", "atol"), [(None, 1e-5), ("INT8", 3e-2)])
@pytest.mark.parametrize("window", [None, 5, 33])
def test_a_mixed_batch_agrees_with_a_dense_mask(window, kv_word, atol, as_device):
    found, want = attended(window=window, kv_word=kv_word)
    torch.testing.assert_close(found.double(), want, atol=atol, rtol=0)
    assert as_device == {"varlen": 2, "paged": 1}  # all prompts in one call, the later piece alone


def test_half_precision_too(as_device):
    for dtype in (torch.bfloat16, torch.float16):
        found, want = attended(dtype=dtype)
        torch.testing.assert_close(found.double(), want, atol=CLOSE[dtype], rtol=CLOSE[dtype])


@pytest.mark.parametrize("counts", [COUNTS[:1], COUNTS[1:2], [COUNTS[1], COUNTS[3]], COUNTS[2:3]], ids=str)
def test_a_batch_of_one_kind(counts, as_device):
    found, want = attended(counts)
    torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=0)
    assert sum(as_device.values()) == 1


def test_exact_mode_keeps_its_driver(as_device):
    found, want = attended(exact=True)
    torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=0)
    assert as_device == {"varlen": 0, "paged": 0}


def test_a_tree_is_left_to_the_blockwise_driver(as_device):
    tree = torch.ones(7, 7, dtype=torch.bool).tril()
    found, want = attended(ancestors=(None, None, tree, None, None, None))
    torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=0)
    assert as_device == {"varlen": 1, "paged": 1}


def test_without_triton_single_rows_take_torchs_own_attention(as_device, monkeypatch):
    monkeypatch.setattr(served, "serves", lambda device_type: False)
    found, want = attended()
    torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=0)
    assert as_device == {"varlen": 2, "paged": 0}


def test_a_wrong_page_in_the_table_would_be_seen(as_device, monkeypatch):
    pages = (
        PagedKv.view.__annotations__ and __import__("zinfer.kvcache.cache", fromlist=["x"]).PagedView.pages
    )

    def off_by_one(self, sequences):
        found = pages(self, sequences)
        found.table[0, 0] += 1
        return found

    monkeypatch.setattr(PagedView, "pages", off_by_one)
    found, want = attended()
    assert (found.double() - want).abs().max() > 1e-2
