"""Attention in tiles over pages in place: right, the same bits for a row however it is fed, and what plans count."""

import pytest
import torch
from dense_attention import causal, dense, packed, qkv

from zinfer.kernels.native import calls
from zinfer.kvcache.cache import PagedKv
from zinfer.kvcache.pages import Fork
from zinfer.layers import attention, tiles
from zinfer.layers.attention import attend
from zinfer.runtime.live_bytes import LiveBytes
from zinfer.spec.attention_cost import arranged_bytes, attention_workspace_bytes
from zinfer.spec.records import AttentionSizes

BF16 = torch.bfloat16
CLOSE = 1.5e-2  # of values of about 1 in bfloat16
pytestmark = pytest.mark.skipif(calls.kernels() is None, reason="no C compiler here")


class Link:
    """A device's links, counted: its memory is this process's own."""

    device = torch.device("cpu")

    def __init__(self):
        self.up = self.down = 0

    def to_device(self, x):
        self.up += x.nbytes
        return x.clone()

    def to_host(self, x):
        self.down += x.nbytes
        return x.clone()


def cache(length, *, attend="resident", kv_heads=2, dim=16, dtype="BF16", link=None):
    kv = PagedKv(
        num_layers=1,
        num_kv_heads=kv_heads,
        head_dim=dim,
        num_pages=length // 16 + 40,
        dtype=dtype,
        attend=attend,
        crossing=link,
    )
    kv.open(9, 5)  # a short sequence on the first page, so that ours does not begin at slot 0
    kv.open(0, length)
    return kv


def fed(cuts, *, window=None, exact=True, heads=4, mates=(), **options):
    """Rows of one sequence fed in passes that end at `cuts`, beside sequences of `mates` new tokens."""
    kv = cache(cuts[-1], **options)
    dim, kv_heads = options.get("dim", 16), options.get("kv_heads", 2)
    q, k, v = qkv(cuts[-1], heads, kv_heads, dim, BF16)
    found, start = [], 0
    for stop in cuts:
        others = [qkv(count, heads, kv_heads, dim, BF16) for count in mates]
        ids = [100 + i for i in range(len(mates))]
        for id_, count in zip(ids, mates, strict=True):
            kv.open(id_, count)
        batch = packed([*mates, stop - start], [0] * len(mates) + [start])
        rows = [torch.cat([*(o[i] for o in others), (q, k, v)[i][start:stop]]) for i in range(3)]
        view = kv.view([*ids, 0], batch.bounds)
        out = attend(*rows, 0, batch, view, scale=0.25, window=window, exact=exact)
        (work,) = batch.memo.values()
        assert work.tiles, "another driver had the rows"
        view.commit()
        for id_ in ids:
            kv.close(id_)
        found.append(out[batch.bounds[-2] :])
        start = stop
    return torch.cat(found)


@pytest.mark.parametrize("window", [None, 3, 70])
@pytest.mark.parametrize(
    "shape", [{}, {"heads": 6, "kv_heads": 1, "dim": 48}, {"heads": 4, "kv_heads": 4, "dim": 128}], ids=str
)
def test_rows_agree_with_a_dense_mask_and_keep_their_bits(shape, window, unit):
    whole = fed([165], window=window, **shape)
    q, k, v = qkv(165, shape.get("heads", 4), shape.get("kv_heads", 2), shape.get("dim", 16), BF16)
    want = dense(q, k, v, causal(165, 165, window), 0.25)
    assert (whole.double() - want).abs().max() < CLOSE
    assert want.abs().max() > 1
    for cuts, mates in (([1, 2, 33, 90, 165], ()), ([31, 32, 64, 164, 165], (7, 1)), ([100, 165], (40,))):
        assert torch.equal(fed(cuts, window=window, mates=mates, **shape), whole), (cuts, mates)
    assert torch.equal(fed([40, 165], window=window, exact=False, **shape), whole)


def test_blocks_that_begin_elsewhere_would_be_seen(unit):
    """The mutation: keys counted from another token give other bits, though the same numbers."""
    dim = 32 if unit == "matrix unit" else 16
    q, k, v = qkv(90, 4, 2, dim, BF16)
    table, lengths = torch.zeros(90, 1, dtype=torch.int32), torch.full((90,), 90, dtype=torch.int32)

    def attended(order):
        options = {"scale": 0.25, "window": None, "cap": 0.0}
        return calls.kernels().attend(q, k[order], v[order], table, lengths, 90, **options)

    right, moved = attended(torch.arange(90)), attended(torch.arange(90).roll(7))
    assert not torch.equal(moved, right)
    torch.testing.assert_close(moved, right, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("where", ["device", "host"])
def test_keys_below_a_device_give_the_bits_of_resident_ones(where):
    link = Link()
    assert torch.equal(
        fed([50, 51, 120], attend=where, link=link, mates=(3,)), fed([50, 51, 120], mates=(3,))
    )
    assert link.down, "nothing crossed the link"
    assert link.up


def test_a_branch_has_the_bits_of_its_path_alone():
    """Two branches that share a trunk, the trunk's last rows in the same pass."""
    q, k, v = qkv(60, 4, 2, 16, BF16)
    alone = fed_rows(cache(60), q, k, v, [0], [60], [0], None)
    kv = cache(100)
    rows = [*range(40), *range(40, 60), *range(40, 60)]
    forks = [None, Fork(40, 0), Fork(40, 20)]
    out = fed_rows(kv, q[rows], k[rows], v[rows], [0, 0, 0], [40, 20, 20], [0, 40, 40], forks)
    assert torch.equal(out[:40], alone[:40])
    assert torch.equal(out[40:60], alone[40:])
    assert torch.equal(out[60:], alone[40:])


def fed_rows(kv, q, k, v, ids, counts, starts, forks):
    """One pass; the branches are those that have a fork."""
    batch = packed(counts, starts)
    if forks:
        object.__setattr__(batch, "forked", frozenset(i for i, fork in enumerate(forks) if fork))
    view = kv.view(ids, batch.bounds, starts, forks)
    return attend(q, k, v, 0, batch, view, scale=0.25, window=None, exact=True)


@pytest.mark.parametrize("where", ["resident", "device"])
def test_a_row_of_a_tree_has_the_bits_of_its_path_alone(where):
    """Rows 0-1-3 and 0-2 hang on a past of 50 tokens."""
    q, k, v = qkv(54, 4, 2, 16, BF16)
    paths = {1: [0, 1], 2: [0, 2], 3: [0, 1, 3]}
    table = torch.eye(4, dtype=torch.bool)
    for row, path in paths.items():
        table[row, path] = True
    kv = cache(60, attend=where, link=Link())
    first = packed([50], [0])
    view = kv.view([0], first.bounds)
    attend(q[:50], k[:50], v[:50], 0, first, view, scale=0.25, window=None, exact=True)
    view.commit()
    batch = packed([4], [50], torch.tensor([50, 51, 51, 52]), ancestors=(table,))
    for window in (None, 2, 51):
        tree = attend(
            q[50:],
            k[50:],
            v[50:],
            0,
            batch,
            kv.view([0], batch.bounds),
            scale=0.25,
            window=window,
            exact=True,
        )
        for row, path in paths.items():
            rows = [*range(50), *(50 + at for at in path)]
            alone = packed([len(rows)], [0])
            straight = attend(
                q[rows],
                k[rows],
                v[rows],
                0,
                alone,
                cache(60).view([0], alone.bounds),
                scale=0.25,
                window=window,
                exact=True,
            )
            assert torch.equal(tree[row], straight[-1]), (window, row)
    wrong = packed([4], [50], torch.tensor([50, 51, 51, 52]), ancestors=(torch.ones(4, 4).tril().bool(),))
    seen = attend(
        q[50:], k[50:], v[50:], 0, wrong, kv.view([0], wrong.bounds), scale=0.25, window=None, exact=True
    )
    straight = attend(
        q[50:], k[50:], v[50:], 0, batch, kv.view([0], batch.bounds), scale=0.25, window=None, exact=True
    )
    assert not torch.equal(seen[2], straight[2]), "a sibling was not seen"


def test_other_pages_and_heads_go_to_other_drivers():
    for options, dtype in (({"dtype": "INT8"}, BF16), ({"dim": 8}, BF16), ({"dtype": "F32"}, torch.float32)):
        kv = cache(20, **options)
        q, k, v = qkv(20, 4, 2, options.get("dim", 16), dtype)
        batch = packed([20], [0])
        attend(q, k, v, 0, batch, kv.view([0], batch.bounds), scale=0.25, window=None, exact=True)
        (work,) = batch.memo.values()
        assert work.tiles is None
        assert work.blockwise


def test_gradients_go_through_torch(monkeypatch):
    monkeypatch.setattr(tiles, "attend_tiles", None)
    monkeypatch.setattr(attention, "attend_tiles", None)
    kv, batch = cache(20), packed([20], [0])
    q, k, v = (x.requires_grad_() for x in qkv(20, 4, 2, 16, BF16))
    attend(
        q, k, v, 0, batch, kv.view([0], batch.bounds), scale=0.25, window=None, exact=True
    ).sum().backward()
    assert q.grad.abs().sum() > 0


@pytest.mark.parametrize("branches", [False, True])
def test_plans_count_what_it_takes(branches):
    q, k, v = qkv(300, 4, 2, 32, BF16)
    kv = cache(400, dim=32)
    counts, starts, forks = [300], [0], None
    if branches:
        counts, starts, forks = [100, 100, 100], [0, 100, 100], [None, Fork(100, 0), Fork(100, 100)]
    fed_rows(kv, q, k, v, [0] * len(counts), counts, starts, forks)
    with torch.no_grad(), LiveBytes() as live:
        fed_rows(kv, q, k, v, [0] * len(counts), counts, starts, forks)
    sizes = AttentionSizes((1,), (256,), in_place=True)
    shape = {"kv_heads": 2, "sequences": len(counts), "sizes": sizes}
    stated = attention_workspace_bytes(300, 300, 4, 32, "BF16", True, **shape)
    assert stated < attention_workspace_bytes(300, 300, 4, 32, "BF16", True, **shape, kv_dtype="INT8")
    assert live.peak <= stated + arranged_bytes(300, 300, len(counts))
    assert live.peak >= stated / (1.2 if branches else 3)
