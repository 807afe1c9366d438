"""Confidence that means something.  In: a prefix's logits and what is true.  Out: a temperature and a bias per class.

Guo et al. 2017 (arXiv 1706.04599): vector scaling, fitted on texts that nothing was trained on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PULL = 1e-2  # of the bias to 0: a few hundred texts must not teach it much
STEPS = 100


def calibration(logits_NC: Tensor, wanted_NC: Tensor, *, is_multi_label: bool) -> tuple[Tensor, Tensor]:
    """(temperature, bias [C]) for which logits / temperature + bias fit the probabilities `wanted_NC` best."""
    logits, wanted = logits_NC.double(), wanted_NC.double()
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(logits.shape[1], dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [log_temperature, bias], max_iter=STEPS, line_search_fn="strong_wolfe", tolerance_grad=1e-9
    )

    def closure() -> Tensor:
        search.zero_grad()
        scaled = logits / log_temperature.exp() + bias
        if is_multi_label:
            loss = F.binary_cross_entropy_with_logits(scaled, wanted)
        else:
            loss = -(wanted * F.log_softmax(scaled, -1)).sum(-1).mean()
        loss = loss + PULL * bias.pow(2).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    search.step(closure)  # type: ignore[no-untyped-call]
    return log_temperature.detach().exp().float(), bias.detach().float()


def calibration_error(probabilities_NC: Tensor, wanted_N: Tensor, bins: int = 10) -> float:
    """Expected calibration error: mean |confidence - share of right answers| over bins of confidence."""
    confidence, guess = probabilities_NC.max(-1)
    is_right = (guess == wanted_N).double()
    place = (confidence * bins).long().clamp(max=bins - 1)
    inside = [place == at for at in range(bins)]
    gaps = [
        (confidence[rows].double().mean() - is_right[rows].mean()).abs() * rows.sum()
        for rows in inside
        if rows.any()
    ]
    return float(torch.stack(gaps).sum() / len(confidence))
