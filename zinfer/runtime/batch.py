"""Compose the rows of a pass.  In: requests and the tokens each feeds.  Out: Packed batches, no padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch

from zinfer.kvcache.cache import PagedKv, PagedView
from zinfer.layers.packed import Packed
from zinfer.runtime.request import Part
from zinfer.runtime.scheduler import Piece


def pack_rows(pieces: Sequence[Piece]) -> Packed:
    """Pack each request's next ids back to back, every branch a sequence of its own.

    Logits are wanted for the last row of every request that has nothing more to feed, or for the rows that a
    scored request asks for.
    """
    ends = accumulate(len(piece.ids) for piece in pieces)
    counts = [piece.request.num_logit_rows(piece.start, piece.stop) for piece in pieces]
    logit_rows = [row for end, count in zip(ends, counts, strict=True) for row in range(end - count, end)]
    parts = [part for _, part in _parts(pieces)]
    return Packed(
        tokens_T=torch.tensor([token for piece in pieces for token in piece.ids], dtype=torch.long),
        positions_T=torch.tensor(
            [position for part in parts for position in range(part.start, part.start + part.num_tokens)],
            dtype=torch.long,
        ),
        bounds=tuple(accumulate((part.num_tokens for part in parts), initial=0)),
        past=tuple(part.start for part in parts),
        logit_rows=torch.tensor(logit_rows, dtype=torch.long),
        lengths=tuple(part.length for part in parts),
        forked=frozenset(s for s, part in enumerate(parts) if part.fork is not None),
    )


def view_of(kv: PagedKv, pieces: Sequence[Piece], batch: Packed) -> PagedView:
    """The cache as these pieces see it; `batch` is what `pack_rows` made of them."""
    owned = list(_parts(pieces))
    forks = [part.fork for _, part in owned]
    return kv.view([piece.request.id for piece, _ in owned], batch.bounds, batch.past, forks)


def _parts(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Part]]:
    """The sequences of a micro-batch, in the order of its rows."""
    return ((piece, part) for piece in pieces for part in piece.request.parts(piece.start, piece.stop))


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
