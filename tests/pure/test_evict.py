"""Eviction policies on their own: fetches per pass equal theory, and Belady's equal the best there is."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zinfer.plan.evict import Belady, Lru, Pinned


def fetches(policy, uses, room):
    """How often a demand-filled memory of `room` equal places fetches, per use."""
    held, counts = set(), []
    for chunk in uses:
        counts.append(chunk not in held)
        if chunk not in held:
            if len(held) == room:
                held.remove(policy.victim(sorted(held)))
            held.add(chunk)
        policy.used(chunk)
    return counts


def fewest_fetches(uses, room):
    """By trying everything."""

    @cache
    def best(at, held):
        if at == len(uses):
            return 0
        if uses[at] in held:
            return best(at + 1, held)
        if len(held) < room:
            return 1 + best(at + 1, held | {uses[at]})
        return 1 + min(best(at + 1, held - {gone} | {uses[at]}) for gone in held)

    return best(0, frozenset())


@pytest.mark.parametrize(("num_chunks", "room"), [(12, 4), (20, 10), (7, 2), (5, 4), (9, 1)])
def test_a_cycle_costs_what_theory_says(num_chunks, room):
    order, passes = list(range(num_chunks)), num_chunks - 1
    steady = num_chunks * 5
    belady = fetches(Belady(order), order * (5 + passes), room)[steady:]
    lru = fetches(Lru(), order * (5 + passes), room)[steady:]
    assert sum(belady) == pytest.approx(passes * num_chunks * (num_chunks - room) / (num_chunks - 1), abs=1)
    assert sum(lru) == passes * num_chunks


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9), st.integers(1, 4), st.integers(1, 2))
def test_belady_is_never_beaten(order, room, passes):
    # Only the last pass may differ: Belady plans for a cycle that goes on, the best for one that ends.
    uses = order * passes
    slack = len(set(order))
    assert sum(fetches(Belady(order), uses, room)) <= fewest_fetches(tuple(uses), room) + slack
    assert sum(fetches(Belady(order), uses, room)) <= sum(fetches(Lru(), uses, room)) + slack


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(1, 4))
def test_belady_is_optimal_on_a_sequence_that_does_not_repeat(order, room):
    never_again = [*order, *range(100, 100 + room + 8)]  # what comes after the end is not what came before
    assert sum(fetches(Belady(never_again), order, room)) == fewest_fetches(tuple(order), room)


def test_the_farthest_next_use_goes():
    policy = Belady([0, 1, 2, 0, 3])
    policy.used(0)  # next: 1, 2, 0, 3, then 0 again
    assert policy.victim([1, 2, 3]) == 3
    assert policy.victim([0, 1, 2]) == 0
    assert policy.victim([1, 9]) == 9
    assert policy.victim([]) is None


def test_a_use_out_of_order_moves_the_position():
    policy = Belady([0, 1, 2, 3])
    policy.used(2)  # 0 and 1 were skipped
    assert policy.victim([0, 1, 3]) == 1
    policy.used(9)  # not in the order: no move
    assert policy.victim([0, 1, 3]) == 1


def test_the_oldest_use_goes():
    policy = Lru()
    for chunk in (3, 1, 2, 3):
        policy.used(chunk)
    assert policy.victim([1, 2, 3]) == 1
    assert policy.victim([2, 3, 7]) == 7
    assert policy.victim([]) is None


def test_a_pinned_set_names_no_victim():
    policy = Pinned()
    policy.used(0)
    assert policy.victim([0, 1]) is None
