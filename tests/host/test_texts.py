"""Which texts share a pass."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from zinfer.runtime.texts import group_texts

lengths = st.lists(st.integers(1, 40), max_size=60)


@given(lengths, st.integers(1, 100), st.integers(1, 9))
def test_every_text_is_in_one_pass_and_no_pass_is_too_large(lengths, max_rows, max_batch):
    groups = group_texts(lengths, max_rows, max_batch)
    assert sorted(number for group in groups for number in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) <= max_batch
        assert sum(lengths[number] for number in group) <= max_rows or len(group) == 1


@given(lengths, st.integers(40, 100), st.integers(1, 9))
def test_a_pass_ends_only_where_the_next_text_does_not_fit(lengths, max_rows, max_batch):
    groups = group_texts(lengths, max_rows, max_batch)
    for group, following in pairwise(groups):
        rows = sum(lengths[number] for number in group)
        assert len(group) == max_batch or rows + lengths[following[0]] > max_rows
