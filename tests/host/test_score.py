"""Scoring given text: against the logits, against batch mates, in row pieces, and cut as lm-evaluation-harness cuts."""

import pytest
import torch
from tiny_models import write_tiny

import zinfer.runtime.score as score_module
from zinfer import LLM, SamplingParams
from zinfer.errors import UsageError

STREAMED = {"machine": "sim-default", "device": "cpu", "threads": 1, "memory": {"host": "8MiB"}}
PAIRS = [
    ("import os\nimport ", "sys\nimport re\n"),
    ("def main():\n", "    return 0\n"),
    ("class A", "(object):\n    def __init__(self):\n        pass\n" * 3),
    ("x = ", "1"),
]


@pytest.fixture(scope="module")
def llm():
    with LLM(**STREAMED) as model:
        yield model


def by_logits(llm, context_ids, ids):
    """The slow twin: all logits of the whole text."""
    logprobs = torch.log_softmax(llm.logits([*context_ids, *ids]), -1)
    rows = logprobs[len(context_ids) - 1 : -1]
    greedy = rows.argmax(-1).tolist() == list(ids)
    return rows.gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist(), greedy


def test_scores_are_those_of_the_logits(llm):
    scores = llm.score(*zip(*PAIRS, strict=True))
    assert llm.plan.placement.slots > 0, "weights were streamed"
    assert 0.5 < llm.plan.workload.logit_share <= 1, "planned with the logits of most rows"
    assert max(done.sequences for done in llm.stats.passes) > 1, "texts shared passes"
    for (prompt, continuation), found in zip(PAIRS, scores, strict=True):
        kept = prompt.rstrip()
        context_ids = llm.tokenizer.encode(kept)
        ids = llm.tokenizer.encode(prompt + continuation)[len(context_ids) :]
        expected, is_greedy = by_logits(llm, context_ids, ids)
        assert found.token_ids == ids
        assert found.token_logprobs == pytest.approx(expected, abs=1e-5)
        assert found.logprob == pytest.approx(sum(expected), abs=1e-4)
        assert found.is_greedy == is_greedy
        shifted, _ = by_logits(llm, context_ids[:-1] or context_ids, ids)
        if len(context_ids) > 1:
            assert found.token_logprobs != pytest.approx(shifted, abs=1e-5), "the mutation is noticed"


def test_a_score_does_not_depend_on_batch_mates_or_cuts(llm, monkeypatch):
    together = llm.score(*zip(*PAIRS, strict=True))
    alone = [llm.score([prompt], [continuation])[0] for prompt, continuation in PAIRS]
    assert together == alone, "bit for bit"
    with LLM(**STREAMED, max_rows=5, max_batch=2) as small:
        assert small.score(*zip(*PAIRS, strict=True)) == together
        assert max(done.rows for done in small.stats.passes) <= 5
    slabs = []
    monkeypatch.setattr(score_module, "slab_rows", lambda _: slabs.append(1) or 2)
    assert llm.score(*zip(*PAIRS, strict=True)) == together
    assert slabs


def test_what_greedy_decoding_writes_is_greedy(llm):
    prompt = llm.tokenizer.encode("import os\n")
    (output,) = llm.generate(
        prompt, SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=0)
    )
    best = output.outputs[0]
    (found,) = llm.score([prompt], [best.token_ids])
    assert found.is_greedy
    assert found.token_logprobs == pytest.approx(
        [p[t] for p, t in zip(best.logprobs, best.token_ids, strict=True)], abs=1e-5
    )
    other = [*best.token_ids[:-1], best.token_ids[-1] ^ 1]
    assert not llm.score([prompt], [other])[0].is_greedy


def test_labels_are_ranked_by_the_probability_of_their_text(llm):
    labels = [" os", " sys", " zebra"]
    ranked = llm.classify_labels("import", labels)
    scores = llm.score(["import"] * 3, labels)
    expected = torch.softmax(torch.tensor([found.logprob for found in scores]), -1).tolist()
    assert {each["label"]: each["score"] for each in ranked} == pytest.approx(
        dict(zip(labels, expected, strict=True))
    )
    assert sum(each["score"] for each in ranked) == pytest.approx(1)
    assert llm.classify_labels(["import", "import"], labels, top_k=1) == [ranked[0]] * 2


def test_long_texts_are_scored_in_row_pieces(tmp_path):
    """Logits of all rows at once would be more than the budget that the model gets."""
    folder = write_tiny("llama", tmp_path / "m", vocab_size=5001, max_position_embeddings=512)
    ids = torch.randint(2, 5000, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    with LLM(folder, machine="sim-default", device="cpu", threads=1, memory={"host": "3MiB"}) as llm:
        (found,) = llm.score([ids[:4]], [ids[4:]])
        assert len(found.token_logprobs) == 296
        assert 300 * 5001 * 4 > 3 * 2**20 >= llm.stats.peak_bytes["host"]
        assert len(llm.stats.passes) > 1


def test_an_empty_context_is_the_token_that_begins_a_text(llm):
    (found,) = llm.score([""], ["import os"])
    spec = llm.model.spec
    first = spec.bos_id if spec.bos_id is not None else spec.eos_ids[0]
    (same,) = llm.score([[first]], [found.token_ids])
    assert same == found


@pytest.mark.parametrize(
    ("prompts", "continuations", "code"),
    [
        (["a"], ["b", "c"], "ZI-1116"),
        ("a", "b", "ZI-1116"),
        (["a"], [""], "ZI-1113"),
        (["a"], [[1]], "ZI-1114"),
        ([[1]], [[10**9]], "ZI-1106"),
        ([[1] * 2000], [[1]], "ZI-1107"),
    ],
)
def test_what_cannot_be_scored_is_refused(llm, prompts, continuations, code):
    with pytest.raises(UsageError, match=code):
        llm.score(prompts, continuations)
