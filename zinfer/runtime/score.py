"""Likelihood of given text.  In: context and continuation ids.  Out: requests that sample nothing, and Scores.

Scored requests ride the same passes as generation.  A context is fed once and its continuations branch from it.  Only
rows whose next token is scored have logits, as many per pass as the plan has room for, and their log-softmax is taken a
slab of rows at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zinfer.errors import UsageError
from zinfer.layers.rotary import length_class
from zinfer.runtime.model import Model
from zinfer.runtime.request import Request
from zinfer.sampling.params import SamplingParams
from zinfer.spec.sampling_cost import slab_rows
from zinfer.tokenizer import Tokenizer

NOTHING_SAMPLED = SamplingParams(max_tokens=1, temperature=0.0, seed=0)
_BRANCH_TOKENS = (
    1024  # of one request: its cache is taken whole, so that many continuations are several requests
)


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a continuation is: natural log of its probability given the context, whole and per token.

    `is_greedy`: whether greedy decoding would have written it.
    """

    logprob: float
    token_logprobs: list[float]
    token_ids: list[int]
    is_greedy: bool


@dataclass(slots=True, eq=False)
class Scorer:
    """One continuation and what came together of its score."""

    context_ids: Sequence[int]
    token_ids: list[int]
    logprobs: list[float] = field(default_factory=list)
    is_greedy: bool = True

    @property
    def fed_ids(self) -> list[int]:
        """What is fed behind the context: nothing follows the last token."""
        return self.token_ids[:-1]

    def take(self, logprob: float, is_best: bool) -> None:
        """Of the next token."""
        self.logprobs.append(logprob)
        self.is_greedy &= is_best

    def score(self) -> Score:
        """What came together, when the request has ended."""
        assert len(self.logprobs) == len(self.token_ids), "a request ends with its last row"
        # Summed exactly: the sum must not depend on how the rows were cut into passes.
        total = float(torch.tensor(self.logprobs, dtype=torch.float64).sum())
        return Score(total, self.logprobs, self.token_ids, self.is_greedy)


class Branches:
    """Continuations of one context in one request: takes the logits as passes bring them."""

    def __init__(self, scorers: Sequence[Scorer]) -> None:
        self.scorers = list(scorers)
        self.context_ids = scorers[0].context_ids
        # Whom the row of each token, from the context's last on, asks, and for which next token.
        self._asking: list[list[tuple[Scorer, int]]] = [[]]
        for scorer in self.scorers:
            first, *others = scorer.token_ids
            self._asking[0].append((scorer, first))
            self._asking += [[(scorer, token)] for token in others]

    def halves(self) -> tuple[Branches, Branches]:
        """The same continuations in two requests."""
        middle = len(self.scorers) // 2
        return Branches(self.scorers[:middle]), Branches(self.scorers[middle:])

    def request(self, number: int) -> Request:
        """The request to run."""
        ids, forks = list(self.context_ids), []
        for scorer in self.scorers:
            if len(ids) > len(self.context_ids) and scorer.fed_ids:
                forks.append(len(ids))
            ids += scorer.fed_ids
        trunk = len(self.context_ids)
        return Request(
            number,
            ids,
            NOTHING_SAMPLED,
            0,
            on_logits=self.take,
            logits_from=trunk - 1,
            trunk=trunk,
            forks=tuple(forks),
            num_shared=trunk * (len(self.scorers) - 1),
        )

    def take(self, position: int, logits_nV: Tensor) -> None:
        """fp32 logits [n, V] of the rows of the request's tokens from `position` on, in order."""
        first, size = position + 1 - len(self.context_ids), slab_rows(logits_nV.shape[1])
        for start in range(0, len(logits_nV), size):
            slab_nV = logits_nV[start : start + size]
            self._take_slab(slab_nV, self._asking[first + start : first + start + len(slab_nV)])

    def _take_slab(self, logits_nV: Tensor, asking: Sequence[Sequence[tuple[Scorer, int]]]) -> None:
        asked = [(row, *each) for row, of_row in enumerate(asking) for each in of_row]
        places = torch.tensor([[row, token] for row, _, token in asked], device=logits_nV.device)
        rows, tokens = places.unbind(1)
        found = (logits_nV[rows, tokens] - torch.logsumexp(logits_nV, -1)[rows]).tolist()
        are_best = (logits_nV.argmax(-1)[rows] == tokens).tolist()
        for (_, scorer, _), logprob, is_best in zip(asked, found, are_best, strict=True):
            scorer.take(logprob, is_best)


def branched(model: Model, scorers: Iterable[Scorer]) -> Iterator[Branches]:
    """Put continuations of one context together, in requests that are no longer than the model's context.

    Where rotary angles depend on a sequence's length, those whose lengths agree.
    """
    alike: dict[tuple[int, ...], list[Scorer]] = defaultdict(list)
    for scorer in scorers:
        length = len(scorer.context_ids) + len(scorer.fed_ids)
        kind = length_class(model.spec.rope, length) if model.spec.rope else 0
        alike[kind, *scorer.context_ids].append(scorer)
    for group in alike.values():
        trunk, held, together = len(group[0].context_ids), 0, list[Scorer]()
        most = min(max(_BRANCH_TOKENS, trunk), model.max_text_tokens - trunk)
        for scorer in group:
            if together and held + len(scorer.fed_ids) > most:
                yield Branches(together)
                held, together = 0, []
            held += len(scorer.fed_ids)
            together.append(scorer)
        yield Branches(together)


def scorer_of(model: Model, prompt: str | Sequence[int], continuation: str | Sequence[int]) -> Scorer:
    """Both as token ids, checked.

    Text is cut where lm-evaluation-harness cuts it: both parts are encoded together, blanks at the context's end
    belong to the continuation; an empty context stands for the token that begins a text.  Raises UsageError ZI-1105
    to ZI-1107, ZI-1115, ZI-1113 (no continuation), ZI-1114 (text beside ids), CheckpointError ZI-4601.
    """
    model.check_kind(labels=False)
    if isinstance(prompt, str) and isinstance(continuation, str):
        context_ids, ids = _encode_pair(model.need_tokenizer(), prompt, continuation)
    elif not isinstance(prompt, str) and not isinstance(continuation, str):
        context_ids, ids = list(prompt), list(continuation)
    else:
        raise UsageError(
            "ZI-1114",
            "a prompt and its continuation are both text or both token ids; one of each was given",
            remedy='llm.score(["The sky is"], [" blue"])',
        )
    context_ids = context_ids or _beginning(model)
    if not ids:
        raise UsageError(
            "ZI-1113",
            f"the continuation {continuation!r:.60} has no tokens",
            remedy="give at least one token",
        )
    model.check_prompt([*context_ids, *ids], 0)
    return Scorer(context_ids, ids)


def _encode_pair(tokenizer: Tokenizer, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
    kept = prompt.rstrip()
    continuation = prompt[len(kept) :] + continuation
    if not kept:
        return [], tokenizer.encode(continuation, add_special_tokens=False)
    context_ids = tokenizer.encode(kept)
    return context_ids, tokenizer.encode(kept + continuation)[len(context_ids) :]


def _beginning(model: Model) -> list[int]:
    """What stands before a text that has nothing before it."""
    first = [token for token in (model.spec.bos_id, *model.spec.eos_ids) if token is not None]
    if not first:
        raise UsageError(
            "ZI-1105",
            "the prompt has no tokens, and the model names none that begins a text",
            remedy="give at least one token before the continuation",
        )
    return first[:1]
