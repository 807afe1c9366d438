"""Synthetic requests.  In: ranges of lengths, a seed.  Out: prompts of random ids, and how many tokens each wants."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from zinfer.errors import UsageError


@dataclass(frozen=True, slots=True)
class Span:
    """A range of whole numbers, both ends included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str, flag: str) -> Span:
        """ "128" or "16-128".  Raises UsageError ZI-1121 for anything else, naming the flag."""
        low, dash, high = text.partition("-")
        if low.isdecimal() and (high.isdecimal() if dash else True):
            found = cls(int(low), int(high if dash else low))
            if 1 <= found.low <= found.high:
                return found
        raise UsageError(
            "ZI-1121",
            f"{flag} wants a number of tokens or a range of them, smaller end first; {text!r} was given",
            remedy=f"{flag} 16-128",
        )

    def draw(self, source: random.Random) -> int:
        """One number, all equally likely."""
        return source.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the engine: prompt i wants `gen_lens[i]` tokens, no end token heeded."""

    prompts: list[list[int]]
    gen_lens: list[int]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def longest_gen(self) -> int:
        """The most tokens that one request wants."""
        return max(self.gen_lens)


def random_load(vocab_size: int, num_prompts: int, prompt_len: Span, gen_len: Span, seed: int) -> Load:
    """The same arguments always give the same requests.  Raises UsageError ZI-1122 without a request."""
    if num_prompts < 1:
        raise UsageError(
            "ZI-1122",
            f"at least one prompt is wanted, {num_prompts} were asked for",
            remedy="--num-prompts 8",
        )
    source = random.Random(seed)
    lengths = [(prompt_len.draw(source), gen_len.draw(source)) for _ in range(num_prompts)]
    prompts = [[source.randrange(vocab_size) for _ in range(length)] for length, _ in lengths]
    return Load(prompts, [gen for _, gen in lengths])


def poisson_arrivals(count: int, per_s: float, seed: int) -> Iterator[float]:
    """Seconds from the start at which requests arrive: independent users, `per_s` of them a second on average."""
    source = random.Random(seed)
    at_s = 0.0
    for _ in range(count):
        yield at_s
        at_s += source.expovariate(per_s)
