"""A request's life.  In: prompt ids and SamplingParams.  Out: a RequestOutput in the field's usual shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from zinfer.errors import ZinferError
from zinfer.kvcache.pages import Fork
from zinfer.sampling.params import SamplingParams

Logprobs = dict[int, float]  # token id -> natural log of its probability, before any processing


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """What one request generated.  `finish_reason`: "stop" or "length"; `stop_reason`: the string or id."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[Logprobs] | None
    finish_reason: str
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """When things happened, in seconds of `time.perf_counter`: the request was queued, each token was drawn."""

    arrival_s: float
    token_s: list[float]


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A prompt and its completions (one, at present; none where `error` says why), as `LLM.generate` returns them."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    error: ZinferError | None = None  # why there are no outputs
    metrics: RequestMetrics | None = None

    def to_dict(self) -> dict[str, object]:
        """The documented JSON form, one line of an output file."""
        if self.error is not None:
            return {"id": self.request_id, "prompt": self.prompt, "error": self.error.to_dict()}
        best = self.outputs[0]
        return {
            "id": self.request_id,
            "prompt": self.prompt,
            "prompt_tokens": len(self.prompt_token_ids),
            "text": best.text,
            "token_ids": best.token_ids,
            "logprobs": best.logprobs,
            "finish_reason": best.finish_reason,
            "stop_reason": best.stop_reason,
        }


class Part(NamedTuple):
    """`num_tokens` tokens of one branch, from its token `start` on; the branch has `length` tokens in all."""

    start: int
    num_tokens: int
    fork: Fork | None
    length: int


@dataclass(slots=True, eq=False)
class Request:
    """A sequence on its way: waiting (no pages) -> prefill pieces -> decode -> finished.

    Preemption takes the pages away; what was committed is then read back or fed again, outputs included.  With
    `on_logits` nothing is sampled: it receives (position, fp32 logits [n, V]) of the prompt's rows from `logits_from`
    on, in order, and the request ends with its prompt.

    A prompt may branch: from each token in `forks` on it does not follow what stands before it but the first `trunk`
    tokens, which are fed once.  The scheduler and the cache's books see one sequence; `parts` are its branches.
    """

    id: int  # grows in order of arrival
    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    prompt: str | None = None
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    num_committed: int = 0  # tokens whose keys and values are in the cache
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    on_logits: Callable[[int, Tensor], None] | None = None
    logits_from: int = 0
    trunk: int = 0
    forks: tuple[int, ...] = ()
    num_shared: int = 0  # tokens that a request for each branch would have fed beside these
    arrival_s: float = 0.0  # perf_counter when it was queued
    token_s: list[float] = field(default_factory=list)  # and when each token was drawn

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def max_kv_tokens(self) -> int:
        """The most the cache will ever hold for it (the last sampled token is never fed back)."""
        return len(self.prompt_ids) + (0 if self.on_logits else self.params.max_tokens)

    @property
    def is_decoding(self) -> bool:
        """Whether all it has to feed is the token sampled last."""
        return bool(self.output_ids) and self.num_committed == self.num_tokens - 1

    def next_ids(self, limit: int) -> list[int]:
        """The next at most `limit` tokens to feed: a piece of the prompt, or of what was sampled."""
        start = self.num_committed
        if start < len(self.prompt_ids):
            return self.prompt_ids[start : start + limit]
        return self.output_ids[start - len(self.prompt_ids) :][:limit]

    def parts(self, start: int, stop: int) -> Iterator[Part]:
        """Tokens start .. stop - 1, branch by branch."""
        if not self.forks:
            if start < stop:
                yield Part(start, stop - start, None, self.num_tokens)
            return
        for begin, end in pairwise((0, *self.forks, self.num_tokens)):
            low, high = max(start, begin), min(stop, end)
            if low < high:
                shift = begin - self.trunk if begin else 0
                fork = Fork(self.trunk, shift) if shift else None
                yield Part(low - shift, high - low, fork, end - shift)

    def is_sampling_at(self, stop: int) -> bool:
        """Whether a pass that feeds tokens up to `stop` ends at its last known token, so that it must sample."""
        return self.on_logits is None and stop == self.num_tokens

    def num_logit_rows(self, start: int, stop: int) -> int:
        """How many of the rows of tokens start .. stop - 1 want logits; they are the last ones."""
        if self.on_logits is None:
            return int(self.is_sampling_at(stop))
        return max(stop - max(self.logits_from, start), 0)
