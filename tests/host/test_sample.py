"""Sampling: the processors against transformers', the draws against their distribution, rows against batch mates."""

import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sampling_rows import Sequence, mixed_rows

from zinfer.errors import MachineError
from zinfer.runtime.live_bytes import LiveBytes
from zinfer.sampling import sample as module
from zinfer.sampling.params import SamplingParams
from zinfer.sampling.philox import philox, uniform
from zinfer.sampling.sample import _largest, collect, draw, sample
from zinfer.spec import sampling_cost


def ids(logits, *sequences, **options):
    return [draw.token_id for draw in sample(logits, sequences, **options)]


def drawn_set(logits_V, count=600, **params):
    """The tokens that `count` seeds draw from one row."""
    rows = [Sequence(SamplingParams(**params), seed) for seed in range(count)]
    return set(ids(logits_V.expand(count, -1), *rows))


def words(*numbers):
    return np.array(numbers, np.uint64)[:, None]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    assert philox(words(*counter), words(*key))[:, 0].tolist() == expected


def test_uniform_is_spread_and_repeatable():
    draws = uniform([7] * 4000, range(4000))
    assert 0 <= draws.min() < 0.01
    assert 0.99 < draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.02
    assert uniform([7], [123])[0] == draws[123]
    assert len({*uniform([1, 2, 2**63], [0, 0, 0]), *uniform([1, 2, 2**63], [1, 1, 1])}) == 6


def test_temperature_zero_is_greedy():
    logits = torch.randn(5, 50)
    assert ids(logits, *[Sequence(SamplingParams(temperature=0))] * 5) == logits.argmax(-1).tolist()


def test_of_equal_logits_the_first_is_the_largest():
    logits = torch.zeros(40, 20_000)  # more than one slab
    for row in range(40):
        logits[row, [row + 3, row + 1, 19_999]] = 7.0
    assert ids(logits, *[Sequence(SamplingParams(temperature=0))] * 40) == [row + 1 for row in range(40)]


@given(
    values=st.lists(st.sampled_from([-math.inf, -3.0, 0.0, 2.5, math.inf, math.nan]), min_size=1, max_size=40)
)
def test_the_largest_of_a_row_is_the_one_that_torch_finds(values):
    """Its slow twin, also where a row holds what is no number; views of columns too."""
    logits = torch.tensor([values, values[::-1]])
    for rows in (logits, logits[:, : len(values) // 2 + 1], logits[:0]):
        tops, at = _largest(rows)
        want = rows.max(-1)
        assert torch.equal(at, want.indices)
        torch.testing.assert_close(tops, want.values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 4},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 1.7, "top_k": 6, "top_p": 0.8, "min_p": 0.1},
    ],
    ids=str,
)
def test_draws_follow_the_processed_distribution(params):
    """Chi-square against transformers' own processors; 4000 draws, 0.1 % limit of 11 degrees of freedom."""
    from transformers.generation import logits_process as oracle

    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(1))
    scores = logits / params.get("temperature", 1.0)
    if "top_k" in params:
        scores = oracle.TopKLogitsWarper(params["top_k"])(None, scores)
    if "top_p" in params:
        scores = oracle.TopPLogitsWarper(params["top_p"])(None, scores)
    if "min_p" in params:
        scores = oracle.MinPLogitsWarper(params["min_p"])(None, scores)
    expected = scores.softmax(-1)[0].double() * 4000
    rows = [Sequence(SamplingParams(**params), seed) for seed in range(4000)]
    counts = torch.bincount(torch.tensor(ids(logits.expand(4000, -1), *rows)), minlength=12)
    assert not counts[expected == 0].any()

    def chi_square(counts):
        kept = expected > 0
        return float(((counts - expected)[kept] ** 2 / expected[kept]).sum())

    assert chi_square(counts) < 31.3
    assert chi_square(counts.roll(1)) > 31.3  # the test can fail


def test_top_p_keeps_the_token_that_reaches_it():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert drawn_set(logits, top_p=0.79) == {0, 1}
    assert drawn_set(logits, top_p=0.81) == {0, 1, 2}
    assert drawn_set(logits, top_p=1e-6) == {0}


def test_a_wide_nucleus():
    logits = torch.zeros(1000)
    logits[::2] = -30
    wide = drawn_set(logits, count=3000, top_p=0.999)
    assert all(token % 2 for token in wide)
    assert len(wide) > 450


def test_draws_over_many_blocks_follow_the_distribution():
    """A vocabulary of several blocks, chi-square over 8 groups of tokens; 7 degrees of freedom, 0.1 %."""
    logits = torch.randn(1, 700, generator=torch.Generator().manual_seed(3))
    group = torch.arange(700) // 88
    expected = torch.zeros(8).index_add(0, group, logits.softmax(-1)[0]).double() * 2000
    drawn = ids(logits.expand(2000, -1), *[Sequence(SamplingParams(), seed) for seed in range(2000)])
    counts = torch.bincount(group[torch.tensor(drawn)], minlength=8)
    assert float(((counts - expected) ** 2 / expected).sum()) < 24.3
    assert float(((counts.roll(1) - expected) ** 2 / expected).sum()) > 24.3


def test_the_ends_of_the_unit_interval():
    probs = torch.zeros(1, 600)
    probs[0, 259], probs[0, 511] = 0.25, 0.75
    for number, token in [(0.0, 259), (0.2499, 259), (0.2501, 511), (1 - 2**-53, 511)]:
        assert module._invert(probs, torch.tensor([number], dtype=torch.float64)).tolist() == [token]


def test_repetition_penalty_is_that_of_transformers():
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(1, 30)
    seen = [3, 4, 4, 9, 29]
    want = RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor([seen]), logits.clone())
    row = Sequence(SamplingParams(repetition_penalty=1.8), 0, seen[:3], seen[3:])
    got = module._processed(logits, [row], ())
    assert torch.equal(got, want)
    assert not torch.equal(got, logits)


def test_min_tokens_withholds_the_end():
    logits = torch.tensor([[0.0, 9.0, 8.0, 1.0]])
    params = SamplingParams(min_tokens=2, temperature=0, stop_token_ids=[2])
    assert ids(logits, Sequence(params, output_ids=[0]), eos_ids=[1]) == [3]
    assert ids(logits, Sequence(params, output_ids=[0, 0]), eos_ids=[1]) == [1]


def test_raw_logprobs():
    logits = torch.randn(1, 40)
    want = logits.log_softmax(-1)[0]
    params = SamplingParams(logprobs=3, temperature=0.3, top_k=2, repetition_penalty=2.0, seed=4)
    (draw,) = sample(logits, [Sequence(params, 4, [int(logits.argmax())])])
    assert next(iter(draw.logprobs)) == draw.token_id
    assert set(want.topk(3).indices.tolist()) <= set(draw.logprobs)
    assert all(value == pytest.approx(float(want[token]), abs=1e-6) for token, value in draw.logprobs.items())
    (draw,) = sample(logits, [Sequence(SamplingParams(logprobs=0))])
    assert list(draw.logprobs) == [draw.token_id]
    assert sample(logits, [Sequence(SamplingParams())])[0].logprobs is None


@pytest.mark.parametrize("slab", [1, 3000, 2**20])
def test_a_draw_does_not_depend_on_batch_mates(monkeypatch, slab):
    logits, rows = mixed_rows()
    alone = [sample(logits[i : i + 1], [rows[i]])[0] for i in range(24)]
    monkeypatch.setattr(sampling_cost, "SLAB_LOGITS", slab)
    assert sample(logits, rows) == alone
    order = list(range(23, -1, -1))
    assert sample(logits[order], [rows[i] for i in order]) == alone[::-1]
    other_seeds = [Sequence(row.params, row.seed + 1, row.prompt_ids, row.output_ids) for row in rows]
    assert sample(logits, other_seeds) != alone
    next_step = [Sequence(row.params, row.seed, row.prompt_ids, [*row.output_ids, 7]) for row in rows]
    assert sample(logits, next_step) != alone


def test_a_devices_sort_draws_what_the_processors_does(monkeypatch):
    logits, rows = mixed_rows()
    want = sample(logits, rows)
    sorted_rows = []

    def falling(probs):
        sorted_rows.append(len(probs))
        return probs.sort(-1, descending=True).values

    monkeypatch.setattr(module, "_falling", falling)
    assert sample(logits, rows) == want
    assert sum(sorted_rows) == 9  # the rows with a top_p, and no others
    monkeypatch.setattr(module, "_falling", lambda probs: falling(probs).flip(-1))
    assert sample(logits, rows) != want


def test_micro_batches_are_collected_together():
    logits, rows = mixed_rows()
    parts = [draw(logits[a:b], rows[a:b]) for a, b in [(0, 5), (5, 5), (5, 24)]]
    assert [each for part in collect(parts) for each in part] == sample(logits, rows)
    assert collect([]) == []


def test_nothing_is_asked_of_a_device_before_the_draws_are_collected(monkeypatch):
    """On the device that has no values: mixing it with the host's, or asking for a value, raises."""
    monkeypatch.setattr(sampling_cost, "SLAB_LOGITS", 3000)
    _, rows = mixed_rows(8)
    rows[0].params = SamplingParams(min_tokens=5, repetition_penalty=1.2, min_p=0.1)
    drawn = draw(torch.empty(8, 1500, device="meta"), rows, eos_ids=[1, 2])
    assert drawn.numbers.device.type == "meta"
    assert drawn.numbers.shape == (2 * 8 + 9,)  # id and largest logit; of one row also 4 log probabilities
    with pytest.raises(NotImplementedError):
        collect([drawn])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_no_numbers_are_refused(bad):
    logits = torch.zeros(2, 5)
    logits[1] = bad
    with pytest.raises(MachineError) as caught:
        sample(logits, [Sequence(SamplingParams())] * 2)
    assert caught.value.code == "ZI-5501"
    assert "sequence 1" in caught.value.message


def test_the_logits_given_are_left_alone():
    logits = torch.randn(3, 20)
    before = logits.clone()
    params = SamplingParams(
        repetition_penalty=2.0, min_tokens=1, top_k=3, top_p=0.5, min_p=0.1, temperature=0.4
    )
    sample(logits, [Sequence(params, 1, [1])] * 3, eos_ids=[2])
    assert torch.equal(logits, before)


@pytest.mark.parametrize(("count", "vocab"), [(1, 32000), (40, 32000), (300, 1000)])
def test_workspace_stays_below_its_bound(count, vocab):
    params = SamplingParams(
        temperature=0.7, top_k=500, top_p=0.9, min_p=0.01, repetition_penalty=1.1, logprobs=5, seed=1
    )
    rows = [Sequence(params, i, [1, 2]) for i in range(count)]
    logits = torch.randn(count, vocab)
    with LiveBytes():
        sample(logits[:1], rows[:1])  # what is imported on first use is no workspace
    tracemalloc.start()
    with LiveBytes() as live:
        sample(logits, rows)
    peak = live.peak + tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    bound = sampling_cost.sampling_workspace_bytes(count, vocab)
    assert 0.5 * bound <= peak <= bound
