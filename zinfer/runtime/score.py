"""Likelihood of given text.  In: context and continuation ids.  Out: a request that samples nothing, and its Score.

Scored requests ride the same passes as generation.  Only rows whose next token is scored have logits, as many per
pass as the plan has room for, and their log-softmax is taken a slab of rows at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zinfer.errors import UsageError
from zinfer.runtime.model import Model
from zinfer.runtime.request import Request
from zinfer.sampling.params import SamplingParams
from zinfer.spec.sampling_cost import slab_rows
from zinfer.tokenizer import Tokenizer

NOTHING_SAMPLED = SamplingParams(max_tokens=1, temperature=0.0, seed=0)


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a continuation is: natural log of its probability given the context, whole and per token.

    `is_greedy`: whether greedy decoding would have written it.
    """

    logprob: float
    token_logprobs: list[float]
    token_ids: list[int]
    is_greedy: bool


@dataclass(slots=True)
class Scorer:
    """Takes the logits of one request as passes bring them."""

    context_ids: Sequence[int]
    token_ids: list[int]
    logprobs: list[float] = field(default_factory=list)
    is_greedy: bool = True

    def request(self, number: int) -> Request:
        """The request to run; its last token is never fed, since nothing follows it."""
        ids = [*self.context_ids, *self.token_ids]
        return Request(
            number, ids[:-1], NOTHING_SAMPLED, 0, on_logits=self.take, logits_from=len(self.context_ids) - 1
        )

    def take(self, position: int, logits_nV: Tensor) -> None:
        """fp32 logits [n, V] of the rows from `position` on, in order; each is asked about the token behind it."""
        first = position + 1 - len(self.context_ids)
        targets = self.token_ids[first : first + len(logits_nV)]
        size = slab_rows(logits_nV.shape[1])
        for start in range(0, len(targets), size):
            self._take_slab(logits_nV[start : start + size], targets[start : start + size])

    def score(self) -> Score:
        """What came together, when the request has ended."""
        assert len(self.logprobs) == len(self.token_ids), "a request ends with its last row"
        # Summed exactly: the sum must not depend on how the rows were cut into passes.
        total = float(torch.tensor(self.logprobs, dtype=torch.float64).sum())
        return Score(total, self.logprobs, self.token_ids, self.is_greedy)

    def _take_slab(self, logits_nV: Tensor, targets: list[int]) -> None:
        wanted_n1 = torch.tensor(targets, device=logits_nV.device)[:, None]
        found = logits_nV.gather(-1, wanted_n1)[:, 0] - torch.logsumexp(logits_nV, -1)
        self.logprobs += found.tolist()
        self.is_greedy &= bool((logits_nV.argmax(-1) == wanted_n1[:, 0]).all())


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
