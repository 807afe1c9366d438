"""Continuations of one prompt: the prompt is fed once, they branch from it, and score bit for bit as they do alone."""

from itertools import pairwise

import pytest
import torch
from dense_attention import causal, dense, packed, qkv
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import write_tiny

from zinfer import LLM, SamplingParams
from zinfer.chunks.pack import assemble
from zinfer.kvcache.cache import PagedKv
from zinfer.kvcache.pages import PAGE_TOKENS, Fork
from zinfer.layers.attention import attend
from zinfer.plan.place import smallest_budget
from zinfer.plan.records import Tier
from zinfer.runtime import score as score_module
from zinfer.runtime.request import Part, Request
from zinfer.runtime.score import NOTHING_SAMPLED, Branches, Scorer, branched

FIXED = {"machine": "sim-default", "device": "cpu", "threads": 1}
LABELS = [[7, 8], [9], [10, 11, 12, 13], [7, 8, 20], [300] * 19, [44], [9, 9], [7, 8]]  # 8, one of them twice
PROMPT = [(37 * at) % 500 + 2 for at in range(41)]  # ends within a page
OTHER = [(53 * at) % 500 + 2 for at in range(32)]  # ends with one
FED_APART = sum(len(prompt) + len(label) - 1 for prompt in (PROMPT, OTHER) for label in LABELS)
FED_ONCE = FED_APART - 7 * (len(PROMPT) + len(OTHER))


def scored(folder, prompts=(PROMPT, OTHER), **options):
    """Scores of every label after every prompt in one call, and what it took; the books balance afterwards."""
    with LLM(folder, **FIXED | options) as llm:
        found = llm.score([prompt for prompt in prompts for _ in LABELS], [*LABELS] * len(prompts))
        engine = llm._session._engine
        engine.kv.check()
        engine.manager.check()
        assert engine.kv.free_tokens == engine.kv.capacity_tokens, "every page has come back"
        return found, llm.stats


def alone(folder, prompts=(PROMPT, OTHER), **options):
    """The slow twin: each pair by itself, under one plan for the longest."""
    with LLM(folder, **FIXED | {"context": 64, "max_batch": 1} | options) as llm:
        return [llm.score([prompt], [label])[0] for prompt in prompts for label in LABELS]


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "phi3"])
def test_a_prompt_is_fed_once_and_every_bit_is_that_of_the_pair_alone(family, tmp_path):
    folder = write_tiny(family, tmp_path / "m")
    found, stats = scored(folder)
    assert found == alone(folder)
    assert sum(done.rows for done in stats.passes) == FED_ONCE
    assert stats.to_dict()["shared_tokens"] == FED_APART - FED_ONCE


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """A model with a window of 16 tokens, less than the prompts, and its pairs' scores alone."""
    folder = write_tiny("mistral", tmp_path_factory.mktemp("branches") / "m")
    return folder, alone(folder)


SETTINGS = {
    "cuts": {"max_rows": 5, "max_batch": 1},
    "micro-batches": {"max_rows": 24, "max_batch": 2, "micro_rows": 7},
    "cache below a device": {
        "device": "sim",
        "memory": {"device": "2MiB", "host": "64MiB"},
        "kv": "host",
        "max_rows": 32,
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_cuts_preemptions_and_tiers_change_no_bit(name, windowed):
    folder, wanted = windowed
    options = SETTINGS[name]
    found, stats = scored(folder, **options)
    assert found == wanted
    assert max(done.rows for done in stats.passes) <= options["max_rows"]
    assert max(done.sequences for done in stats.passes) > 1, "branches shared passes"
    assert sum(done.rows for done in stats.passes) == FED_ONCE


@pytest.mark.parametrize("preempt", ["spill", "recompute"])
def test_a_preempted_prompt_takes_its_branches_along(preempt, windowed):
    """A text that is generated grows until the pages of the younger labels are taken from them."""
    folder, wanted = windowed
    options = {"max_rows": 3, "max_batch": 2, "context": 80, "kv_tokens": 112, "preempt": preempt}
    with LLM(folder, **FIXED, **options) as llm:
        params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
        scorers = [Scorer(PROMPT, label) for label in LABELS]
        older, group = llm._request(PROMPT[:15], params), Branches(scorers).request(next(llm._ids))
        for _ in llm._session.run(llm._jobs([older, group])):
            llm._session._engine.kv.check()
        assert [scorer.score() for scorer in scorers] == wanted[: len(LABELS)]
        assert llm.stats.preemptions["spilled" if preempt == "spill" else "dropped"] == 1
        fed = sum(done.rows for done in llm.stats.passes) - older.num_tokens + 1
        assert (fed == group.num_tokens) == (preempt == "spill")
        (text,) = llm.generate([PROMPT[:15]], params)
        assert older.output_ids == text.outputs[0].token_ids


@pytest.mark.parametrize("forget", ["fork", "trunk"])
def test_a_branch_that_saw_another_or_no_prompt_would_be_seen(forget, windowed, monkeypatch):
    folder, wanted = windowed
    plain = Request.parts

    def parts(self, start, stop):
        if forget == "fork":  # one sequence after the other, as if all followed each other
            yield Part(start, stop - start, None, self.num_tokens)
            return
        for part in plain(self, start, stop):
            yield part._replace(fork=part.fork and Fork(part.fork.trunk - 1, part.fork.shift))

    monkeypatch.setattr(Request, "parts", parts)
    wrong, _ = scored(folder, [PROMPT])
    own_row = [0, 1, 5]  # scored by rows of the prompt and of the branch that follows it at once
    assert [at for at in range(len(LABELS)) if wrong[at] == wanted[at]] == own_row


def test_without_exact_they_agree_to_rounding(tmp_path):
    folder = write_tiny("llama", tmp_path / "m", dtype="float32")
    found, stats = scored(folder, exact=False)
    wanted = alone(folder, exact=False)
    assert sum(done.rows for done in stats.passes) == FED_ONCE
    for one, other in zip(found, wanted, strict=True):
        assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-4)


def least_host(folder, prompts, labels):
    """The smallest budget in which the pairs are scored together."""
    with LLM(folder, **FIXED, memory={"host": "1GiB"}, **SMALL) as llm:
        groups = branched(llm.model, [Scorer(*pair) for pair in zip(prompts, labels, strict=True)])
        plan = llm._session.fit([group.request(0) for group in groups])
        table = assemble(llm.model.source, 1)
        return smallest_budget(table, compute_tier=Tier.HOST, reserve=plan.reserve, lookahead=0).host


SMALL = {"max_rows": 8, "max_batch": 1, "lookahead": 0}


def test_branches_whose_cache_does_not_fit_together_are_scored_in_parts(windowed):
    folder, wanted = windowed
    labels = 12 * [LABELS[4]]
    host = least_host(folder, [PROMPT] * 2, labels[:2])
    assert host < least_host(folder, [PROMPT] * 12, labels) - 2**15
    with LLM(folder, **FIXED, **SMALL, memory={"host": host + 2**14}) as llm:
        assert llm.score([PROMPT] * 12, labels) == [wanted[4]] * 12
        assert 0 < llm.stats.shared_tokens < 11 * len(PROMPT), "several requests, each of several branches"
        assert llm.stats.peak_bytes["host"] <= host + 2**14


def test_a_context_that_was_set_holds_for_all_branches_together(windowed):
    folder, wanted = windowed
    found, stats = scored(folder, [PROMPT], context=64)
    assert found == wanted[: len(LABELS)]
    assert stats.shared_tokens == 6 * len(PROMPT), "two requests"


def test_many_continuations_are_several_requests(windowed, monkeypatch):
    folder, wanted = windowed
    monkeypatch.setattr(score_module, "_BRANCH_TOKENS", 1)
    with LLM(folder, **FIXED) as llm:
        labels = [label for label in LABELS for _ in range(4)]
        found = llm.score([PROMPT] * len(labels), labels)
        assert found == [one for one in wanted[: len(LABELS)] for _ in range(4)]
        fed = 4 * sum(len(label) - 1 for label in LABELS)
        requests = -(-fed // len(PROMPT))  # as many tokens of branches as of the prompt
        assert sum(done.rows for done in llm.stats.passes) >= fed + requests * len(PROMPT)
        assert llm.stats.shared_tokens > 0


def test_lengths_that_rotate_otherwise_share_no_prompt(tmp_path):
    """A rope kind that switches on length: the prompt of a longer text has other keys."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    changes = {"rope_scaling": rope, "original_max_position_embeddings": 45}
    folder = write_tiny("phi3", tmp_path / "m", **changes)
    found, stats = scored(folder, [PROMPT])
    assert found == alone(folder, [PROMPT])
    assert stats.shared_tokens == 6 * len(PROMPT), "all but the longest label"
    assert sum(done.rows for done in stats.passes) == FED_ONCE - len(OTHER) - 26 + len(PROMPT)


@given(
    trunk=st.integers(1, 40),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    cuts=st.sets(st.integers(1, 80)),
)
def test_every_token_is_fed_once_at_its_place_in_its_branch(trunk, lengths, cuts):
    scorers = [Scorer(range(trunk), [100 * at + i for i in range(n)]) for at, n in enumerate(lengths)]
    request = Branches(scorers).request(0)
    kv = PagedKv(num_layers=1, num_kv_heads=1, head_dim=1, num_pages=9, dtype="F32")
    kv.open(0, request.num_tokens)
    table = kv.tables[0]
    assert table.num_pages == -(-request.num_tokens // PAGE_TOKENS)
    edges = [0, *sorted(cut for cut in cuts if cut < request.num_tokens), request.num_tokens]
    fed, logit_rows = {}, 0
    for start, stop in pairwise(edges):
        at = start
        for first, count, fork, length in request.parts(start, stop):
            slots = [slot for run in table.slots(0, first + count, fork) for slot in run]
            assert [fed[slot] for slot in slots[:first]] == _path(request, at)[:first], "its past is fed"
            for slot in slots[first:]:
                assert slot not in fed
                fed[slot] = request.prompt_ids[at]
                at += 1
            assert first + count <= length <= trunk + max(lengths) - 1
        assert at == stop
        logit_rows += request.num_logit_rows(start, stop)
    assert len(fed) == request.num_tokens
    assert logit_rows == 1 + sum(n - 1 for n in lengths)


def _path(request, at):
    """The tokens of the branch that the request's token `at` belongs to, up to it."""
    begin = max((fork for fork in request.forks if fork <= at), default=None)
    own = request.prompt_ids[:at] if begin is None else request.prompt_ids[begin:at]
    return own if begin is None else request.prompt_ids[: request.trunk] + own


@pytest.mark.parametrize("exact", [True, False])
def test_branches_attend_to_a_prompt_in_the_same_pass(exact):
    """Against a dense mask: a prompt of 30 rows and three branches of it, one of a single row, in one call."""
    trunk, own = 30, [3, 1, 5]
    q, k, v = qkv(trunk + sum(own))
    ends = [sum(own[:at]) for at in range(4)]
    kv = PagedKv(num_layers=1, num_kv_heads=2, head_dim=16, num_pages=4, dtype="F32")
    kv.open(0, trunk + sum(own))
    batch = packed([trunk, *own], [0, trunk, trunk, trunk])
    forks = [None, None, *(Fork(trunk, shift) for shift in ends[1:3])]
    view = kv.view([0] * 4, batch.bounds, batch.past, forks)
    with torch.no_grad():
        found = attend(q, k, v, 0, batch, view, scale=0.25, window=None, exact=exact)
    view.commit()
    assert kv.length(0) == trunk + sum(own)
    for begin, end in pairwise(ends):
        rows = slice(trunk + begin, trunk + end)
        keys, values = (torch.cat([x[:trunk], x[rows]]) for x in (k, v))
        want = dense(q[rows], keys, values, causal(end - begin, trunk + end - begin), 0.25)
        torch.testing.assert_close(found[rows].double(), want, atol=1e-5, rtol=0)


def test_the_token_that_ends_a_branch_is_not_fed():
    request = Branches([Scorer([1, 2], [3]), Scorer([1, 2], [4, 5]), Scorer([1, 2], [6, 7])]).request(0)
    assert (request.prompt_ids, request.forks, request.params) == ([1, 2, 4, 6], (3,), NOTHING_SAMPLED)
