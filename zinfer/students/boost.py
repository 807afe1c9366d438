"""One round of boosting.  In: residuals of the group so far.  Out: a student that fits them, and its weight.

Functional gradient boosting of the pooled representation (arXiv 2408.12526; Friedman 2001): student k is trained on
rho_{k-1} = r_T - F_{k-1}, then F_k = F_{k-1} + w_k f_k with the w_k that a line search finds exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zinfer.errors import InternalError

TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True)
class LineSearch:
    """The best weight, the mean squared residual before and after, and by how much of it the identity is missed."""

    weight: float
    before: float
    after: float
    error: float


def line_search(residuals_ND: Tensor, answers_ND: Tensor) -> LineSearch:
    """w = <rho, f> / <f, f> over a set of texts, in fp64.

    Checks that mean|rho - w f|^2 = mean|rho|^2 - <rho, f>^2 / <f, f> to 1e-5 of the former; InternalError ZI-1091.
    """
    rho, f = residuals_ND.double(), answers_ND.double()
    count = rho.shape[0]
    both, own = (rho * f).sum() / count, (f * f).sum() / count
    weight = (both / own).item() if own > 0 else 0.0
    before = rho.pow(2).sum().item() / count
    after = (rho - weight * f).pow(2).sum().item() / count
    promised = before - (both * both / own).item() if own > 0 else before
    error = abs(after - promised) / max(before, 1e-30)
    if error > TOLERANCE:
        raise InternalError("ZI-1091", f"the line search promised {promised}, the residual is {after}")
    return LineSearch(weight, before, after, error)


def energy(residuals_ND: Tensor) -> float:
    """Mean squared length of residuals."""
    return residuals_ND.double().pow(2).sum().item() / residuals_ND.shape[0]


def boost_loss(residuals_SD: Tensor, answers_SD: Tensor, scale: float) -> Tensor:
    """Half the mean squared error, in units of the residual energy `scale` that the round began with."""
    return 0.5 * (residuals_SD - answers_SD).pow(2).sum(-1).mean() / scale


def hidden_loss(layers: list[Tensor], wanted: list[Tensor], maps: list[Tensor]) -> Tensor:
    """Mean over token rows and layers of |U h - H_T|^2 / d: supervision inside the layers, U thrown away later."""
    errors = [
        (F.linear(rows, matrix) - aim).pow(2).mean()
        for rows, aim, matrix in zip(layers, wanted, maps, strict=True)
    ]
    return torch.stack(errors).sum()


def soft_loss(logits_SC: Tensor, teacher_SC: Tensor, temperature: float, *, is_multi_label: bool) -> Tensor:
    """How far the classes' probabilities are from the teacher's (Hinton et al. 2015, arXiv 1503.02531)."""
    if is_multi_label:
        return F.binary_cross_entropy_with_logits(logits_SC, torch.sigmoid(teacher_SC))
    ours = F.log_softmax(logits_SC / temperature, -1)
    theirs = F.log_softmax(teacher_SC / temperature, -1)
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
