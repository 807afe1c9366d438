"""Attention of whole texts: those of similar length share a call, and no text sees another or a repeated row."""

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zinfer.layers import bidirectional
from zinfer.layers.bidirectional import attend_whole


def ragged(lengths, seed=0, heads=2, dim=8):
    bounds = list(accumulate(lengths, initial=0))
    draw = torch.Generator().manual_seed(seed)
    return bounds, torch.randn(3, bounds[-1], heads, dim, generator=draw)


def one_by_one(bounds, qkv):
    """The slow twin: every text alone, written down as the formula."""
    rows = []
    for start, stop in pairwise(bounds):
        q, k, v = (x[start:stop].transpose(0, 1) for x in qkv)
        rows.append((torch.softmax(q @ k.transpose(1, 2) * 0.3, -1) @ v).transpose(0, 1))
    return torch.cat(rows)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(0, 99))
def test_shared_calls_give_what_each_text_gets_alone(lengths, seed):
    bounds, qkv = ragged(lengths, seed)
    memo = {}
    for _ in range(2):  # the second layer finds the groups of the first
        found = attend_whole(*qkv, bounds, scale=0.3, exact=False, memo=memo)
        torch.testing.assert_close(found, one_by_one(bounds, qkv), atol=1e-5, rtol=1e-5)
    assert len(memo) == (len(set(lengths)) > 1)


def test_texts_of_similar_length_share_a_call_and_short_ones_do_not_join(monkeypatch):
    calls = []
    plain = bidirectional._attend

    def counted(q, k, v, num_texts, scale, seen=None):
        calls.append((num_texts, len(q) // num_texts, seen is not None))
        return plain(q, k, v, num_texts, scale, seen)

    monkeypatch.setattr(bidirectional, "_attend", counted)
    bounds, qkv = ragged([3, 40, 25, 3, 20])
    attend_whole(*qkv, bounds, scale=0.3, exact=False)
    assert calls == [(3, 40, True), (2, 3, False)]


def test_without_the_mask_repeated_rows_would_be_seen(monkeypatch):
    """The mutation."""
    plain = bidirectional._attend
    monkeypatch.setattr(
        bidirectional, "_attend", lambda q, k, v, num, scale, seen=None: plain(q, k, v, num, scale)
    )
    bounds, qkv = ragged([9, 6])
    found = attend_whole(*qkv, bounds, scale=0.3, exact=False)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, one_by_one(bounds, qkv), atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_every_text_alone():
    bounds, qkv = ragged([7, 12, 5])
    ours, theirs = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    attend_whole(*ours, bounds, scale=0.3, exact=False).square().sum().backward()
    one_by_one(bounds, theirs).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)
