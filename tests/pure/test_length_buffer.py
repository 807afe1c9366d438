"""The length-aware buffer against a model of it: nothing lost, nothing twice, oldest first, nobody starves."""

from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from zinfer.students.buffer import BINS, LengthBuffer, bin_of

LENGTHS = st.one_of(st.integers(1, 40), st.sampled_from([16, 17, 64, 128, 129, 512, 513, 2000]))
OVERDUE_S = 5.0


class BufferMachine(RuleBasedStateMachine):
    """The twin is a list in order of arrival; a take is checked rule by rule, not by the same algorithm."""

    def __init__(self):
        super().__init__()
        self.buffer, self.twin, self.now_s, self.count = LengthBuffer(), [], 0.0, 0
        self.passes_left = {}  # item -> passes it may still wait for

    @rule(tokens=LENGTHS)
    def put(self, tokens):
        number = self.buffer.put(self.count, tokens, self.now_s)
        self.passes_left[self.count] = len(self.twin) + 1
        self.twin.append((self.count, number, tokens, self.now_s))
        self.count += 1

    @rule(seconds=st.sampled_from([0.0, 0.5, 3.0, 9.0]))
    def wait(self, seconds):
        self.now_s += seconds

    @precondition(lambda self: self.twin)
    @rule(data=st.data())
    def discard(self, data):
        one = data.draw(st.sampled_from(self.twin))
        assert self.buffer.discard(one[1])
        assert not self.buffer.discard(one[1]), "it is gone"
        self.twin.remove(one)

    @rule(max_tokens=st.integers(1, 300), max_texts=st.integers(1, 6))
    def take(self, max_tokens, max_texts):
        taken = self.buffer.take(max_tokens, max_texts, self.now_s, OVERDUE_S)
        if not self.twin:
            assert taken == []
            return
        items = [one.item for one in taken]
        known = {one[0]: one for one in self.twin}
        assert items[0] == self.twin[0][0], "the oldest comes first"
        assert len(set(items)) == len(items) <= max_texts
        assert [one.tokens for one in taken] == [known[item][2] for item in items]
        total = sum(one.tokens for one in taken)
        assert total <= max_tokens or len(taken) == 1, "the budget holds, or a long text goes alone"
        home = bin_of(taken[0].tokens)
        left = [one for one in self.twin if one[0] not in items]
        oldest_s = self.twin[0][3]
        late = {
            one[0] for one in self.twin if self.now_s - one[3] >= OVERDUE_S or one[3] <= oldest_s
        }  # or came with the oldest
        for item in items[1:]:
            assert item in late or abs(bin_of(known[item][2]) - home) <= 1, "only what is alike, or late"
        if len(taken) < max_texts:
            for item, _, tokens, _ in left:
                could = total + tokens <= max_tokens and total < max_tokens
                wanted = item in late or abs(bin_of(tokens) - home) <= 1
                assert not (could and wanted), "what still fits is not left behind"
        taken_early = [item for item in items[1:] if item not in late]
        for item, _, tokens, _ in left:
            if item in late and taken_early:
                assert total - sum(known[one][2] for one in taken_early) + tokens > max_tokens, (
                    "the late go before those that are merely alike"
                )
        self.twin = left
        for item, _, _, _ in left:
            self.passes_left[item] -= 1
            assert self.passes_left[item] > 0, "a text outlived the passes that older ones can take"

    @invariant()
    def the_books_balance(self):
        assert len(self.buffer) == len(self.twin)
        assert self.buffer.tokens == sum(one[2] for one in self.twin)
        assert self.buffer.oldest_since_s() == (self.twin[0][3] if self.twin else None)


TestBuffer = BufferMachine.TestCase


@given(LENGTHS)
def test_bins_are_as_published(tokens):
    home = bin_of(tokens)
    assert home == len(BINS) or tokens <= BINS[home]
    assert home == 0 or tokens > BINS[home - 1]


def test_similar_lengths_share_a_pass_and_the_nearest_come_first():
    buffer = LengthBuffer()
    for at, tokens in enumerate((20, 200, 60, 10, 30, 200)):
        buffer.put(tokens, tokens, at / 10)
    assert [one.item for one in buffer.take(1000, 9, 1.0)] == [20, 30, 10, 60]
    assert [one.item for one in buffer.take(1000, 9, 1.0)] == [200, 200]
    assert buffer.take(1000, 9, 1.0) == []


def test_who_has_waited_for_half_of_the_objective_is_taken_whatever_its_length():
    buffer = LengthBuffer()
    for tokens, since_s in ((10, 0.0), (500, 0.2), (12, 1.0)):
        buffer.put(tokens, tokens, since_s)
    assert [one.item for one in buffer.take(510, 9, 1.0, overdue_s=0.5)] == [10, 500]


def test_time_that_runs_backwards_makes_nobody_younger_than_his_elders():
    buffer = LengthBuffer()
    buffer.put("old", 5, 7.0)
    buffer.put("new", 5, 3.0)
    assert [one.since_s for one in buffer.take(10, 2, 8.0)] == [7.0, 7.0]


def test_a_text_without_tokens_is_our_own_mistake():
    with pytest.raises(AssertionError):
        LengthBuffer().put("x", 0, 0.0)


def test_texts_that_came_together_are_taken_together_whatever_their_lengths():
    """Else a request that waits for its last text waits for the short texts of all that came after it."""
    buffer = LengthBuffer()
    for since_s in (1.0, 2.0, 3.0):
        for tokens in (10, 100, 400):
            buffer.put((since_s, tokens), tokens, since_s)
    taken = [buffer.take(600, 64, 4.0) for _ in range(3)]
    whole = [{item for item, *_ in map(astuple, some)} for some in taken]
    for at, since_s in enumerate((1.0, 2.0, 3.0)):
        done = set().union(*whole[: at + 1])
        assert {(since_s, tokens) for tokens in (10, 100, 400)} <= done, "a request a pass, the oldest first"
    assert not len(buffer)
    assert len(whole[0]) > 3, "and what room is left is filled up"
