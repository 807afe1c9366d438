"""A checkpoint whose continuations are known.  In: a shape, requests with lengths.  Out: weights, and what must come.

The work is that of any checkpoint of the shape: dense random layers, run in full.  Only embedding and head are made so
that the token t is followed by `next_of[t]`, with a margin of tens of logits that no rounding of any engine or format
crosses: the embedding is large beside what the layers add, and the head's row of a token is the embedding of the token
before it.  Each request's last prompt token begins a chain of its own that ends in the end-of-sequence token after as
many tokens as the request is to have.  So every engine stops by the ordinary end token, none can know when before it
has computed the token, and the whole output of every engine can be checked, token for token.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FIRST_ID = 300  # smaller ids are left to special tokens
EMBEDDING_RMS = 8.0  # layers of random weights add about 4
FACTS = "known.json"


@dataclass(frozen=True, slots=True)
class Ragged:
    """A request: prompt ids, and how many tokens come, the end token included."""

    prompt: list[int]
    length: int


@dataclass(frozen=True, slots=True)
class Known:
    """What a checkpoint of this kind must say."""

    next_of: list[int]
    eos: int
    requests: list[Ragged]

    def follow(self, prompt: Sequence[int], limit: int, *, ignore_eos: bool = False) -> list[int]:
        """The tokens after `prompt`: up to the end token, at most `limit`."""
        found, token = [], prompt[-1]
        while len(found) < limit and (ignore_eos or not found or found[-1] != self.eos):
            token = self.next_of[token]
            found.append(token)
        return found

    def prompts(self, count: int, shortest: int, longest: int, seed: int = 1) -> list[list[int]]:
        """Prompts of random lengths that begin no chain; for runs that ignore the end token."""
        draw = random.Random(seed)
        free = range(FIRST_ID, len(self.next_of))
        return [draw.choices(free, k=draw.randint(shortest, longest)) for _ in range(count)]


def chains(
    vocab: int, eos: int, count: int, prompts: tuple[int, int], outputs: tuple[int, int], seed: int
) -> tuple[Known, list[int]]:
    """Requests in arrival order and the successor of every token; and the tokens that end a chain, all alike.

    Tokens that no chain needs follow each other in one cycle.  Raises ValueError where the vocabulary is too small.
    """
    draw = random.Random(seed)
    lengths = [draw.randint(*outputs) for _ in range(count)]
    free = list(range(FIRST_ID, vocab))
    draw.shuffle(free)
    if sum(lengths) + 2 > len(free):
        raise ValueError(f"{sum(lengths)} tokens of chains do not fit into a vocabulary of {vocab}")
    next_of, requests, lasts = [eos] * vocab, [], []
    chained = [
        [free.pop() for _ in range(length)] for length in lengths
    ]  # the first one is the prompt's last
    for chain in chained:
        for token, follower in zip(chain, [*chain[1:], eos], strict=True):
            next_of[token] = follower
        lasts.append(chain[-1])
        size = draw.randint(*prompts)
        requests.append(Ragged([*draw.choices(free, k=size - 1), chain[0]], len(chain)))
    cycle = [*free, *range(eos), *range(eos + 1, FIRST_ID)]
    for token, follower in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
        next_of[token] = follower
    next_of[eos] = cycle[0]
    return Known(next_of, eos, requests), lasts


def weights(known: Known, lasts: Sequence[int], width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Embedding and head [vocab, width] float32.  All `lasts` share one embedding: one head row answers them all.

    So do the end token and the other one with its follower."""
    vocab = len(known.next_of)
    embedding = np.random.default_rng(seed).standard_normal((vocab, width), np.float32) * EMBEDDING_RMS
    embedding[lasts] = embedding[lasts[0]]
    twin = next(token for token, then in enumerate(known.next_of) if then == known.next_of[known.eos])
    embedding[known.eos] = embedding[
        twin if twin != known.eos else known.next_of.index(known.next_of[twin], twin + 1)
    ]
    head = np.zeros_like(embedding)
    next_of = np.array(known.next_of)
    tokens = np.flatnonzero((np.arange(vocab) != known.eos) & (next_of != known.eos))
    for each in (tokens, np.array([lasts[0]])):
        head[next_of[each]] = embedding[each] / np.float32(EMBEDDING_RMS * width**0.5)
    return embedding, head


def to_bf16(values: np.ndarray) -> bytes:
    """float32 as little-endian bf16 words, rounded to nearest."""
    words = values.astype("<f4").view("<u4")
    return ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype("<u2").tobytes()


def overwrite(file: Path, tensors: dict[str, bytes]) -> None:
    """Replace whole tensors of a safetensors file in place.  Raises KeyError, ValueError for names and sizes."""
    with file.open("r+b") as opened:
        start = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(start))
        for name, content in tensors.items():
            begin, end = header[name]["data_offsets"]
            if end - begin != len(content):
                raise ValueError(f"{name} has {end - begin} bytes, {len(content)} were given")
            opened.seek(8 + start + begin)
            opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def rewrite(
    folder: Path,
    count: int = 128,
    prompts: tuple[int, int] = (16, 128),
    outputs: tuple[int, int] = (8, 64),
    seed: int = 0,
) -> None:
    """Turn a random Llama checkpoint of one file, head untied, into a known one, and write down what it says."""
    config = json.loads((folder / "config.json").read_text())
    vocab, width, eos = config["vocab_size"], config["hidden_size"], config["eos_token_id"]
    known, lasts = chains(vocab, eos, count, prompts, outputs, seed)
    embedding, head = weights(known, lasts, width, seed)
    changed = {"model.embed_tokens.weight": to_bf16(embedding), "lm_head.weight": to_bf16(head)}
    overwrite(folder / "model.safetensors", changed)
    facts = {
        "eos": eos,
        "next_of": known.next_of,
        "requests": [{"prompt": each.prompt, "length": each.length} for each in known.requests],
    }
    partial = folder / (FACTS + ".partial")
    partial.write_text(json.dumps(facts))
    partial.replace(folder / FACTS)


def read_known(folder: Path) -> Known:
    """What `rewrite` wrote."""
    facts = json.loads((folder / FACTS).read_text())
    return Known(facts["next_of"], facts["eos"], [Ragged(**each) for each in facts["requests"]])
