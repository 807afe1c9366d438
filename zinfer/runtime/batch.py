"""Compose the rows of a pass.  In: requests and the tokens each feeds.  Out: Packed batches, no padding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from zinfer.layers.packed import Packed
from zinfer.runtime.scheduler import Piece


def pack_rows(pieces: Sequence[Piece]) -> Packed:
    """Pack each request's next ids back to back.

    Logits are wanted for the last row of every request that has nothing more to feed, or for the rows that a
    scored request asks for.
    """
    bounds = tuple(accumulate((len(ids) for _, ids in pieces), initial=0))
    counts = [request.num_logit_rows(len(ids)) for request, ids in pieces]
    logit_rows = [
        row for end, count in zip(bounds[1:], counts, strict=True) for row in range(end - count, end)
    ]
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


def split_rows(pieces: Sequence[Piece], micro_rows: int) -> list[list[Piece]]:
    """Share a pass out among micro-batches of at most `micro_rows` rows: largest piece first, where it first fits.

    A piece is never cut, so none may be larger than a micro-batch.
    """
    micros: list[list[Piece]] = []
    free: list[int] = []
    for piece in sorted(pieces, key=lambda piece: -len(piece.ids)):
        at = next((i for i, rows in enumerate(free) if rows >= len(piece.ids)), len(free))
        if at == len(free):
            micros.append([])
            free.append(micro_rows)
        micros[at].append(piece)
        free[at] -= len(piece.ids)
    return micros
