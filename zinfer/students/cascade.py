"""Students first, the teacher where they are not sure.  In: calibrated logits, a threshold.  Out: who is asked again.

Shape legend: N texts, C classes.  What a threshold costs and buys is measured on texts that nothing was fitted to when
the group is distilled, and stands in its manifest and its report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from zinfer.errors import UsageError
from zinfer.students.scheduler import Answerer, Served, TextScheduler
from zinfer.tokenizer import Encoded

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


def confidence(logits_NC: Tensor, scoring: str) -> Tensor:
    """How sure calibrated logits are, [N] from 0 to 1: the likeliest label's probability; where labels do not exclude
    each other ("sigmoid") that of the least certain one."""
    if scoring == "sigmoid":
        return torch.sigmoid(logits_NC.abs()).amin(-1)
    return torch.softmax(logits_NC, -1).amax(-1)


def check_threshold(below: float | None) -> None:
    """Raises UsageError ZI-1165 for what is no share of one."""
    if below is None or not 0 <= below <= 1:
        raise UsageError(
            "ZI-1165", f"a confidence from 0 to 1 was wanted, {below} was given", remedy="--defer-below 0.8"
        )


def check_pair(group: Answerer, teacher: Answerer | None, scoring: str) -> None:
    """Raises UsageError ZI-1166 for a group without classes, ZI-1167 for a teacher of others."""
    if not group.labels or scoring == "none":
        raise UsageError(
            "ZI-1166",
            "the group has no classes, so nothing says how sure it is",
            remedy="leave the teacher and the threshold out",
        )
    if teacher is not None and (teacher.labels != group.labels or teacher.max_tokens < group.max_tokens):
        raise UsageError(
            "ZI-1167",
            f"the teacher has {len(teacher.labels)} labels and takes {teacher.max_tokens} tokens, the group has "
            f"{len(group.labels)} and takes {group.max_tokens}, or their labels differ",
            remedy="--teacher the folder that the group was distilled from",
        )


def deferral_table(
    logits_NC: Tensor, teacher_NC: Tensor, wanted_N: Tensor, scoring: str
) -> list[dict[str, float]]:
    """Per threshold: the `share` deferred, the accuracy of what is kept (`kept`), and of both together (`accuracy`)."""
    sure_N = confidence(logits_NC, scoring)
    right_N, teachers_N = (x.argmax(-1) == wanted_N for x in (logits_NC, teacher_NC))
    rows = []
    for below in THRESHOLDS:
        is_kept_N = sure_N >= below
        together = torch.where(is_kept_N, right_N, teachers_N)
        rows.append(
            {
                "below": below,
                "share": 1 - is_kept_N.double().mean().item(),
                "kept": right_N[is_kept_N].double().mean().item() if is_kept_N.any() else 1.0,
                "accuracy": together.double().mean().item(),
            }
        )
    return rows


def threshold_for(manifest: Mapping[str, Any], num_students: int, accuracy: float) -> float:
    """The least threshold with which `num_students` and the teacher together reached `accuracy` on unseen texts.

    0 where the students alone did.  Raises UsageError ZI-1168 where the group was not measured, ZI-1169 where no
    threshold reached it.
    """
    prefixes: Sequence[Mapping[str, Any]] = manifest.get("prefixes", [])
    figures = next((one for one in prefixes if one.get("students") == num_students), {})
    table = figures.get("deferral")
    if not table:
        raise UsageError(
            "ZI-1168",
            "the group holds no figures of what a threshold buys",
            remedy="--defer-below 0.8, or distill it again",
        )
    alone = figures.get("accuracy")
    if (figures["agreement"] if alone is None else alone) >= accuracy:
        return 0.0
    found = [float(row["below"]) for row in table if row["accuracy"] >= accuracy]
    if not found:
        best = max(float(row["accuracy"]) for row in table)
        raise UsageError(
            "ZI-1169",
            f"an accuracy of {accuracy} was wanted, students and teacher together reached {best:.4f}",
            remedy=f"--target-accuracy {int(best * 1000) / 1000}",
        )
    return min(found)


class Cascade:
    """A group before a teacher that may be absent: which texts are not sure, and what the teacher says of them."""

    def __init__(self, group: Answerer, teacher: Answerer | None, below: float, scoring: str) -> None:
        check_threshold(below)
        check_pair(group, teacher, scoring)
        self.teacher, self.below, self.scoring = teacher, below, scoring
        self.num_texts = self.num_unsure = 0

    def settle(self, texts: Sequence[Encoded], logits_NC: Tensor) -> tuple[Tensor, list[bool]]:
        """(logits [N, C], those of the teacher where the group was not sure; which texts that was)."""
        is_unsure_N = confidence(logits_NC, self.scoring) < self.below
        unsure = is_unsure_N.nonzero()[:, 0].tolist()
        self.num_texts += len(texts)
        self.num_unsure += len(unsure)
        if self.teacher is not None and unsure:
            _, theirs = self.teacher.answer([texts[at] for at in unsure], self.teacher.num_students)
            assert theirs is not None, "the pair was checked: the teacher has classes"
            logits_NC = logits_NC.index_copy(0, torch.tensor(unsure), theirs)
        return logits_NC, is_unsure_N.tolist()

    def about(self) -> dict[str, Any]:
        """What a JSON result says of it."""
        return {"defer_below": self.below, "texts": self.num_texts, "unsure": self.num_unsure}


class Deferral:
    """The way from a scheduler of students to their teacher: answers below a confidence are asked for again.

    The teacher has a queue and a worker of its own, so that a slow one holds no student up.  Owned and closed by the
    scheduler it is given to.
    """

    def __init__(
        self, teacher: Answerer, below: float, scoring: str, *, max_queue_tokens: int, pass_tokens: int
    ) -> None:
        check_threshold(below)
        self.below, self.scoring = below, scoring
        self.scheduler = TextScheduler(
            teacher,
            objective_s=None,
            max_queue_tokens=max_queue_tokens,
            pass_tokens=pass_tokens,
            controller=None,
        )

    def wanted(self, logits_SC: Tensor) -> list[bool]:
        """Which texts of a pass the teacher should see."""
        return (confidence(logits_SC, self.scoring) < self.below).tolist()

    def submit(self, text: Encoded) -> Future[Served]:
        """Ask the teacher.  Raises Overloaded where its queue is full, MachineError ZI-5341 when it is closed."""
        return self.scheduler.submit(text)

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait for all that was asked; what is asked from now on is refused."""
        return self.scheduler.drain(timeout_s)

    def close(self) -> None:
        """End the teacher's worker; the teacher itself is the caller's."""
        self.scheduler.close()
