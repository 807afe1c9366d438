"""What is sent back.  In: an ask and what was served.  Out: the JSON value of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import torch
from torch import Tensor

from zinfer.layers.pooling import normalised
from zinfer.runtime.labels import ranked_rows
from zinfer.serving.asks import Ask, EmbedInputs, EmbedTexts, PredictInputs, PredictTexts
from zinfer.serving.seams import TextModel
from zinfer.students.scheduler import Served
from zinfer.tokenizer import Encoded

FEW_NUMBERS = (
    2048  # an answer of fewer is written on the event loop: handing it to a thread would take longer
)


@dataclass(frozen=True, slots=True)
class Answered:
    """A request's texts, each with what was served for it."""

    ask: Ask
    texts: tuple[Encoded, ...]
    served: tuple[Served, ...]

    @property
    def num_students(self) -> int:
        """The fewest that answered any of the texts."""
        return min(one.num_students for one in self.served)

    @property
    def num_deferred(self) -> int:
        """Texts that the teacher answered."""
        return sum(one.is_deferred for one in self.served)

    @property
    def tokens(self) -> int:
        """Of all texts, special ones included."""
        return sum(len(text.ids) for text in self.texts)

    @property
    def num_numbers(self) -> int:
        """About how many numbers the answer holds."""
        one = self.served[0]
        is_embed = isinstance(self.ask, EmbedInputs | EmbedTexts)
        found = one.representation_D if is_embed or one.logits_C is None else one.logits_C
        return len(self.served) * len(found)


def written(answered: Answered, model: TextModel) -> bytes:
    """The body: TEI's for `inputs`; for `texts` one object with a result per text, in order."""
    ask = answered.ask
    results = _results(ask, answered.served, model)
    if not ask.is_plain:
        return _json(results[0] if ask.is_one else results)
    name = "labels" if isinstance(ask, PredictTexts) else "embedding"
    rows = [
        {name: result} | _who(text, one)
        for result, text, one in zip(results, answered.texts, answered.served, strict=True)
    ]
    return _json({"results": rows, "students": answered.num_students, "of": model.num_students})


def _who(text: Encoded, served: Served) -> dict[str, Any]:
    return {
        "students": served.num_students,
        "deferred": served.is_deferred,
        "tokens": len(text.ids),
        "truncated": text.is_cut,
    }


def _results(ask: Ask, served: Sequence[Served], model: TextModel) -> Sequence[Any]:
    if isinstance(ask, PredictInputs | PredictTexts):
        logits = [one.logits_C for one in served if one.logits_C is not None]
        assert len(logits) == len(served), "predict was refused where there is no head"
        top_k = ask.top_k if isinstance(ask, PredictTexts) else None
        scoring = "none" if ask.raw_scores else model.scoring
        return ranked_rows(_finite(torch.stack(logits)), model.labels, scoring, top_k)
    rows_ND = _finite(torch.stack([one.representation_D for one in served]))
    return list((normalised(rows_ND) if ask.normalize else rows_ND).numpy())


def _finite(numbers: Tensor) -> Tensor:
    """JSON has no word for what is no number; orjson would write null."""
    if not torch.isfinite(numbers).all():
        raise ValueError("an answer that is no number")
    return numbers


def _json(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
