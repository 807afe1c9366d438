"""Schedules, replayed: slots are never overdrawn, nothing computes before its fetch, the pass wraps around."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_tables import page_counts, table_of

from zinfer.chunks.table import PAGE
from zinfer.plan.place import Reserve, place, smallest_budget
from zinfer.plan.records import Budget, Compute, Evict, Fetch, FetchRows, Tier
from zinfer.plan.schedule import build_schedule, serial_schedule

LOOKAHEADS = st.integers(0, 3)


def replay(table, placement, steps, held):
    """Walk the steps from the chunks `held`; returns what is held at the end and how many chunks were fetched."""
    order = [chunk.id for chunk in table.streamable]
    computed, fetches, held, guests = [], 0, set(held), set()
    for step in steps:
        match step:
            case Fetch(chunk, as_guest):
                assert chunk not in held, "fetched twice"
                held.add(chunk)
                guests |= {chunk} if as_guest else set()
                fetches += bool(table.chunks[chunk].ops)
                streamed = [c for c in held if table.chunks[c].ops and not placement.resident(c)]
                assert len({*streamed, *guests}) <= placement.slots, "more chunks than slots"
            case Compute(chunk):
                assert chunk in held, "computed before its fetch"
                computed.append(chunk)
            case Evict(chunk):
                assert not placement.resident(chunk) or chunk in guests, "a resident chunk was dropped"
                held.remove(chunk)
                guests.discard(chunk)
    assert computed == order
    assert not guests, "a guest was left in its slot"
    return held, fetches


def placed(pages, lookahead, extra):
    table = table_of(pages, row_table_pages=2)
    smallest = smallest_budget(table, compute_tier=Tier.HOST, reserve=Reserve(), lookahead=lookahead)
    budget = Budget(host=smallest.host + extra * PAGE)
    return table, place(table, budget, compute_tier=Tier.HOST, reserve=Reserve(), lookahead=lookahead)


@pytest.mark.parametrize("build", [build_schedule, serial_schedule])
@given(pages=page_counts, lookahead=LOOKAHEADS, extra=st.integers(0, 300))
def test_any_schedule_can_be_carried_out(build, pages, lookahead, extra):
    table, placement = placed(pages, lookahead, extra)
    schedule = build(table, placement)
    assert schedule.first[0] == schedule.steady[0] == FetchRows()
    held, _ = replay(table, placement, schedule.first, set())
    num_streamed = sum(not placement.resident(chunk.id) for chunk in table.streamable)
    for _ in range(3):
        before = held
        held, fetches = replay(table, placement, schedule.steady, held)
        assert held == before
        assert fetches == num_streamed


@given(pages=page_counts, lookahead=st.integers(1, 3), extra=st.integers(0, 300))
def test_the_slots_hold_the_next_passes_first_chunks_at_the_end_of_every_pass(pages, lookahead, extra):
    table, placement = placed(pages, lookahead, extra)
    schedule = build_schedule(table, placement)
    held, _ = replay(table, placement, schedule.first, set())
    streamed = [chunk.id for chunk in table.streamable if not placement.resident(chunk.id)]
    resident = {chunk.id for chunk in table.chunks if placement.resident(chunk.id)}
    assert held == resident | set(streamed[: placement.slots])
    # A slot is handed on at once: between two steps of the steady pass at most one is empty.
    for step, after in pairwise(schedule.steady):
        assert not isinstance(step, Evict) or isinstance(after, Fetch)


@given(pages=page_counts, lookahead=LOOKAHEADS, extra=st.integers(0, 300))
def test_the_serial_twin_moves_nothing_while_something_computes(pages, lookahead, extra):
    table, placement = placed(pages, lookahead, extra)
    schedule = serial_schedule(table, placement)
    for steps in (schedule.first, schedule.steady):
        for step, after in pairwise(steps):
            assert (
                not isinstance(step, Fetch)
                or not table.chunks[step.chunk].ops
                or after == Compute(step.chunk)
            )


def test_the_first_pass_loads_resident_chunks_past_a_streamed_one_that_waits_for_a_slot():
    table = table_of([4] * 8)
    placement = place(table, Budget(host=20 * PAGE), compute_tier=Tier.HOST, reserve=Reserve())
    streamed = [i for i in range(8) if not placement.resident(i)]
    first = build_schedule(table, placement).first
    before_any_compute = {step.chunk for step in first[: first.index(Compute(0))]}
    assert before_any_compute == set(range(8)) - set(streamed[2:])


def test_the_first_pass_hands_slots_to_the_next_one_as_they_fall_free():
    table = table_of([4] * 12)
    placement = place(table, Budget(host=16 * PAGE), compute_tier=Tier.HOST, reserve=Reserve(), lookahead=2)
    first = build_schedule(table, placement).first
    assert placement.slots == 3
    last_computes = [at for at, step in enumerate(first) if isinstance(step, Compute)][-3:]
    wrapped = [at for at, step in enumerate(first) if step in [Fetch(chunk) for chunk in (0, 1, 2)]][-3:]
    assert wrapped[0] < last_computes[1] < wrapped[1] < last_computes[2] < wrapped[2]


def test_a_model_that_fits_is_fetched_once():
    table = table_of([4] * 5)
    placement = place(table, Budget(host=20 * PAGE), compute_tier=Tier.HOST, reserve=Reserve())
    schedule = build_schedule(table, placement)
    assert [step.chunk for step in schedule.first if isinstance(step, Fetch)] == [0, 1, 2, 3, 4]
    assert schedule.steady == tuple(Compute(i) for i in range(5))


@given(pages=page_counts, lookahead=st.integers(1, 3), extra=st.integers(0, 300), data=st.data())
def test_guests_pass_through_slots_first_and_come_to_stay_with_the_second_pass(pages, lookahead, extra, data):
    table, placement = placed(pages, lookahead, extra)
    fitting = [
        chunk.id
        for chunk in table.streamable
        if placement.slots and placement.resident(chunk.id) and chunk.nbytes <= placement.slot_bytes
    ]
    guests = data.draw(st.lists(st.sampled_from(fitting), unique=True)) if fitting else []
    plain = build_schedule(table, placement)
    schedule = build_schedule(table, replace(placement, guests=tuple(guests)))
    assert schedule.steady == plain.steady
    assert bool(schedule.second) is bool(guests)
    if not guests:
        assert schedule == plain
        return
    held, fetches = replay(table, placement, schedule.first, set())
    assert fetches == len(table.streamable) + min(
        placement.slots, sum(not placement.resident(chunk.id) for chunk in table.streamable)
    )
    assert not held & set(guests)
    held, fetches = replay(table, placement, schedule.second, held)
    assert held >= set(guests), "they have come to stay"
    assert fetches == len(guests) + sum(not placement.resident(chunk.id) for chunk in table.streamable)
    coming = Counter(step.chunk for step in schedule.second if isinstance(step, Fetch))
    assert all(coming[guest] == 1 for guest in guests)
    assert not any(step.as_guest for step in schedule.second if isinstance(step, Fetch))
    before = held
    assert replay(table, placement, schedule.steady, held)[0] == before


def test_a_guest_that_is_never_evicted_is_seen():
    table = table_of([4] * 8)
    placement = place(table, Budget(host=20 * PAGE), compute_tier=Tier.HOST, reserve=Reserve())
    stay = next(i for i in range(8) if placement.resident(i))
    schedule = build_schedule(table, replace(placement, guests=(stay,)))
    replay(table, placement, schedule.first, set())
    kept = [step for step in schedule.first if step != Evict(stay)]
    with pytest.raises(AssertionError, match=r"slots|left in its slot"):
        replay(table, placement, kept, set())


def test_guests_come_as_far_ahead_of_their_turn_as_anything_that_loads():
    """A second pass begins with the fetches of its window; it does not fetch one guest at a time."""
    table = table_of([4] * 12)
    placement = place(table, Budget(host=32 * PAGE), compute_tier=Tier.HOST, reserve=Reserve())
    guests = tuple(i for i in range(12) if placement.resident(i))
    second = build_schedule(table, replace(placement, guests=guests)).second
    before = [step.chunk for step in second[: second.index(Compute(0))] if isinstance(step, Fetch)]
    assert len(guests) > 2
    assert before == list(guests)
