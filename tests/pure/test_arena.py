"""The arena: blocks never overlap, gaps always join, and the books balance after any sequence of calls."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from zinfer.arena import Arena
from zinfer.errors import InternalError

PAGE = 4096


class ArenaMachine(RuleBasedStateMachine):
    blocks = Bundle("blocks")

    def __init__(self):
        super().__init__()
        self.arena = Arena(64 * PAGE)
        self.taken = {}

    @rule(target=blocks, size=st.integers(0, 20 * PAGE))
    def take(self, size):
        largest = self.arena.largest_free_bytes
        offset = self.arena.take(size)
        if offset is None:
            assert max(size, 1) > largest
            return multiple()
        assert offset % PAGE == 0
        self.taken[offset] = max(-(-size // PAGE) * PAGE, PAGE)
        return offset

    @rule(offset=consumes(blocks))
    def give_back(self, offset):
        self.arena.give_back(offset)
        del self.taken[offset]

    @invariant()
    def it_agrees_with_a_dictionary(self):
        assert self.arena.blocks() == sorted(self.taken.items())
        assert self.arena.free_bytes == 64 * PAGE - sum(self.taken.values())
        assert self.arena.largest_free_bytes == self.longest_gap()
        self.arena.check()

    def longest_gap(self):
        longest = end = 0
        for offset, nbytes in [*sorted(self.taken.items()), (64 * PAGE, 0)]:
            longest, end = max(longest, offset - end), offset + nbytes
        return longest


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(max_examples=40, stateful_step_count=40)


def test_the_tightest_gap_is_taken():
    arena = Arena(10 * PAGE)
    first, _, third, _ = (arena.take(size * PAGE) for size in (3, 1, 2, 4))
    arena.give_back(first)
    arena.give_back(third)
    assert arena.take(2 * PAGE) == third
    assert arena.take(2 * PAGE) == first


def test_equal_blocks_never_fragment():
    arena = Arena(8 * PAGE)
    offsets = [arena.take(2 * PAGE) for _ in range(4)]
    for offset in (offsets[1], offsets[3]):
        arena.give_back(offset)
    assert {arena.take(2 * PAGE), arena.take(2 * PAGE)} == {offsets[1], offsets[3]}
    assert arena.take(1) is None


def test_an_empty_arena_grants_nothing():
    arena = Arena(PAGE - 1)
    arena.check()
    assert (arena.take(1), arena.free_bytes, arena.largest_free_bytes) == (None, 0, 0)


def test_a_block_is_given_back_once():
    arena = Arena(4 * PAGE)
    offset = arena.take(PAGE)
    arena.give_back(offset)
    with pytest.raises(InternalError, match="no block begins there"):
        arena.give_back(offset)
    with pytest.raises(InternalError, match="no block begins there"):
        arena.give_back(PAGE)


@pytest.mark.parametrize("damage", ["lost block", "lost gap", "overlap"])
def test_the_check_sees_damage(damage):
    arena = Arena(8 * PAGE)
    arena.take(2 * PAGE)
    arena.take(2 * PAGE)
    match damage:
        case "lost block":
            arena._taken.pop(0)
        case "lost gap":
            arena._gaps.clear()
        case "overlap":
            arena._taken[0] = 3 * PAGE
    with pytest.raises(InternalError, match="arena"):
        arena.check()
