"""Class logits as people read them.  In: logits [C] and names.  Out: labels with scores, likeliest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from zinfer.errors import UsageError
from zinfer.runtime.model import Model
from zinfer.runtime.request import Request
from zinfer.runtime.score import NOTHING_SAMPLED

Label: TypeAlias = dict[str, Any]  # {"label": str, "score": float}, as transformers' pipelines give it


@dataclass(slots=True)
class Labelled:
    """A text on its way through a classification head; `logits_C` is fp32 [C] when its request has ended."""

    ids: list[int]
    logits_C: Tensor | None = None

    @classmethod
    def of(cls, model: Model, text: str | list[int]) -> Labelled:
        """Encoded and checked.  Raises UsageError ZI-1105 to ZI-1107, ZI-1115, CheckpointError ZI-4601."""
        model.check_kind(labels=True)
        ids = model.need_tokenizer().encode(text) if isinstance(text, str) else list(text)
        model.check_prompt(ids, 0)
        # The head reads the last token that is not padding; what stands behind it changes nothing.
        while len(ids) > 1 and ids[-1] == model.spec.pad_id:
            del ids[-1]
        return cls(ids)

    def request(self, number: int) -> Request:
        """The request to run: a prefill whose last row goes through the head."""
        return Request(
            number, self.ids, NOTHING_SAMPLED, 0, on_logits=self.take, logits_from=len(self.ids) - 1
        )

    def take(self, _position: int, logits_1C: Tensor) -> None:
        """The head's row."""
        self.logits_C = logits_1C[0].cpu()

    def ranked(self, model: Model, top_k: int | None) -> list[Label]:
        """Labels with scores, when the request has ended."""
        assert self.logits_C is not None, "a request ends with its last row"
        return ranked(self.logits_C, model.spec.labels, model.spec.scoring, top_k)


def ranked(logits_C: Tensor, names: Sequence[str], scoring: str, top_k: int | None) -> list[Label]:
    """The `top_k` best labels (None: all) of fp32 logits [C]; `scoring` is "softmax", "sigmoid" each, or "none"."""
    return ranked_rows(logits_C[None], names, scoring, top_k)[0]


def ranked_rows(
    logits_NC: Tensor, names: Sequence[str], scoring: str, top_k: int | None
) -> list[list[Label]]:
    """`ranked` of each row: a few operations for all of them, since reading numbers one by one costs more than a pass
    of a small model."""
    match scoring:
        case "softmax":
            scores = torch.softmax(logits_NC, -1)
        case "sigmoid":
            scores = torch.sigmoid(logits_NC)
        case _:
            scores = logits_NC
    best = torch.sort(scores, dim=-1, descending=True, stable=True)
    rows = zip(best.indices[:, :top_k].tolist(), best.values[:, :top_k].tolist(), strict=True)
    return [
        [{"label": names[at], "score": score} for at, score in zip(order, values, strict=True)]
        for order, values in rows
    ]


def shaped(results: Sequence[list[Label]], *, is_one: bool, top_k: int | None) -> Any:
    """As pipelines shape it: with top_k=1 a label per text, else a list of them; one text gives its own alone."""
    shown: list[Any] = [labels[0] for labels in results] if top_k == 1 else list(results)
    return shown[0] if is_one else shown


def check_top_k(top_k: int | None) -> None:
    """Raises UsageError ZI-1112 for anything but a count or None."""
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise UsageError(
            "ZI-1112", f"top_k is {top_k!r}, a count from 1 or None was wanted", remedy="top_k=1"
        )
