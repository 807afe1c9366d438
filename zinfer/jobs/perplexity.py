"""What quantising cost in words.  In: a store, the model it was made from, a text.  Out: the perplexity of both."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zinfer.api import LLM
from zinfer.checkpoint.index import STORE_FILE
from zinfer.chunks.manifest import read_manifest
from zinfer.errors import UsageError
from zinfer.spec.quant import PERPLEXITY_LIMITS
from zinfer.tokenizer import Tokenizer
from zinfer.watch import Watch, unwatched

HELD_OUT = "heldout.txt"  # a text beside a model's weights on which it was not trained


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp of the mean negative log probability of `num_tokens` tokens, by the published weights and by the store's.

    `limit` is how much it may rise, as a share, for weights that look trained.
    """

    text: str
    num_tokens: int
    published: float
    stored: float
    limit: float

    @property
    def rise(self) -> float:
        """By what share of it perplexity has grown."""
        return self.stored / self.published - 1

    @property
    def is_close(self) -> bool:
        """Whether that is what the format promises; what is no number is not."""
        return self.rise <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"rise": self.rise}


def text_beside(model: Path, text: Path | None) -> Path | None:
    """The text to measure on: the one named, or the one that lies beside the weights, if any."""
    return text or (model / HELD_OUT if (model / HELD_OUT).is_file() else None)


def compare_perplexity(
    store: Path, published: Path, text: Path, *, watch: Watch = unwatched, **options: Any
) -> Perplexity:
    """Run both on the whole text, in windows of the model's context that share nothing; `options` are those of LLM.

    Raises UsageError ZI-1118 for a text without two tokens, and what LLM raises.
    """
    before, num_tokens = perplexity(published, text, watch=watch, **options)
    after, _ = perplexity(store, text, watch=watch, **options)
    weights = read_manifest(store).weights if (store / STORE_FILE).is_file() else ""
    return Perplexity(str(text), num_tokens, before, after, PERPLEXITY_LIMITS.get(weights, 0.0))


def perplexity(folder: Path, text: Path, *, watch: Watch = unwatched, **options: Any) -> tuple[float, int]:
    """Of one model on a text, and of how many tokens: every token but the first, each window after that first one."""
    with LLM(folder, watch=watch, **options) as llm:
        first, *ids = _read(text, llm.model.need_tokenizer())
        size = llm.model.max_text_tokens - 1
        windows = [ids[at : at + size] for at in range(0, len(ids), size)]
        scores = llm.score([[first]] * len(windows), windows)
    return math.exp(-math.fsum(score.logprob for score in scores) / len(ids)), len(ids)


def _read(path: Path, tokenizer: Tokenizer) -> list[int]:
    """At least two tokens."""
    try:
        ids, reason = tokenizer.encode(path.read_text(encoding="utf-8")), "it has less than two tokens"
    except (OSError, ValueError) as error:
        ids, reason = [], str(error)
    if len(ids) < 2:
        raise UsageError(
            "ZI-1118",
            f"no perplexity can be measured on {path}: {reason}",
            remedy="--text FILE with some pages of text in UTF-8",
        )
    return ids
