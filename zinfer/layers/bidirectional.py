"""Attention of whole texts.  In: q, k, v of packed rows.  Out: [T, H, D]; a row sees every row of its own text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zinfer.memory.upload import upload


def attend_whole(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    bounds: Sequence[int],
    *,
    scale: float,
    exact: bool,
    memo: dict[Any, Any] | None = None,
) -> Tensor:
    """Softmax attention without a mask inside each of the texts bounds[s]:bounds[s+1].

    Texts are never cut into pieces, so a text's result is one call on its own rows.  With `exact` each text has a
    call of its own, on copies that lie alike in memory whoever its batch mates are: its bits depend on nothing but
    itself.  Without, texts of similar length share a call, which may round otherwise; `memo` keeps for the next layer
    which those are.
    """
    if exact:
        texts = [torch.arange(start, stop, device=q_THD.device) for start, stop in pairwise(bounds)]
        return torch.cat([_attend(q_THD[rows], k_THD[rows], v_THD[rows], 1, scale) for rows in texts])
    if len({stop - start for start, stop in pairwise(bounds)}) == 1:
        return _attend(q_THD, k_THD, v_THD, len(bounds) - 1, scale)
    memo = {} if memo is None else memo
    key = ("texts together", tuple(bounds))
    if key not in memo:
        memo[key] = list(_together(bounds, q_THD.device))
    out_THD = torch.empty_like(v_THD)
    for group in memo[key]:
        q, k, v = (x[group.rows_N] for x in (q_THD, k_THD, v_THD))
        found_NHD = _attend(q, k, v, group.num_texts, scale, group.seen_S11L)
        if group.own_N is None:
            out_THD[group.rows_N] = found_NHD
        else:
            out_THD[group.target_N] = found_NHD[group.own_N]
    return out_THD


@dataclass(frozen=True, slots=True)
class _Group:
    """Texts that share a call: their rows, each text's last one repeated up to the longest's length.

    `own_N` are the places of rows that are no repetition, `target_N` the rows themselves, `seen_S11L` the keys that are
    none; None: no row is repeated.
    """

    rows_N: Tensor
    num_texts: int
    own_N: Tensor | None = None
    target_N: Tensor | None = None
    seen_S11L: Tensor | None = None


def _together(bounds: Sequence[int], device: torch.device) -> Iterator[_Group]:
    """Longest first, with all that are at least half as long: a call costs more than a few rows in vain."""
    by_length = sorted(pairwise(bounds), key=lambda text: text[0] - text[1])
    at = 0
    while at < len(by_length):
        longest = by_length[at][1] - by_length[at][0]
        texts = [text for text in by_length[at:] if 2 * (text[1] - text[0]) >= longest]
        at += len(texts)
        starts_S, stops_S = np.array(texts, dtype=np.int64).T
        rows_SL = starts_S[:, None] + np.arange(longest)
        is_own_SL = rows_SL < stops_S[:, None]
        rows_N = torch.from_numpy(np.minimum(rows_SL, stops_S[:, None] - 1).reshape(-1))
        if is_own_SL.all():
            yield _Group(upload(rows_N, device), len(texts))
            continue
        own_N = torch.from_numpy(np.flatnonzero(is_own_SL))
        more = (own_N, rows_N[own_N], torch.from_numpy(is_own_SL)[:, None, None, :])
        yield _Group(upload(rows_N, device), len(texts), *(upload(x, device) for x in more))


def _attend(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    num_texts: int,
    scale: float,
    seen_S11L: Tensor | None = None,
) -> Tensor:
    """The rows of `num_texts` texts of equal length, back to back."""
    q, k, v = (x.view(num_texts, -1, *x.shape[1:]).transpose(1, 2) for x in (q_THD, k_THD, v_THD))
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_S11L, scale=scale)
    return found.transpose(1, 2).flatten(0, 1)
