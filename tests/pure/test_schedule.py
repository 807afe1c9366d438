"""Schedules, replayed: slots are never overdrawn, nothing computes before its fetch, the pass wraps around."""

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
    computed, fetches, held = [], 0, set(held)
    for step in steps:
        match step:
            case Fetch(chunk):
                assert chunk not in held, "fetched twice"
                held.add(chunk)
                fetches += bool(table.chunks[chunk].ops)
                streamed = [c for c in held if table.chunks[c].ops and not placement.resident(c)]
                assert len(streamed) <= placement.slots, "more chunks than slots"
            case Compute(chunk):
                assert chunk in held, "computed before its fetch"
                computed.append(chunk)
            case Evict(chunk):
                assert not placement.resident(chunk), "a resident chunk was dropped"
                held.remove(chunk)
    assert computed == order
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
