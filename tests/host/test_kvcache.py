"""The paged slab: exact size, views without copies, block borders, scattered pages, and commits of some rows."""

import pytest
import torch

from zinfer.errors import BudgetError
from zinfer.kvcache.cache import PagedKv
from zinfer.kvcache.pages import PAGE_TOKENS, Fork, kv_cache_bytes
from zinfer.layers.packed import Span
from zinfer.spec.attention_cost import KV_BLOCK


def cache(num_pages=64, layers=2):
    return PagedKv(num_layers=layers, num_kv_heads=2, head_dim=4, num_pages=num_pages, dtype="F32")


def rows(count, first=0):
    """Rows that can be told apart, for keys; the values are their negatives."""
    return torch.arange(first * 8, (first + count) * 8, dtype=torch.float32).view(count, 2, 4)


def feed(kv, id_, count, first=0, keep=None):
    view = kv.view([id_], (0, count))
    for layer in range(kv.planes.tensors[0].shape[0]):
        view.stage(layer, rows(count, first) + layer, -rows(count, first) - layer)
    view.commit(None if keep is None else [keep])


def held(kv, id_, layer):
    blocks = kv.view([id_], (0, 0)).past(layer, 0)
    assert all(k.shape[0] == KV_BLOCK for k, _ in blocks[:-1])
    return torch.cat([k for k, _ in blocks]), torch.cat([v for _, v in blocks])


def span(view, layer, sequence, start, stop):
    return view.read(layer, view.locate([Span(sequence, start, stop)], stop - start))


def test_the_slab_is_allocated_once_and_exactly():
    kv = PagedKv(num_layers=3, num_kv_heads=2, head_dim=8, num_pages=5, dtype="BF16")
    assert kv.nbytes == kv.planes.tensors[0].untyped_storage().nbytes() == kv_cache_bytes(3, 2, 8, 5, "BF16")
    assert kv.capacity_tokens == 80


def test_what_was_fed_is_there_in_every_layer():
    kv = cache()
    kv.open(0, 600)
    feed(kv, 0, 100)
    feed(kv, 0, 1, first=100)
    feed(kv, 0, 499, first=101)
    assert kv.length(0) == 600
    for layer in (0, 1):
        keys, values = held(kv, 0, layer)
        assert torch.equal(keys, rows(600) + layer)
        assert torch.equal(values, -rows(600) - layer)


def test_neighbouring_pages_are_views_without_a_copy():
    kv = cache()
    kv.open(0, 600)
    feed(kv, 0, 600)
    view = kv.view([0], (0, 0))
    for k, v in [*view.past(1, 0), span(view, 1, 0, 0, 600), span(view, 1, 0, 37, 600)]:
        assert (
            k.untyped_storage().data_ptr()
            == v.untyped_storage().data_ptr()
            == kv.planes.tensors[0].data_ptr()
        )


def test_scattered_pages_read_the_same():
    kv = cache(num_pages=40)
    for id_ in range(4):
        kv.open(id_, 160)
    kv.close(0)
    kv.close(2)
    kv.open(9, 320)
    feed(kv, 9, 150)
    feed(kv, 9, 170, first=150)
    keys, values = held(kv, 9, 1)
    assert torch.equal(keys, rows(320) + 1)
    assert torch.equal(values, -rows(320) - 1)
    assert torch.equal(span(kv.view([9], (0, 0)), 0, 0, 100, 320)[0][0], rows(320)[100:])
    kv.close(9)
    kv.close(1)
    kv.close(3)
    kv.tables.check()
    assert kv.free_tokens == 640


@pytest.mark.parametrize("keep", [[], [0], [0, 1, 2], [3], [0, 2, 5], [1, 2, 3, 4, 5]])
def test_kept_rows_close_up_and_the_rest_is_forgotten(keep):
    kv = cache(num_pages=4)
    kv.open(1, 16)
    kv.open(2, 16)
    kv.open(0, 32)
    kv.close(1)  # sequence 0 does not lie at the slab's start
    feed(kv, 0, 13)
    feed(kv, 2, 7, first=500)
    feed(kv, 0, 6, first=100, keep=keep)
    feed(kv, 0, 2, first=200)
    for layer in (0, 1):
        want = torch.cat([rows(13), rows(6, 100)[keep], rows(2, 200)]) + layer
        keys, values = held(kv, 0, layer)
        assert torch.equal(keys, want)
        assert torch.equal(values, -want)
        assert torch.equal(held(kv, 2, layer)[0], rows(7, 500) + layer)


def test_staged_rows_count_only_once_committed():
    kv = cache()
    kv.open(0, 20)
    feed(kv, 0, 4)
    view = kv.view([0], (0, 3))
    view.stage(0, rows(3, 50), rows(3, 50))
    assert sum(k.shape[0] for k, _ in view.past(0, 0)) == 4
    assert torch.equal(span(view, 0, 0, 0, 7)[0][0], torch.cat([rows(4), rows(3, 50)]))
    again = kv.view([0], (0, 1))  # the view before was dropped: nothing happened
    again.stage(0, rows(1, 70), rows(1, 70))
    again.commit()
    assert torch.equal(held(kv, 0, 0)[0], torch.cat([rows(4), rows(1, 70)]))


def test_a_batch_stages_each_sequence_in_its_place():
    kv = cache(layers=1)
    for id_ in (5, 3):
        kv.open(id_, 40)
    feed(kv, 5, 2)
    view = kv.view([3, 5], (0, 3, 4))
    view.stage(0, rows(4, 10), rows(4, 10))
    view.commit([None, []])
    assert torch.equal(held(kv, 3, 0)[0], rows(3, 10))
    assert torch.equal(held(kv, 5, 0)[0], rows(2))


def test_several_sequences_are_read_together_filled_up_with_their_last_rows():
    kv = cache(num_pages=8)
    for id_, count in ((1, 20), (2, 5)):
        kv.open(id_, count)
        feed(kv, id_, count, first=100 * id_)
    view = kv.view([2, 1], (0, 0, 0))
    keys, values = view.read(1, view.locate([Span(0, 0, 5), Span(1, 8, 20)], 12))
    want = torch.stack([torch.cat([rows(5, 200), rows(1, 204).expand(7, -1, -1)]), rows(12, 108)]) + 1
    assert torch.equal(keys, want)
    assert torch.equal(values, -want)


def test_outgrowing_its_pages_is_refused():
    kv = cache()
    kv.open(0, 5)
    feed(kv, 0, 4)
    with pytest.raises(BudgetError, match="pages for 16 tokens holds 4 and was given 13"):
        kv.view([0], (0, 13))
    assert kv.grow(0, 17)
    kv.view([0], (0, 13))


def test_growth_on_demand_keeps_what_is_there():
    kv = cache(num_pages=8)
    for id_ in (0, 1):
        kv.open(id_, 1)
    for step in range(60):
        for id_ in (0, 1):
            assert kv.grow(id_, step + 1)
            feed(kv, id_, 1, first=1000 * id_ + step)
    for id_ in (0, 1):
        assert torch.equal(held(kv, id_, 1)[0], rows(60, 1000 * id_) + 1)
    assert kv.free_tokens == 0
    assert not kv.grow(0, 65)
    kv.close(1)
    assert kv.free_tokens == 64
    assert kv.grow(0, 65)
    kv.check()


def test_room_is_told_before_it_is_asked_for():
    kv = cache(num_pages=3)
    assert kv.free_tokens == kv.capacity_tokens == 48
    kv.open(0, 17)
    assert (kv.free_tokens, kv.capacity_tokens) == (16, 48)
    assert not kv.grow(0, 49)
    assert kv.free_tokens == 16
    assert kv.grow(0, 48)
    assert kv.free_tokens == 0


def test_page_tables_lead_to_the_rows_in_place():
    """Two sequences that grew by turns: through table and planes come the rows that `read` gathers."""
    kv = cache(num_pages=40)
    for id_ in (0, 1):
        kv.open(id_, 16)
    for first in range(0, 300, 50):
        for id_ in (0, 1):
            kv.grow(id_, first + 50)
            feed(kv, id_, 50, first=1000 * id_ + first)
    view = kv.view([1, 0], (0, 3, 4))
    pages = view.pages([0, 1])
    assert pages.lengths.tolist() == [303, 301]
    assert (pages.longest, pages.page_tokens, pages.table.dtype) == (303, 16, torch.int32)
    assert pages.table.shape == (2, 19)
    (plane,) = view.planes(1)
    for sequence in (0, 1):
        at = torch.arange(300)
        slots = pages.table[sequence, at // 16].long() * 16 + at % 16
        k, v = span(view, 1, sequence, 0, 300)
        assert torch.equal(plane[0, slots], k[0])
        assert torch.equal(plane[1, slots], v[0])
    assert view.pages([1]).lengths.tolist() == [301]


@pytest.mark.parametrize("attend", ["resident", "host", "device"])
def test_pages_are_offered_unless_their_rows_come_up(attend):
    kv = PagedKv(num_layers=1, num_kv_heads=2, head_dim=4, num_pages=4, dtype="F32", attend=attend)
    kv.open(0, 40)
    view = kv.view([0, 0], (0, 2, 5), [20, 20], [None, Fork(20, 3)])
    assert view.is_resident == (attend == "resident")
    if attend == "device":
        assert view.pages([0]) is None
        return
    pages = view.pages([0])
    assert (pages.table.tolist(), pages.lengths.tolist(), pages.page_tokens) == ([[0, 1]], [22], PAGE_TOKENS)
    both = view.pages([0, 1])
    assert (both.lengths.tolist(), both.page_tokens) == ([22, 23], 1)
    assert both.table[0, :22].tolist() == list(range(22))
    assert both.table[1].tolist() == [*range(20), 23, 24, 25]
