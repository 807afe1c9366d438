"""Attention of whole texts.  In: q, k, v of packed rows.  Out: [T, H, D]; a row sees every row of its own text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from zinfer.memory.upload import indices


def attend_whole(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, bounds: Sequence[int], *, scale: float, exact: bool
) -> Tensor:
    """Softmax attention without a mask inside each of the texts bounds[s]:bounds[s+1].

    Texts are never cut into pieces, so a text's result is one call on its own rows.  With `exact` each text has a
    call of its own, on copies that lie alike in memory whoever its batch mates are: its bits depend on nothing but
    itself.  Without, texts of equal length share a call, which may round otherwise.
    """
    if exact:
        texts = [torch.arange(start, stop, device=q_THD.device) for start, stop in pairwise(bounds)]
        return torch.cat([_attend(q_THD[rows], k_THD[rows], v_THD[rows], 1, scale) for rows in texts])
    if len({stop - start for start, stop in pairwise(bounds)}) == 1:
        return _attend(q_THD, k_THD, v_THD, len(bounds) - 1, scale)
    rows_T, pieces = [], []
    for starts, length in _by_length(bounds):
        rows = indices([row for start in starts for row in range(start, start + length)], q_THD.device)
        pieces.append(_attend(q_THD[rows], k_THD[rows], v_THD[rows], len(starts), scale))
        rows_T.append(rows)
    return torch.cat(pieces)[torch.argsort(torch.cat(rows_T))]


def _by_length(bounds: Sequence[int]) -> Iterator[tuple[list[int], int]]:
    """(first rows of the texts of one length, that length)."""
    starts: dict[int, list[int]] = {}
    for start, stop in pairwise(bounds):
        starts.setdefault(stop - start, []).append(start)
    for length, found in starts.items():
        yield found, length


def _attend(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, num_texts: int, scale: float) -> Tensor:
    """The rows of `num_texts` texts of equal length, back to back."""
    q, k, v = (x.view(num_texts, -1, *x.shape[1:]).transpose(1, 2) for x in (q_THD, k_THD, v_THD))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1)
