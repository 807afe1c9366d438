"""What a caller wants sampled.  In: keyword arguments or a mapping.  Out: checked, frozen SamplingParams."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches

from zinfer.errors import UsageError

_ALIASES = {"max_new_tokens": "max_tokens"}
MAX_LOGPROBS = 100


@dataclass(frozen=True, slots=True, init=False)
class SamplingParams:
    """How one request's tokens are drawn and when it ends.

    `temperature` 0 is greedy.  `top_k` 0, `top_p` 1 and `min_p` 0 mean off; they apply in this order, after the
    temperature, as in transformers.  `repetition_penalty` weighs prompt and output (Keskar et al. 2019).
    `min_tokens` keeps end tokens out and stop strings unheeded before so many tokens.  `logprobs` n adds the
    natural logarithms of the drawn token's probability and of the n likeliest, before any processing.
    `seed` None draws one per request.  Any wrong name or value is a UsageError ZI-1301 / ZI-1302.
    """

    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    logprobs: int | None
    seed: int | None

    def __init__(
        self,
        max_tokens: int = 16,
        min_tokens: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: str | Iterable[str] | None = None,
        stop_token_ids: Iterable[int] | None = None,
        ignore_eos: bool = False,
        logprobs: int | None = None,
        seed: int | None = None,
        **unknown: object,
    ) -> None:
        for name in unknown:
            raise _unknown_name(name)
        stops = (stop,) if isinstance(stop, str) else _tuple("stop", stop)
        values = {
            "max_tokens": _integer("max_tokens", max_tokens, 1),
            "min_tokens": _integer("min_tokens", min_tokens, 0, max_tokens),
            "temperature": _number("temperature", temperature, 0, math.inf),
            "top_k": _integer("top_k", top_k, 0),
            "top_p": _number("top_p", top_p, 0, 1, is_open=True),
            "min_p": _number("min_p", min_p, 0, 1),
            "repetition_penalty": _number(
                "repetition_penalty", repetition_penalty, 0, math.inf, is_open=True
            ),
            "stop": tuple(_text("stop", text) for text in stops),
            "stop_token_ids": tuple(
                _integer("stop_token_ids", id_, 0) for id_ in _tuple("stop_token_ids", stop_token_ids)
            ),
            "ignore_eos": _flag("ignore_eos", ignore_eos),
            "logprobs": None if logprobs is None else _integer("logprobs", logprobs, 0, MAX_LOGPROBS),
            "seed": None if seed is None else _integer("seed", seed, 0, 2**64 - 1),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> SamplingParams:
        """The same from a mapping (a line of a job file), where `max_new_tokens` also names `max_tokens`."""
        named: dict[str, object] = {}
        for name, value in values.items():
            known = _ALIASES.get(name, name)
            if known == "self":  # to Python a second first argument
                raise _unknown_name(name)
            if known in named:
                raise _refusal(known, value, f"given once, not as {' and '.join(_ALIASES)} too")
            named[known] = value
        return cls(**named)  # type: ignore[arg-type]  # the constructor checks every value


def _unknown_name(name: str) -> UsageError:
    known = [field.name for field in fields(SamplingParams)]
    close = get_close_matches(_ALIASES.get(name, name), known, n=1, cutoff=0.5)
    return UsageError(
        "ZI-1301",
        f"SamplingParams has no parameter {name!r}",
        remedy=f"use {close[0]}" if close else f"use one of {', '.join(known)}",
    )


def _refusal(name: str, value: object, wanted: str) -> UsageError:
    return UsageError("ZI-1302", f"{name} is {value!r}", remedy=f"{name} must be {wanted}")


def _integer(name: str, value: object, low: int, high: int | None = None) -> int:
    # bool is an int to Python; top_k=True is a mistake all the same.
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or value < low
        or (high is not None and value > high)
    ):
        span = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise _refusal(name, value, f"a whole number {span}")
    return value


def _number(name: str, value: object, low: float, high: float, *, is_open: bool = False) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
        if math.isfinite(number) and number <= high and (low < number if is_open else low <= number):
            return number
    bound = f"above {low:g}" if is_open else f"of at least {low:g}"
    raise _refusal(name, value, f"a number {bound}" + (f" and at most {high:g}" if high < math.inf else ""))


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _refusal(name, value, "true or false")
    return value


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise _refusal(name, value, "a string that is not empty, or a list of such")
    return value


def _tuple(name: str, value: object) -> tuple[object, ...]:
    if value is None:
        return ()
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise _refusal(name, value, "a list")
    return tuple(value)
