"""What a scheduler says of itself: counts since the start, percentiles and busy share of the last seconds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zinfer.students.tally import WINDOW_S, Tally, percentile

NOTHING = {"queue_texts": 0, "queue_tokens": 0, "num_students": 1, "rejected": 0}


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1))
def test_a_percentile_is_a_value_that_enough_do_not_exceed(values, share):
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values)
    assert sum(value < found for value in values) < share * len(values)


def test_no_values_have_no_percentile():
    assert percentile([], 0.5) is None


@pytest.fixture
def now():
    return [100.0]


@pytest.fixture
def tally(now):
    return Tally(workers=2, clock=lambda: now[0])


def test_before_anything_has_happened(tally):
    stats = tally.stats(**NOTHING)
    assert (stats.passes, stats.rows, stats.answers, stats.busy_share) == (0, 0, {}, 0.0)
    assert stats.queue_p50_s is stats.service_p99_s is None


def test_passes_are_counted_by_students(tally, now):
    tally.add(3, 40, [0.1, 0.2, 0.3], (100.0, 101.0), is_failed=False)
    tally.add(1, 9, [0.4], (101.0, 101.5), is_failed=False)
    tally.add(3, 7, [0.5], (101.5, 102.0), is_failed=False)
    tally.add(3, 5, [9.9, 9.9], (102.0, 103.0), is_failed=True)
    now[0] = 104.0
    stats = tally.stats(queue_texts=2, queue_tokens=30, num_students=1, rejected=4)
    assert stats.answers == {1: 1, 3: 4}
    assert (stats.passes, stats.rows, stats.failed) == (4, 61, 2)
    assert (stats.queue_texts, stats.queue_tokens, stats.rejected, stats.num_students) == (2, 30, 4, 1)
    assert stats.busy_share == pytest.approx(3.0 / (4.0 * 2)), "two workers, four seconds"
    assert stats.queue_p50_s == pytest.approx(0.3), "what failed has no latency"
    assert stats.queue_p99_s == pytest.approx(0.5)
    assert stats.service_p99_s == pytest.approx(1.0)


def test_the_window_forgets_and_the_counts_do_not(tally, now):
    tally.add(2, 10, [5.0], (100.0, 101.0), is_failed=False)
    now[0] = 101.0 + WINDOW_S + 1
    tally.add(1, 10, [0.25], (now[0] - 0.5, now[0]), is_failed=False)
    stats = tally.stats(**NOTHING)
    assert stats.answers == {1: 1, 2: 1}
    assert stats.queue_p99_s == 0.25
    assert stats.busy_share == pytest.approx(0.5 / (2 * WINDOW_S))


def test_a_pass_that_began_before_the_window_counts_for_its_part_in_it(tally, now):
    now[0] = 100.0 + WINDOW_S + 10
    tally.add(1, 1, [0.0], (100.0, 100.0 + 20.0), is_failed=False)
    assert tally.stats(**NOTHING).busy_share == pytest.approx(10.0 / (2 * WINDOW_S))


def test_a_frozen_copy_does_not_change(tally, now):
    tally.add(1, 5, [0.1], (100.0, 100.5), is_failed=False)
    now[0] = 101.0
    held = tally.frozen()
    before = held.stats(**NOTHING)
    tally.add(1, 5, [0.7], (100.5, 100.9), is_failed=False)
    tally.add(2, 5, [0.7], (100.5, 100.9), is_failed=True)
    assert held.stats(**NOTHING) == before
    assert tally.stats(**NOTHING).answers == {1: 2}
