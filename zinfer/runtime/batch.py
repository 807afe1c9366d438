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
    bounds = tuple(accumulate((len(piece.ids) for piece in pieces), initial=0))
    counts = [piece.request.num_logit_rows(piece.start, piece.stop) for piece in pieces]
    logit_rows = [
        row for end, count in zip(bounds[1:], counts, strict=True) for row in range(end - count, end)
    ]
    return Packed(
        tokens_T=torch.tensor([token for piece in pieces for token in piece.ids], dtype=torch.long),
        positions_T=torch.tensor(
            [position for piece in pieces for position in range(piece.start, piece.stop)], dtype=torch.long
        ),
        bounds=bounds,
        past=tuple(piece.start for piece in pieces),
        logit_rows=torch.tensor(logit_rows, dtype=torch.long),
        lengths=tuple(piece.request.num_tokens for piece in pieces),
    )


def split_rows(pieces: Sequence[Piece], micro_rows: int) -> list[list[Piece]]:
    """Share a pass out among micro-batches of at most `micro_rows` rows; a piece is cut where one is full.

    The part behind a cut lies in a later micro-batch, which computes every layer after the part before it.
    """
    micros: list[list[Piece]] = [[]]
    free = micro_rows
    for request, ids, start in pieces:
        at = 0
        while at < len(ids):
            if not free:
                micros.append([])
                free = micro_rows
            part = ids[at : at + free]
            micros[-1].append(Piece(request, part, start + at))
            at += len(part)
            free -= len(part)
    return micros
