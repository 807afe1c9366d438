"""A request's life.  In: prompt ids and SamplingParams.  Out: a RequestOutput in the field's usual shape."""

from __future__ import annotations

from dataclasses import dataclass, field

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
class RequestOutput:
    """A prompt and its completions (one, at present), as `LLM.generate` returns them."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]

    def to_dict(self) -> dict[str, object]:
        """The documented JSON form, one line of an output file."""
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


@dataclass(slots=True)
class Request:
    """A sequence on its way: WAITING (no pages) -> prefill pieces -> decode -> finished."""

    id: int
    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    prompt: str | None = None
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    num_committed: int = 0  # tokens whose keys and values are in the cache
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def max_kv_tokens(self) -> int:
        """The most the cache will ever hold for it (the last sampled token is never fed back)."""
        return len(self.prompt_ids) + self.params.max_tokens

    def next_ids(self, limit: int) -> list[int]:
        """The next at most `limit` tokens to feed: a piece of the prompt, or the token sampled last."""
        start = self.num_committed
        if start < len(self.prompt_ids):
            return self.prompt_ids[start : start + limit]
        return self.output_ids[start - len(self.prompt_ids) :][:limit]

    def is_sampling_after(self, num_new: int) -> bool:
        """Whether a pass that feeds `num_new` tokens ends at its last known token, so that it must sample."""
        return self.num_committed + num_new == self.num_tokens
