"""The load controller: where it may choose, when it changes its mind, and a burst on a simulated clock."""

import heapq
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from zinfer.errors import BudgetError
from zinfer.students.controller import (
    LEAST_ROOM,
    PASS_SHARE,
    RAISE_S,
    SHARE,
    Controller,
    ServiceTable,
    isotonic,
)
from zinfer.students.intake import Intake, Overloaded
from zinfer.students.tally import percentile

TOKENS = (16, 64, 256, 1024)
# Like two-layer students of width 384 on one core: a pass costs a little, a token and a student what they compute.
TABLE = isotonic(TOKENS, [[0.0008 + m * (0.0004 + 18e-6 * n) for n in TOKENS] for m in range(1, 5)])
OBJECTIVE_S = 0.1
seconds = st.floats(1e-5, 0.5)
tables = st.integers(1, 5).flatmap(
    lambda count: st.lists(st.lists(seconds, min_size=4, max_size=4), min_size=count, max_size=count)
)


@given(tables)
def test_a_table_never_falls_and_keeps_what_is_in_order(measured):
    table = isotonic(TOKENS, measured)
    for m in range(1, table.num_students + 1):
        row = [table.at(m, n) for n in (1, 16, 40, 64, 65, 300, 1024, 5000)]
        assert row == sorted(row)
        if m > 1:
            assert all(table.at(m, n) >= table.at(m - 1, n) for n in (1, 50, 2000))
    again = isotonic(TOKENS, table.seconds)
    assert all(
        one == pytest.approx(two, abs=1e-15) for one, two in zip(table.seconds, again.seconds, strict=True)
    )
    low, high = min(map(min, measured)), max(map(max, measured))
    assert all(low <= one <= high for row in table.seconds for one in row)


def test_between_points_a_table_is_linear():
    table = ServiceTable((10, 20), ((1.0, 3.0),))
    assert [table.at(1, n) for n in (5, 10, 15, 20, 30)] == [1.0, 1.0, 2.0, 3.0, 4.5]
    assert [table.tokens_within(1, s, 100) for s in (0.5, 1.0, 2.0, 3.0, 99.0)] == [1, 10, 15, 20, 100]
    alone = ServiceTable((10,), ((1.0,),))
    assert [alone.at(1, n) for n in (5, 10, 30)] == [1.0, 1.0, 3.0]


@given(
    tables,
    st.floats(0.001, 1.0),
    st.integers(0, 20_000),
    st.integers(0, 20_000),
    st.floats(0, 1),
    st.floats(0, 1e6),
    st.integers(1, 5),
)
def test_the_choice_lies_in_its_range_and_never_grows_with_what_waits(
    measured, objective_s, few, many, age_s, rate, least
):
    table = isotonic(TOKENS, measured)
    least = min(least, table.num_students)
    controller = Controller(table, objective_s, pass_tokens=1024, least=least)
    few, many = sorted((few, many))
    chosen = controller.largest(few, age_s, rate)
    assert least <= chosen <= table.num_students
    assert controller.largest(many, age_s, rate) <= chosen
    assert controller.largest(few, age_s + 0.1, rate) <= chosen
    assert controller.largest(few, age_s, 2 * rate) <= chosen
    assert chosen == least or controller.fits(chosen, few, age_s, rate)
    assert chosen == table.num_students or not controller.fits(chosen + 1, few, age_s, rate)


class ControllerMachine(RuleBasedStateMachine):
    """Whatever comes, whenever it is asked: lower at once, higher only after a second, by one."""

    @initialize(least=st.integers(1, 3))
    def open(self, least):
        self.controller = Controller(TABLE, OBJECTIVE_S, pass_tokens=1024, least=least)
        self.now_s, self.lowered_s = 0.0, -RAISE_S

    @rule(tokens=st.integers(1, 3000), seconds=st.floats(0, 0.3))
    def arrive(self, tokens, seconds):
        self.now_s += seconds
        self.controller.arrived(tokens, self.now_s)

    @rule(m=st.integers(1, 4), tokens=st.integers(1, 1024), factor=st.floats(0.1, 20))
    def observe(self, m, tokens, factor):
        self.controller.observe(m, tokens, factor * TABLE.at(m, tokens))

    @rule(queue=st.integers(1, 6000), age_s=st.floats(0, 0.2), seconds=st.floats(0, 2.5))
    def decide(self, queue, age_s, seconds):
        self.now_s += seconds
        before, controller = self.controller.num_students, self.controller
        fitting = controller.largest(queue, age_s, controller.rate(self.now_s))
        chosen = controller.decide(queue, age_s, self.now_s)
        assert controller.least <= chosen <= controller.most
        assert chosen <= max(fitting, controller.least), "never more than fit"
        if fitting < before:
            assert chosen == fitting, "lowered at once"
        if chosen < before or fitting <= before:
            self.lowered_s = self.now_s
        if chosen > before:
            assert self.now_s - self.lowered_s >= RAISE_S, "raised only after a second of fitting"


TestController = ControllerMachine.TestCase
TestController.settings = settings(max_examples=60)


def test_one_more_student_each_second_that_it_fits():
    controller = Controller(TABLE, OBJECTIVE_S, pass_tokens=1024)
    assert controller.decide(50_000, 0.0, 10.0) == 1
    seen = [controller.decide(16, 0.0, 10.0 + at / 4) for at in range(1, 17)]
    assert seen == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert controller.decide(50_000, 0.0, 14.1) == 1
    assert controller.decide(16, 0.0, 14.2) == 1
    assert controller.decide(16, 0.0, 99.0) == 4, "idle seconds count"


@pytest.mark.parametrize("most_load", [0.3, 0.7, 0.9])
def test_load_is_what_comes_as_a_share_of_what_full_passes_carry(most_load):
    controller = Controller(TABLE, OBJECTIVE_S, pass_tokens=1024, most_load=most_load)
    carried = {m: full / TABLE.at(m, full) for m, full in controller.full.items()}
    for m in (2, 3, 4):
        assert controller.largest(1, 0.0, 0.999 * most_load * carried[m]) >= m
        assert controller.largest(1, 0.0, 1.001 * most_load * carried[m]) < m
    assert controller.largest(1, 0.0, 100 * carried[1]) == 1, "the fewest answer whatever comes"


def test_the_arrival_rate_forgets():
    controller = Controller(TABLE, OBJECTIVE_S, pass_tokens=1024)
    for at in range(400):
        controller.arrived(10, at / 100)
    assert controller.rate(4.0) == pytest.approx(1000, rel=0.05)
    assert controller.rate(6.0) < 1
    assert controller.rate(3.0) <= controller.rate(3.99), "an earlier time is taken for now"


def test_passes_are_cut_to_what_the_objective_allows():
    controller = Controller(TABLE, OBJECTIVE_S, pass_tokens=100_000)
    for m, tokens in controller.full.items():
        assert TABLE.at(m, tokens) <= PASS_SHARE * OBJECTIVE_S < TABLE.at(m, tokens + 9)
    assert controller.full[4] < controller.full[1]


def intake_of(controller, *, most=10**9, now_s=0.0):
    """An intake of one worker at a moment that stands still."""
    return Intake(
        num_students=4,
        objective_s=OBJECTIVE_S,
        max_queue_tokens=most,
        pass_tokens=1024,
        pass_texts=64,
        controller=controller,
        clock=lambda: now_s,
    )


def test_what_could_not_be_answered_in_time_is_refused_and_told_when_to_come():
    controller = Controller(TABLE, OBJECTIVE_S, pass_tokens=1024)
    intake, most = intake_of(controller), controller.most_tokens()
    last_s = most / controller.full[1] * TABLE.at(1, controller.full[1])
    in_time_s = SHARE * OBJECTIVE_S
    assert last_s <= in_time_s < last_s * (most + 1) / most, "as many as the fewest students answer in time"
    for at in range(most // 50):
        intake.put(at, 50)
    with pytest.raises(Overloaded) as caught:
        intake.put("late", 51)
    assert f"{most} may" in str(caught.value)
    intake.served(1, 100, 100 * 2e-5)
    with pytest.raises(Overloaded) as caught:
        intake.put("late", 51)
    assert caught.value.retry_after_s == pytest.approx(max((intake.buffer.tokens + 51 - most) * 2e-5, 0.001))
    slow_down(controller, 4)
    assert most / 5 < controller.most_tokens() <= most / 4, (
        "fewer on a slower machine, whose passes are shorter, too"
    )


def slow_down(controller, factor):
    """Passes have taken so many times as long for a while."""
    for _ in range(60):
        controller.observe(1, 400, factor * TABLE.at(1, 400))


@given(st.floats(1.0, 8.0), st.integers(1, 4))
def test_on_a_slower_machine_passes_are_shorter_but_not_tiny(factor, least):
    controller = Controller(TABLE, OBJECTIVE_S, pass_tokens=2048, least=least)
    roomiest = dict(controller.full)
    slow_down(controller, factor)
    for m, tokens in controller.full.items():
        assert LEAST_ROOM <= tokens <= roomiest[m]
        if tokens > LEAST_ROOM:
            assert controller.seconds(m, tokens) <= PASS_SHARE * OBJECTIVE_S * 1.001
    rooms = list(controller.full.values())
    assert rooms == sorted(rooms, reverse=True), "more students, fewer tokens"
    slow_down(controller, 1.0)
    assert controller.full[least] >= 0.9 * roomiest[least], "and as long as before on one that has recovered"


def test_a_pass_of_a_slow_model_is_no_longer_than_it_was_allowed_to_be():
    """Where even a small pass takes its share of the objective, no more tokens than that, however slow it becomes."""
    table = ServiceTable((16, 1024), ((0.02, 2.0),))
    controller = Controller(table, OBJECTIVE_S, pass_tokens=1024)
    room = controller.full[1]
    assert room < LEAST_ROOM
    for _ in range(60):
        controller.observe(1, 16, 0.1)
    assert controller.full[1] == room


def test_who_comes_while_a_pass_runs_is_told_to_wait_for_it_too():
    controller, now = Controller(TABLE, OBJECTIVE_S, pass_tokens=1024), [0.0]
    intake = intake_of(controller)
    intake.clock = lambda: now[0]
    idle = intake.most_tokens()
    intake.put_all([(at, 50) for at in range(40)])
    students, texts = intake.take()
    pass_s = TABLE.at(students, sum(one.tokens for one in texts))
    busy = intake.most_tokens()
    assert busy == pytest.approx(idle * (1 - pass_s / (SHARE * OBJECTIVE_S)), abs=2)
    assert busy < 0.9 * idle
    now[0] = pass_s / 2
    assert busy < intake.most_tokens() < idle
    now[0] = pass_s
    assert intake.most_tokens() == idle


def test_a_request_larger_than_the_objective_allows_is_taken_by_an_idle_server():
    controller = Controller(TABLE, OBJECTIVE_S, pass_tokens=1024)
    intake, size = intake_of(controller), controller.most_tokens() + 400
    assert len(intake.put_all([(at, 50) for at in range(size // 50)])) == size // 50
    with pytest.raises(Overloaded):
        intake.put("next", 1)


def test_without_a_controller_the_queue_is_as_long_as_was_said():
    intake = intake_of(None, most=5000)
    intake.put_all([(at, 50) for at in range(100)])
    with pytest.raises(Overloaded):
        intake.put("more", 1)


def test_texts_of_a_request_are_taken_all_or_none():
    intake = intake_of(None, most=100)
    assert intake.put_all([("a", 30), ("b", 40)]) == [0, 1]
    with pytest.raises(Overloaded):
        intake.put_all([("c", 20), ("d", 20)])
    assert (len(intake.buffer), intake.buffer.tokens, intake.rejected) == (2, 70, 1)
    assert [one.item for one in intake.take()[1]] == ["a", "b"]
    with pytest.raises(BudgetError, match="2 texts of 101 tokens were given") as caught:
        intake.put_all([("e", 50), ("f", 51)])
    assert caught.value.code == "ZI-2206"
    assert not len(intake.buffer)


def test_a_pass_of_many_students_is_as_short_as_one_of_few():
    controller = Controller(TABLE, OBJECTIVE_S, pass_tokens=1024)
    intake = intake_of(controller)
    intake.put_all([(at, 50) for at in range(16)])
    students, texts = intake.take()
    assert students == 4, "there is time for all of them"
    assert sum(one.tokens for one in texts) <= controller.full[4] < 16 * 50


def test_a_machine_that_became_slower_is_noticed():
    controller = Controller(TABLE, OBJECTIVE_S, pass_tokens=512)
    assert controller.largest(400, 0.0, 0.0) == 4
    for _ in range(60):
        controller.observe(4, 400, 4 * TABLE.at(4, 400))
    assert controller.largest(400, 0.0, 0.0) < 4
    for _ in range(60):
        controller.observe(2, 400, TABLE.at(2, 400))
    assert controller.largest(400, 0.0, 0.0) == 4


def simulate(arrivals, *, is_adaptive, objective_s=OBJECTIVE_S, fixed=4, slowdown=lambda now_s: 1.0):
    """One worker on a virtual clock.  In: (second, tokens) of each text.  Out: (latency, students, at) of each."""
    clock = [0.0]
    controller = Controller(TABLE, objective_s, pass_tokens=1024) if is_adaptive else None
    intake = Intake(
        num_students=fixed,
        objective_s=objective_s,
        max_queue_tokens=10**9,
        pass_tokens=1024,
        pass_texts=64,
        controller=controller,
        clock=lambda: clock[0],
    )
    events = [(second, at, tokens) for at, (second, tokens) in enumerate(arrivals)]
    heapq.heapify(events)
    answered, running = [], None  # (end, students, texts, begin)
    while events or running:
        if running and (not events or running[0] <= events[0][0]):
            clock[0], students, texts, begin_s = running
            intake.served(students, sum(one.tokens for one in texts), clock[0] - begin_s)
            answered += [(clock[0] - one.since_s, students, one.since_s) for one in texts]
            running = None
        else:
            clock[0], at, tokens = heapq.heappop(events)
            intake.put(at, tokens)
        if running is None:
            students, texts = intake.take()
            if texts:
                tokens = sum(one.tokens for one in texts)
                assert tokens <= intake.pass_tokens, "no more rows than a pass has"
                took_s = slowdown(clock[0]) * TABLE.at(students, tokens)
                running = clock[0] + took_s, students, texts, clock[0]
    assert len(answered) == len(arrivals), "each text is answered once"
    return answered


def poisson(draw, segments):
    """Arrivals of (seconds, tokens per second) segments, lengths of 16 to 64 tokens."""
    at_s, begin_s, found = 0.0, 0.0, []
    for length_s, rate in segments:
        begin_s = at_s = max(at_s, begin_s)
        end_s = begin_s + length_s
        while (at_s := at_s + draw.expovariate(rate / 40)) < end_s:
            found.append((at_s, draw.randint(16, 64)))
        begin_s = at_s = end_s
    return found


CAPACITY = {m: 1024 / TABLE.at(m, 1024) for m in (1, 4)}  # tokens per second
CALM = 0.15 * CAPACITY[1]
BURST = [(10, CALM), (10, 5 * CALM), (10, CALM)]


@pytest.mark.parametrize("seed", range(3))
def test_in_a_burst_the_objective_holds_where_all_students_break_it(seed):
    arrivals = poisson(random.Random(seed), BURST)
    assert CAPACITY[4] < 5 * CALM < 0.8 * CAPACITY[1], "a burst that all students cannot carry and one can"
    ours = simulate(arrivals, is_adaptive=True)
    fixed = simulate(arrivals, is_adaptive=False)
    assert percentile([one[0] for one in ours], 0.99) <= OBJECTIVE_S
    assert percentile([one[0] for one in fixed], 0.99) > 10 * OBJECTIVE_S
    calm = [students for _, students, at_s in ours if at_s < 10 or at_s > 25]
    assert sum(students == 4 for students in calm) > 0.9 * len(calm), "with no load all students answer"
    burst = [students for _, students, at_s in ours if 11 < at_s < 20]
    assert min(burst) < 4
    assert max(burst) < 4, "and what is over capacity is not tried"


def test_the_controller_carries_nearly_what_one_student_carries():
    """Capacity is the rate whose p99 lies within the objective: at least 0.7 of the ratio of one pass to another."""
    arrivals = poisson(random.Random(7), [(20, 0.85 * CAPACITY[1])])
    assert percentile([one[0] for one in simulate(arrivals, is_adaptive=True)], 0.99) <= OBJECTIVE_S


def test_a_slow_spell_of_the_machine_is_survived():
    arrivals = poisson(random.Random(1), [(30, 1.2 * CALM)])
    spell = {"slowdown": lambda now_s: 3.0 if 10 < now_s < 20 else 1.0}
    ours = simulate(arrivals, is_adaptive=True, **spell)
    fixed = simulate(arrivals, is_adaptive=False, **spell)
    late = [sum(one[0] > OBJECTIVE_S for one in answered) for answered in (ours, fixed)]
    assert late[0] < 0.02 * len(ours) < late[1]


def test_a_full_intake_names_a_time_that_follows_from_the_measured_rate():
    now = [0.0]
    intake = Intake(
        num_students=1,
        objective_s=None,
        max_queue_tokens=100,
        pass_tokens=50,
        pass_texts=8,
        controller=None,
        clock=lambda: now[0],
    )
    intake.put("a", 90)
    with pytest.raises(Overloaded) as caught:
        intake.put("b", 20)
    assert caught.value.retry_after_s == 1.0, "nothing is known yet"
    intake.served(1, 50, 0.5)
    with pytest.raises(Overloaded) as caught:
        intake.put("b", 20)
    assert caught.value.retry_after_s == pytest.approx(10 * 0.5 / 50)
    assert intake.rejected == 2
