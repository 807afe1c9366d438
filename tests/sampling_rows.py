"""Rows to sample from: every option once, and sequences that ask for them."""

from dataclasses import dataclass, field

import torch

from zinfer.sampling.params import SamplingParams


@dataclass
class Sequence:
    params: SamplingParams
    seed: int = 0
    prompt_ids: list = field(default_factory=list)
    output_ids: list = field(default_factory=list)


MIXED = [
    {},
    {"temperature": 0},
    {"top_k": 5},
    {"top_k": 300, "top_p": 0.9},
    {"top_p": 0.5, "min_p": 0.01},
    {"top_p": 0.9999, "temperature": 3.0},
    {"repetition_penalty": 1.3},
    {"logprobs": 4},
]


def mixed_rows(count=24, vocab=1500):
    logits = torch.randn(count, vocab, generator=torch.Generator().manual_seed(2)) * 3
    rows = [
        Sequence(SamplingParams(**MIXED[i % len(MIXED)]), seed=i, prompt_ids=[i, 5], output_ids=[7] * i)
        for i in range(count)
    ]
    return logits, rows
