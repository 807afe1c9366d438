"""Attention over a set of keys, as a value that can be merged.  In: q, k, v.  Out: sums, weights and maxima, fp32.

Online softmax (Milakov & Gimelshein 2018; Dao et al. 2022, algorithm 1): keys may come in blocks, from any memory.

Shape legend: B sequences times key-value heads, S sequences, K key-value heads, R new rows, G heads of a group,
Q = R * G query rows of one key-value head, n keys, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LOWEST = -1e30  # a score that nobody sees; finite, so that differences are numbers
# Exponents stop here: their exponentials are nothing beside 1, and below it the library's exp is 40 times slower.
_FLOOR = -87.0


@dataclass(frozen=True, slots=True)
class Partial:
    """What rows have gathered from the keys seen so far: `total` [B, Q, D] and `weight` [B, Q, 1] stand relative to
    exp(`top`), `top` [B, Q, 1] being the largest score."""

    total: Tensor
    weight: Tensor
    top: Tensor

    def merge(self, later: Partial) -> Partial:
        """Both together.  A side of which a row has seen nothing changes none of the row's bits."""
        top = torch.maximum(self.top, later.top)
        fade, rise = ((part.top - top).clamp_(min=_FLOOR).exp_() for part in (self, later))
        return Partial(self.total * fade + later.total * rise, self.weight * fade + later.weight * rise, top)

    def result(self) -> Tensor:
        """[B, Q, D]: the weighted mean of the values."""
        return self.total / self.weight


def partial(q_BQD: Tensor, k_BnD: Tensor, v_BnD: Tensor, hidden_SRn: Tensor | None = None) -> Partial:
    """Scaled queries over one block of keys, all fp32; True in `hidden_SRn` hides a key from a row.

    A hidden key's score counts as nothing at all, whatever its bytes are (they must be finite).
    """
    scores = torch.bmm(q_BQD, k_BnD.transpose(1, 2))
    if hidden_SRn is None:
        # The shift cancels in total / weight, so no gradient need pass through it.
        top = scores.detach().amax(-1, keepdim=True)
        scores.sub_(top).clamp_(min=_FLOOR).exp_()
    else:
        hidden_SKRGn = hidden_SRn[:, None, :, None]
        shape = (hidden_SRn.shape[0], -1, hidden_SRn.shape[1], q_BQD.shape[1] // hidden_SRn.shape[1])
        by_row = scores.view(*shape, scores.shape[-1])
        by_row.masked_fill_(hidden_SKRGn, _LOWEST)
        top = scores.detach().amax(-1, keepdim=True)
        scores.sub_(top).clamp_(min=_FLOOR).exp_()
        if scores.requires_grad:
            scores = by_row.masked_fill(hidden_SKRGn, 0).view_as(scores)
        else:
            by_row.masked_fill_(hidden_SKRGn, 0)
    return Partial(torch.bmm(scores, v_BnD), scores.sum(-1, keepdim=True), top)
