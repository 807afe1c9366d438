"""A classifier as the server sees it.  In: an open Classifier, limits.  Out: the model's face, the queue before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from zinfer.classifier import Classifier
from zinfer.config.schema import Serve
from zinfer.errors import BudgetError
from zinfer.serving.service import WARM_TEXT
from zinfer.students.opening import open_scheduler
from zinfer.students.scheduler import PASS_TOKENS, TextScheduler
from zinfer.students.serving import MAX_ROWS, GroupService
from zinfer.tokenizer import Encoded, Text

_MOST_LOAD = 0.7  # of what passes carry: what reads and writes requests runs on the same cores


class ServedClassifier:
    """The `TextModel` of a Classifier."""

    def __init__(self, classifier: Classifier) -> None:
        self._classifier, self._engine = classifier, classifier.engine

    @property
    def name(self) -> str:
        """The folder's own name, never its path."""
        return self._engine.folder.resolve().name

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self._classifier.labels

    @property
    def scoring(self) -> str:
        """How logits become scores."""
        return self._classifier.encoder.scoring

    @property
    def max_tokens(self) -> int:
        """Tokens of a text at most."""
        return self._engine.max_tokens

    @property
    def num_students(self) -> int:
        """The most that answer: 1 for one model."""
        return self._engine.num_students

    def encode(self, texts: Sequence[Text], direction: str) -> list[Encoded]:
        """Token ids, cut at the `direction` end.  Raises UsageError ZI-1131, ZI-1132."""
        return self._classifier.encode(texts, direction=direction)

    def about(self) -> dict[str, Any]:
        """Of a group, what its report says of every prefix, and below which confidence a teacher is asked."""
        if not isinstance(self._engine, GroupService):
            return {}
        cascade = self._classifier.cascade
        return {"group": self._engine.about(), "defer_below": None if cascade is None else cascade.below}


def open_queue(classifier: Classifier, limits: Serve) -> TextScheduler:
    """The scheduler before the classifier's engine.  One model has no choice to make, so it has no objective to hold.
    A teacher that answers what students are not sure of is loaded here, with a first text.

    Raises BudgetError ZI-2207 for an objective shorter than the smallest pass.
    """
    engine = classifier.engine
    deferral = classifier.deferral(max_queue_tokens=limits.queue_tokens)
    if deferral is not None:
        try:
            deferral.submit(classifier.encode([WARM_TEXT])[0]).result()
        except BaseException:
            deferral.close()
            raise
    objective_s = limits.objective_ms / 1000 if engine.num_students > 1 else None
    try:
        return open_scheduler(
            engine,
            objective_s=objective_s,
            max_queue_tokens=limits.queue_tokens,
            pass_tokens=PASS_TOKENS
            if objective_s
            else MAX_ROWS,  # without one, nothing else keeps passes short
            is_adaptive=limits.adapt,
            most_load=_MOST_LOAD,
            deferral=deferral,
        )
    except BudgetError as error:
        seconds = float(error.remedy.partition("=")[2])
        raise BudgetError(
            error.code, error.message, remedy=f"--objective-ms {math.ceil(1000 * seconds)}"
        ) from None
