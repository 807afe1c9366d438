"""Attention against a dense mask: windows, groups, trees, cuts into passes; and bits that depend on the row alone."""

from dataclasses import replace

import pytest
import torch
from dense_attention import WORDS, causal, dense, packed, qkv

from zinfer.kvcache.cache import PagedKv
from zinfer.layers import attention, stacks
from zinfer.layers import shapes as shapes_module
from zinfer.layers.attention import attend
from zinfer.layers.partial import Partial, partial
from zinfer.layers.shapes import agreeing_shapes
from zinfer.runtime.live_bytes import LiveBytes
from zinfer.spec.attention_cost import KV_BLOCK, STACK_BYTES, arranged_bytes, attention_workspace_bytes


def fed(cuts, *, heads=4, kv_heads=2, dim=16, window=None, exact=True, dtype=torch.float32, mates=()):
    """Outputs of one sequence fed in passes that end at `cuts`, with sequences of `mates` tokens beside it."""
    q, k, v = qkv(cuts[-1], heads, kv_heads, dim, dtype)
    kv = PagedKv(num_layers=1, num_kv_heads=kv_heads, head_dim=dim, num_pages=200, dtype=WORDS[dtype])
    kv.open(0, cuts[-1])
    outputs, start = [], 0
    for number, stop in enumerate(cuts):
        others = [qkv(count, heads, kv_heads, dim, dtype) for count in mates]
        ids = [*range(100 * number + 1, 100 * number + 1 + len(mates)), 0]
        for id_, count in zip(ids[:-1], mates, strict=True):
            kv.open(id_, count)
        batch = packed([*mates, stop - start], [0] * len(mates) + [start])
        parts = [*others, (q[start:stop], k[start:stop], v[start:stop])]
        rows = [torch.cat([part[i] for part in parts]) for i in range(3)]
        view = kv.view(ids, batch.bounds)
        out = attend(*rows, 0, batch, view, scale=0.25, window=window, exact=exact)
        view.commit()
        outputs.append(out[batch.bounds[-2] :])
        for id_ in ids[:-1]:
            kv.close(id_)
        start = stop
    return torch.cat(outputs)


CUTS = [[5], [300], [1, 2, 3], [250, 256, 257, 300], [256, 512, 513], [100, 400, 401, 402, 530]]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("window", [None, 3, 260])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_agrees_with_a_dense_mask(cuts, window, exact):
    q, k, v = qkv(cuts[-1])
    want = dense(q, k, v, causal(cuts[-1], cuts[-1], window), 0.25)
    torch.testing.assert_close(fed(cuts, window=window, exact=exact).double(), want, atol=1e-5, rtol=0)


def test_a_window_off_by_one_would_be_seen():
    q, k, v = qkv(300)
    wrong = dense(q, k, v, causal(300, 300, 99), 0.25)
    assert (fed([100, 300], window=100).double() - wrong).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dtype"),
    [
        (4, 4, 8, torch.float32),
        (8, 1, 64, torch.float32),
        (6, 2, 12, torch.bfloat16),
        (8, 1, 64, torch.bfloat16),
        (3, 3, 80, torch.float16),
    ],
)
def test_exact_bits_depend_on_the_row_alone(heads, kv_heads, dim, dtype):
    shape = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "dtype": dtype}
    whole = fed([530], **shape)
    assert torch.equal(fed([255, 256, 257, 258, 300, 512, 513, 530], **shape), whole)
    assert torch.equal(fed([3, 40, 529, 530], mates=(7, 300, 1), **shape), whole)
    windowed = fed([530], window=290, **shape)
    assert torch.equal(fed([100, 300, 529, 530], window=290, **shape), windowed)
    assert not torch.equal(windowed, whole)


def test_moving_the_block_borders_would_be_seen(monkeypatch):
    whole = fed([530])
    monkeypatch.setattr("zinfer.layers.stacks.KV_BLOCK", KV_BLOCK // 2)
    moved = fed([530])
    assert not torch.equal(moved, whole)
    torch.testing.assert_close(moved, whole, atol=1e-5, rtol=0)


def random_tree(count, draw):
    """Parents (-1: the past), depths and the ancestor table of a random tree."""
    parents = [-1] + [int(torch.randint(-1, i, (), generator=draw)) for i in range(1, count)]
    table, depths = torch.eye(count, dtype=torch.bool), []
    for row, parent in enumerate(parents):
        depths.append(0 if parent < 0 else depths[parent] + 1)
        if parent >= 0:
            table[row] |= table[parent]
    return parents, depths, table


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("window", [None, 4, 260])
@pytest.mark.parametrize("seed", range(4))
def test_random_trees_with_rejection(seed, window, exact):
    """Stage a tree, keep one path of it, go on: as if the path alone had ever been fed."""
    draw = torch.Generator().manual_seed(seed)
    kv = PagedKv(num_layers=2, num_kv_heads=2, head_dim=16, num_pages=40, dtype="F32")
    kv.open(9, 4)  # a short sequence that takes the first page, so that ours do not begin at slot 0
    kv.open(0, 420)
    past = 253
    _, k, v = qkv(past)
    view = kv.view([0], (0, past))
    for layer in (0, 1):
        view.stage(layer, k, v * (1 - 2 * layer))
    view.commit()
    for round_ in range(3):
        count = 12
        parents, depths, table = random_tree(count, draw)
        tree_q, tree_k, tree_v = qkv(count + 100 * round_ + 1000 * seed)
        tree_q, tree_k, tree_v = tree_q[-count:], tree_k[-count:], tree_v[-count:]
        positions = torch.tensor(depths) + past
        batch = packed([count], [past], positions, ancestors=(table,))
        view = kv.view([0], batch.bounds)
        all_k, all_v = torch.cat([k, tree_k]), torch.cat([v, tree_v])
        mask = torch.cat([torch.ones(count, past, dtype=torch.bool), table], 1)
        if window:
            key_positions = torch.cat([torch.arange(past), positions])
            mask &= key_positions > positions[:, None] - window
        want = dense(tree_q, all_k, all_v, mask, 0.25)
        for layer, sign in ((0, 1), (1, -1)):
            got = attend(
                tree_q, tree_k, tree_v * sign, layer, batch, view, scale=0.25, window=window, exact=exact
            )
            torch.testing.assert_close(got.double(), want * sign, atol=1e-5, rtol=0)
        leaf = int(torch.randint(0, count, (), generator=draw))
        path = []
        while leaf >= 0:
            path.append(leaf)
            leaf = parents[leaf]
        path.reverse()
        view.commit([path])
        k, v = torch.cat([k, tree_k[path]]), torch.cat([v, tree_v[path]])
        past += len(path)
        assert kv.length(0) == past
        assert torch.equal(torch.cat([block[0] for block in kv.view([0], (0, 0)).past(0, 0)]), k)
    got_v = torch.cat([block[1] for block in kv.view([0], (0, 0)).past(1, 0)])
    assert torch.equal(got_v, -v)  # every layer was compacted


def test_keeping_the_wrong_rows_would_be_seen():
    kv = PagedKv(num_layers=1, num_kv_heads=1, head_dim=4, num_pages=2, dtype="F32")
    kv.open(0, 8)
    rows = torch.arange(16.0).view(4, 1, 4)
    view = kv.view([0], (0, 4))
    view.stage(0, rows, rows)
    view.commit([[0, 2, 3]])
    (kept, _) = kv.view([0], (0, 0)).past(0, 0)[0]
    assert torch.equal(kept, rows[[0, 2, 3]])
    assert not torch.equal(kept, rows[[0, 1, 2]])


@pytest.mark.parametrize("exact", [True, False])
def test_gradients_are_those_of_the_dense_form(exact):
    q, k, v = (x.requires_grad_() for x in qkv(270))
    batch = packed([270], [0])
    kv = PagedKv(num_layers=1, num_kv_heads=2, head_dim=16, num_pages=20, dtype="F32")
    kv.open(0, 270)
    out = attend(q, k, v, 0, batch, kv.view([0], batch.bounds), scale=0.25, window=None, exact=exact)
    target = torch.randn(out.shape)
    grads = torch.autograd.grad((out * target).sum(), (q, k, v))
    want = torch.autograd.grad((dense(q, k, v, causal(270, 270), 0.25) * target).sum(), (q, k, v))
    for got, wanted in zip(grads, want, strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("past", "rows", "heads", "kv_heads", "sequences"),
    [(0, 300, 4, 2, 1), (700, 1, 8, 2, 1), (300, 150, 4, 4, 1), (90, 1, 8, 2, 100), (20, 3, 4, 1, 40)],
)
def test_workspace_stays_below_its_bound(past, rows, heads, kv_heads, sequences, dtype, exact, torch_kernels):
    dim, ids = 32, list(range(sequences))
    total = past + rows
    agreeing_shapes(kv_heads, heads // kv_heads, dim, "cpu", torch.get_num_threads())  # a self-test, once
    shape = {"num_layers": 1, "num_kv_heads": kv_heads, "head_dim": dim, "dtype": WORDS[dtype]}
    kv = PagedKv(**shape, num_pages=100 * sequences)
    for id_ in ids:
        kv.open(id_, total)
    for start, stop in [(0, past), (past, total)] if past else [(0, total)]:
        count = stop - start
        q, k, v = qkv(count * sequences, heads, kv_heads, dim, dtype)
        batch = packed([count] * sequences, [start] * sequences)
        view = kv.view(ids, batch.bounds)
        with torch.no_grad(), LiveBytes() as live:
            attend(q, k, v, 0, batch, view, scale=0.2, window=None, exact=exact)
        view.commit()
    bound = attention_workspace_bytes(
        rows * sequences,
        total,
        heads,
        dim,
        WORDS[dtype],
        exact,
        kv_heads=kv_heads,
        sequences=sequences,
    )
    bound += arranged_bytes(rows * sequences, total, sequences)
    assert live.peak <= bound
    if exact and total > 64:  # short keys may be cut shorter than a block, which the bound does not count on
        assert live.peak >= 0.35 * bound  # a bound that is never near is no bound


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kv_word", ["BF16", "INT8"])
def test_stacks_come_near_their_bound(kv_word, exact, torch_kernels):
    """Pieces of a few rows of many sequences fill a call; where not exact, what is gathered has its part of it."""
    past, rows, sequences, dim = 250, 3, 24, 64
    kv = PagedKv(num_layers=1, num_kv_heads=2, head_dim=dim, num_pages=17 * sequences, dtype=kv_word)
    ids = list(range(sequences))
    for count in (past, rows):
        q, k, v = qkv(count * sequences, 4, 2, dim, torch.bfloat16)
        for id_ in ids:
            kv.grow(id_, past + rows) if id_ in kv.tables else kv.open(id_, past + rows)
        batch = packed([count] * sequences, [kv.length(id_) for id_ in ids])
        view = kv.view(ids, batch.bounds)
        with torch.no_grad(), LiveBytes() as live:
            attend(q, k, v, 0, batch, view, scale=0.2, window=None, exact=exact)
        view.commit()
    (work,) = batch.memo.values()
    most = max(stack.num_pieces for stack in work.blockwise)
    assert most > 4
    shape = {"kv_heads": 2, "sequences": sequences, "kv_dtype": kv_word}
    stated = attention_workspace_bytes(rows * sequences, past + rows, 4, dim, "BF16", exact, **shape)
    stated += arranged_bytes(rows * sequences, past + rows, sequences)
    assert live.peak <= stated
    if (
        exact or kv_word != "INT8"
    ):  # int8 pages of single rows, which come as fp32 first, may take more than stacks
        assert stated <= 1.3 * live.peak
    assert exact or live.peak <= 1.1 * STACK_BYTES + arranged_bytes(rows * sequences, past, sequences)


def decoded(lengths, *, exact, window=None, twin=False, dtype=torch.bfloat16):
    """One new row after `lengths` tokens of each sequence; the twin goes sequence by sequence, over whole blocks."""
    heads, kv_heads, dim = 6, 2, 32
    shape = {"num_layers": 1, "num_kv_heads": kv_heads, "head_dim": dim, "dtype": WORDS[dtype]}
    kv = PagedKv(**shape, num_pages=sum(length // 16 + 1 for length in lengths))
    for id_, length in enumerate(lengths):
        kv.open(id_, length + 1)
        _, k, v = qkv(length, heads, kv_heads, dim, dtype)
        view = kv.view([id_], (0, length))
        view.stage(0, k, v)
        view.commit()
    q, k, v = (rows.requires_grad_(twin) for rows in qkv(len(lengths), heads, kv_heads, dim, dtype))
    batch = packed([1] * len(lengths), lengths)
    view = kv.view(range(len(lengths)), batch.bounds)
    out = attend(q, k, v, 0, batch, view, scale=0.2, window=window, exact=exact)
    (work,) = batch.memo.values() or (None,)
    return out.detach(), work


MANY = [100 + i % 9 for i in range(40)] + [3, 31, 32, 33, 255, 256, 257, 300, 511, 512, 600]


@pytest.mark.parametrize("window", [None, 50, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stacked_sequences_have_the_bits_of_the_twin(window, dtype, torch_kernels):
    stacked, work = decoded(MANY, exact=True, window=window, dtype=dtype)
    twin, _ = decoded(MANY, exact=True, window=window, twin=True, dtype=dtype)
    assert torch.equal(stacked, twin)
    assert max(stack.num_pieces for stack in work.blockwise) > 8, "nothing was stacked"


@pytest.mark.parametrize("window", [None, 50])
def test_fused_stacks_agree_with_the_exact_form(window, torch_kernels):
    fused, work = decoded(MANY, exact=False, window=window)
    exact, _ = decoded(MANY, exact=True, window=window)
    torch.testing.assert_close(fused, exact, atol=2e-2, rtol=2e-2)
    assert max(stack.num_pieces for stack in work.decodes) > 8
    assert not work.blockwise


def test_a_key_hidden_from_the_wrong_row_would_be_seen(monkeypatch, torch_kernels):
    right, _ = decoded(MANY, exact=True)
    plain = stacks._block

    def off_by_one(kv, pieces, rows, keys):
        block = plain(kv, pieces, rows, keys)
        hidden = None if block.hidden_SRn is None else block.hidden_SRn.roll(1, -1)
        return stacks.Block(block.place, hidden)

    monkeypatch.setattr(stacks, "_block", off_by_one)
    wrong, _ = decoded(MANY, exact=True)
    assert not torch.equal(wrong, right)


def test_where_stacking_changes_bits_nothing_is_stacked(monkeypatch, torch_kernels):
    shapes = agreeing_shapes(2, 3, 32, "cpu", torch.get_num_threads())
    alone = replace(shapes, keys=(KV_BLOCK,), is_stackable=False)
    monkeypatch.setattr(attention, "agreeing_shapes", lambda *_: alone)
    single, work = decoded(MANY, exact=True)
    assert {stack.num_pieces for stack in work.blockwise} == {1}
    monkeypatch.undo()
    assert torch.equal(single, decoded(MANY, exact=True)[0])


def test_the_self_test_sees_a_shape_that_disagrees(monkeypatch):
    """A library whose sums differ with the number of keys, or of sequences, in the last bit."""
    plain = torch.bmm
    for is_odd, keys, is_stackable in [
        (lambda q, k: k.shape[-1] == 64, None, True),
        (lambda q, k: q.shape[0] > 4, True, False),
    ]:

        def bmm(q, k, is_odd=is_odd):
            out = plain(q, k)
            return out * (1 + 2**-20) if is_odd(q, k) and k.shape[1] == 64 else out

        monkeypatch.setattr(torch, "bmm", bmm)
        monkeypatch.setattr(shapes_module, "remembered", lambda _question, _is_answer, find: find())
        shapes = agreeing_shapes.__wrapped__(2, 2, 64, "cpu", 1)
        monkeypatch.undo()
        assert KV_BLOCK in shapes.keys
        assert shapes.is_stackable == is_stackable
        assert (64 in shapes.keys) == bool(keys)
        assert shapes.at_once(1, 64) > 1 if is_stackable else shapes.at_once(1, 64) == 1


def test_what_was_remembered_of_shapes_is_believed_only_if_it_can_be_meant():
    found = shapes_module._find(2, 2, 64, "cpu")
    assert shapes_module._is_answer(found)
    rows, keys, _ = found
    for answer in (
        [],
        [rows, keys],
        [[], keys, True],
        [[3], keys, True],
        [rows, keys[:-1], True],
        [rows, keys, 1],
    ):
        assert not shapes_module._is_answer(answer)


def test_partials_merge_in_any_grouping_to_the_whole():
    draw = torch.Generator().manual_seed(3)
    q = torch.randn(4, 6, 16, generator=draw)
    k, v = torch.randn(2, 4, 90, 16, generator=draw)
    whole = partial(q, k, v).result()
    a, b, c = (partial(q, k[:, part], v[:, part]) for part in (slice(0, 10), slice(10, 50), slice(50, 90)))
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c))):
        torch.testing.assert_close(merged.result(), whole, atol=1e-6, rtol=1e-5)
    nothing = partial(q, k, v, torch.ones(2, 3, 90, dtype=torch.bool))
    for merged in (a.merge(nothing), nothing.merge(a)):
        assert torch.equal(merged.result(), a.result())
    lost = Partial(b.total, b.weight, a.top)
    assert not torch.allclose(a.merge(lost).result(), a.merge(b).result())


def prompts_of(lengths, monkeypatch=None, at_most=None, dtype=torch.bfloat16):
    """Whole prompts attended in one call of `attend`; the runs that went together."""
    if at_most is not None:
        monkeypatch.setattr(attention, "PROMPT_ROWS", at_most)
    heads, kv_heads, dim = 8, 2, 32
    shape = {"num_layers": 1, "num_kv_heads": kv_heads, "head_dim": dim, "dtype": WORDS[dtype]}
    kv = PagedKv(**shape, num_pages=sum(length // 16 + 1 for length in lengths))
    for id_, length in enumerate(lengths):
        kv.open(id_, length)
    batch = packed(lengths, [0] * len(lengths))
    q, k, v = qkv(sum(lengths), heads, kv_heads, dim, dtype)
    out = attend(
        q, k, v, 0, batch, kv.view(range(len(lengths)), batch.bounds), scale=0.2, window=None, exact=False
    )
    (work,) = batch.memo.values()
    return out, [len(run) for run in work.prompts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_of_one_length_attend_together_with_the_bits_of_each_alone(
    monkeypatch, dtype, torch_kernels
):
    lengths = [16] * 11 + [17, 17, 1, 1, 16, 130, 130]
    together, runs = prompts_of(lengths, dtype=dtype)
    assert runs == [8, 3, 2, 2, 1, 1, 1], "at most 128 rows, one length, neighbours"
    alone, runs = prompts_of(lengths, monkeypatch, at_most=0, dtype=dtype)
    assert runs == [1] * len(lengths)
    assert torch.equal(together, alone)


def test_prompts_that_see_each_other_would_be_seen(monkeypatch, torch_kernels):
    alone, _ = prompts_of([16] * 8, monkeypatch, at_most=0)
    monkeypatch.undo()
    plain = attention._fused
    monkeypatch.setattr(attention, "_fused", lambda q, k, v, scale, num=1: plain(q, k, v, scale))
    joined, runs = prompts_of([16] * 8)
    assert runs == [8]
    assert not torch.equal(joined, alone)
