"""What a prefix is worth.  In: representations and logits of dev texts.  Out: one record per prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zinfer.errors import UsageError
from zinfer.students.boost import energy
from zinfer.students.calibrate import calibration_error
from zinfer.students.cascade import deferral_table
from zinfer.students.group import Group
from zinfer.students.student import encoder_of


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one prefix on texts never trained on.

    `residual` is the energy left of the teacher's, `cosine` the mean to its representation; `agreement` and
    `accuracy` are shares of texts (None: no head, no labels), `calibration` the expected calibration error,
    `deferral` what a teacher behind a threshold of confidence buys (`cascade.deferral_table`).
    """

    students: int
    residual: float
    cosine: float
    agreement: float | None = None
    accuracy: float | None = None
    teacher_accuracy: float | None = None
    calibration: float | None = None
    deferral: list[dict[str, float]] | None = None


def figures(
    group: Group,
    prefixes_MND: Sequence[Tensor],
    pooled_ND: Tensor,
    teacher_NC: Tensor | None,
    labels_N: Tensor | None,
) -> list[Figures]:
    """One record per prefix; `prefixes_MND[m - 1]` are the representations F_m."""
    whole = energy(pooled_ND - group.origin)
    found = []
    for m, rows_ND in enumerate(prefixes_MND, 1):
        residual = energy(pooled_ND - rows_ND) / whole
        cosine = F.cosine_similarity(rows_ND, pooled_ND, dim=-1).mean().item()
        if teacher_NC is None:
            found.append(Figures(m, residual, cosine))
            continue
        logits = group.calibrated(group.logits(rows_ND), m)
        guess, theirs = logits.argmax(-1), teacher_NC.argmax(-1)
        wanted = theirs if labels_N is None else labels_N
        found.append(
            Figures(
                m,
                residual,
                cosine,
                _share(guess == theirs),
                None if labels_N is None else _share(guess == labels_N),
                None if labels_N is None else _share(theirs == labels_N),
                calibration_error(torch.softmax(logits, -1), wanted),
                None
                if encoder_of(group.teacher).is_multi_label
                else deferral_table(logits, teacher_NC, wanted, "softmax"),
            )
        )
    return found


def check_labels(teacher_NC: Tensor, labels_N: Tensor, classes: Sequence[str]) -> None:
    """Refuse labels that the teacher's head has not heard of: it agrees with them no more than chance would.

    Chance is that of Cohen's kappa (1960): what two raters agree on who say each class as often as these two do.  Noise
    lowers the agreement and passes; a head whose classes are numbered otherwise does not.  UsageError ZI-1192.
    """
    guess_N, count = teacher_NC.argmax(-1), len(classes)
    agreement = _share(guess_N == labels_N)
    shares = [torch.bincount(one, minlength=count).double() / len(labels_N) for one in (guess_N, labels_N)]
    chance = float(shares[0] @ shares[1])
    if agreement <= chance:
        raise UsageError(
            "ZI-1192",
            f"the teacher's classes agree with the labels on {agreement:.1%} of the texts, by chance alone it were "
            f"{chance:.1%}: the labels are noise, or its head numbers them otherwise ({', '.join(classes)!s:.200})",
            remedy="leave --label-column out, or write the labels as the names of the teacher's classes",
        )


def _share(hits_N: Tensor) -> float:
    return hits_N.double().mean().item()
