"""KV pages: no page has two owners, all come back, neighbours are preferred, and a shortage is told in numbers."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from zinfer.errors import BudgetError, InternalError
from zinfer.kvcache.pages import PAGE_TOKENS, PagePool, PageTables, Run, kv_cache_bytes, pages_for

NUM_PAGES = 24


def pages(runs):
    return [page for run in runs for page in range(run.start, run.stop)]


class Pages(RuleBasedStateMachine):
    """Random opening, growing and closing against lists of pages."""

    open_ids = Bundle("open_ids")

    def __init__(self):
        super().__init__()
        self.tables, self.owned, self.next_id = PageTables(NUM_PAGES), {}, 0

    @rule(target=open_ids, tokens=st.integers(1, NUM_PAGES * PAGE_TOKENS + 1))
    def open(self, tokens):
        free = NUM_PAGES - sum(len(owned) for owned in self.owned.values())
        try:
            table = self.tables.open(self.next_id, tokens)
        except BudgetError:
            assert pages_for(tokens) > free
            return multiple()
        assert pages_for(tokens) <= free
        self.owned[self.next_id] = pages(table.runs)
        assert len(self.owned[self.next_id]) == pages_for(tokens)
        self.next_id += 1
        return self.next_id - 1

    @rule(sequence_id=open_ids, tokens=st.integers(0, 12 * PAGE_TOKENS))
    def grow(self, sequence_id, tokens):
        before, free = self.owned[sequence_id], self.tables.pool.free_pages
        missing = max(pages_for(tokens) - len(before), 0)
        is_grown = self.tables.grow(sequence_id, tokens)
        after = pages(self.tables[sequence_id].runs)
        assert is_grown == (missing <= free)
        assert after[: len(before)] == before
        assert len(after) == len(before) + (missing if is_grown else 0)
        self.owned[sequence_id] = after

    @rule(sequence_id=consumes(open_ids))
    def close(self, sequence_id):
        self.tables.close(sequence_id)
        del self.owned[sequence_id]

    @rule(sequence_id=open_ids, low=st.integers(0, 400), count=st.integers(0, 400))
    def slots(self, sequence_id, low, count):
        owned = self.owned[sequence_id]
        high = min(low + count, len(owned) * PAGE_TOKENS)
        slots = [slot for part in self.tables[sequence_id].slots(low, high) for slot in part]
        assert slots == [owned[t // PAGE_TOKENS] * PAGE_TOKENS + t % PAGE_TOKENS for t in range(low, high)]
        assert self.tables[sequence_id].pages(pages_for(high)) == owned[: pages_for(high)]

    @invariant()
    def no_page_twice_and_none_lost(self):
        taken = [page for owned in self.owned.values() for page in owned]
        assert len(taken) == len(set(taken))
        assert self.tables.pool.free_pages == NUM_PAGES - len(taken)
        self.tables.check()


TestPages = Pages.TestCase


def test_sequences_that_grow_by_turns_stay_one_run_while_there_is_room():
    tables = PageTables(64)
    for id_ in range(3):
        tables.open(id_, 2 * PAGE_TOKENS)
    for tokens in range(2 * PAGE_TOKENS, 15 * PAGE_TOKENS, PAGE_TOKENS):
        assert all(tables.grow(id_, tokens) for id_ in range(3))
    assert [len(tables[id_].runs) for id_ in range(3)] == [1, 1, 1]


def test_every_page_is_used_before_a_shortage_is_told():
    tables = PageTables(20)
    for id_ in range(4):
        tables.open(id_, 1)
    assert all(tables.grow(id_, 5 * PAGE_TOKENS) for id_ in range(4))
    assert not tables.grow(0, 5 * PAGE_TOKENS + 1)
    tables.check()


def test_pages_behind_the_last_one_come_first_then_the_largest_run():
    pool = PagePool(30)
    first = pool.take(4)
    assert first == (Run(0, 4),)
    assert pool.take(2, after=4) == (Run(4, 2),)
    assert pool.take(2, after=2) == (Run(6 + 11, 2),)  # page 2 is taken: half of the room before stays free
    assert pool.take(13, after=6) == (Run(6, 11), Run(19 + 4, 2))


def test_all_pages_come_back_as_one_run():
    pool = PagePool(9)
    taken = [pool.take(3) for _ in range(3)]
    for runs in (taken[1], taken[0], taken[2]):
        pool.give_back(runs)
    assert pool.take(9) == (Run(0, 9),)


def test_a_shortage_is_told_in_numbers_and_changes_nothing():
    pool = PagePool(3)
    pool.take(1)
    with pytest.raises(BudgetError) as caught:
        pool.take(3)
    assert caught.value.code == "ZI-2501"
    assert "3 KV pages of 16 tokens" in caught.value.message
    assert "2 of 3 are free" in caught.value.message
    assert "32 tokens" in caught.value.remedy
    assert pool.free_pages == 2


def test_giving_back_twice_is_our_own_mistake():
    pool = PagePool(4)
    runs = pool.take(2)
    pool.give_back(runs)
    with pytest.raises(InternalError):
        pool.give_back(runs)


def test_an_id_is_opened_once():
    tables = PageTables(4)
    tables.open(1, 5)
    with pytest.raises(InternalError):
        tables.open(1, 5)


def test_the_balance_sees_a_page_with_two_owners():
    tables = PageTables(8)
    tables.open(1, 20)
    tables.open(2, 20)
    tables[2].runs = list(tables[1].runs)
    with pytest.raises(InternalError, match="overlap: True"):
        tables.check()


def test_what_is_not_open_cannot_be_closed():
    with pytest.raises(InternalError, match="not open"):
        PageTables(4).close(7)


def test_the_balance_sees_a_sequence_that_outgrew_its_pages():
    tables = PageTables(8)
    tables.open(1, 20).length = 33
    with pytest.raises(InternalError, match="longer than their pages"):
        tables.check()


def test_bytes():
    assert kv_cache_bytes(2, 4, 64, 3, "BF16") == 2 * 2 * 3 * 16 * 4 * 64 * 2
    assert kv_cache_bytes(1, 1, 1, 1, "F32") == 2 * 16 * 4
