"""Compose the rows of a pass.  In: requests and how many tokens each feeds.  Out: a Packed batch, no padding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from zinfer.layers.packed import Packed
from zinfer.runtime.request import Request


def pack_rows(pieces: Sequence[tuple[Request, Sequence[int]]], *, all_logits: bool = False) -> Packed:
    """Pack each request's next ids back to back.

    Logits are wanted for the last row of every request that has nothing more to feed, or, with `all_logits`,
    for every row.
    """
    bounds = tuple(accumulate((len(ids) for _, ids in pieces), initial=0))
    if all_logits:
        logit_rows = list(range(bounds[-1]))
    else:
        ends = zip(pieces, bounds[1:], strict=True)
        logit_rows = [end - 1 for (request, ids), end in ends if request.is_sampling_after(len(ids))]
    past = tuple(request.num_committed for request, _ in pieces)
    positions = [start + i for start, (_, ids) in zip(past, pieces, strict=True) for i in range(len(ids))]
    return Packed(
        tokens_T=torch.tensor([token for _, ids in pieces for token in ids], dtype=torch.long),
        positions_T=torch.tensor(positions, dtype=torch.long),
        bounds=bounds,
        past=past,
        logit_rows=torch.tensor(logit_rows, dtype=torch.long),
        lengths=tuple(request.num_tokens for request, _ in pieces),
    )
