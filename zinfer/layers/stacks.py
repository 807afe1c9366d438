"""Which rows of a pass share a call of attention.  In: a Packed batch.  Out: stacks of rows, worked out once per pass.

The answer is the same for every layer with the same window, so it is kept in the batch's `memo`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zinfer.kernels.choice import cover
from zinfer.layers.packed import KvView, Packed, Span
from zinfer.layers.shapes import Shapes
from zinfer.layers.steps import step_up
from zinfer.memory.upload import indices, upload
from zinfer.spec.attention_cost import KV_BLOCK


@dataclass(frozen=True, slots=True)
class Block:
    """One block of keys of every sequence of a stack: where they lie, and which rows do not see which."""

    place: Any  # what KvView.locate answered
    hidden_SRn: Tensor | None


@dataclass(frozen=True, slots=True)
class Stack:
    """S pieces of R rows each, of sequences that see equally many blocks.

    Piece after piece, `rows_N` are the batch's rows, N = S * R, a short piece's last row repeated.  The results at
    `kept` (None: all) belong to the rows `target`.
    """

    num_pieces: int
    rows_N: Tensor
    kept: Tensor | None
    target: Tensor
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Visibility:
    """Which keys the new rows of one sequence see.  Keys are counted from the sequence's first token.

    Committed tokens have positions 0 .. past - 1; without a table of ancestors new row i has position past + i.
    """

    past: int
    num_new: int
    window: int | None
    ancestors: Tensor | None
    positions_N: Tensor

    def blocks(self, first_row: int, last_row: int) -> range:
        """The blocks that hold all keys which rows first_row .. last_row can see."""
        oldest, newest = self.past + first_row, self.past + last_row
        if self.ancestors is not None:
            oldest, newest = self.past, self.past + self.num_new - 1
        start = 0 if self.window is None else max(0, oldest - self.window + 1)
        return range(start // KV_BLOCK, newest // KV_BLOCK + 1)

    def sees_all(self, first_row: int, last_row: int, keys: range) -> bool:
        """Whether every row sees every one of the keys."""
        reaches = self.window is None or keys.start > self.past + last_row - self.window
        return self.ancestors is None and keys.stop <= self.past + first_row + 1 and reaches

    def hidden(self, rows_R: Tensor, keys: range) -> Tensor:
        """Bool [R, keys], True where a row (counted from the first new one) does not see a key."""
        device = rows_R.device
        keys_n = torch.arange(keys.start, keys.stop, device=device)
        new_n = keys_n - self.past
        if self.ancestors is None:
            hidden = new_n > rows_R[:, None]
            if self.window is not None:
                hidden |= new_n <= rows_R[:, None] - self.window
            return hidden
        edge_n = new_n.clamp(0, self.num_new - 1)
        table = upload(self.ancestors, device)[rows_R][:, edge_n]
        hidden = ~((new_n < 0) | ((new_n < self.num_new) & table))
        if self.window is not None:
            positions_N = upload(self.positions_N, device)
            key_positions = torch.where(new_n < 0, keys_n, positions_N[edge_n])
            hidden |= key_positions <= positions_N[rows_R][:, None] - self.window
        return hidden


def visibility(batch: Packed, sequence: int, window: int | None) -> Visibility:
    """What the new rows of one sequence see."""
    start, stop = batch.bounds[sequence : sequence + 2]
    ancestors = None if batch.ancestors is None else batch.ancestors[sequence]
    return Visibility(batch.past[sequence], stop - start, window, ancestors, batch.positions_T[start:stop])


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows first .. last of one sequence's new rows."""

    sequence: int
    first: int
    last: int
    seen: Visibility


def exact_stacks(
    batch: Packed,
    kv: KvView,
    sequences: Sequence[int],
    window: int | None,
    shapes: Shapes,
    element_bytes: int = 0,
) -> list[Stack]:
    """Pieces of rows in shapes of one agreeing group; small ones are stacked where they see equally many blocks.

    With `element_bytes`, those of an element of the pages, fewer are: what is gathered counts too.
    """
    groups: dict[tuple[int, range, int], list[_Piece]] = defaultdict(list)
    for s in sequences:
        seen = visibility(batch, s, window)
        for start, stop, size in cover(seen.num_new, shapes.rows):
            blocks = seen.blocks(start, stop - 1)
            end = seen.past + (stop if seen.ancestors is None else seen.num_new)
            last_keys = shapes.keys_for(min(end - blocks[-1] * KV_BLOCK, KV_BLOCK))
            groups[size, blocks, last_keys].append(_Piece(s, start, stop - 1, seen))
    stacks: list[tuple[int, Stack]] = []
    for (size, blocks, last_keys), pieces in groups.items():
        at_once = shapes.at_once(size, KV_BLOCK if len(blocks) > 1 else last_keys, element_bytes)
        at_once = min(at_once, batch.num_sequences)  # what the bound on the workspace counts with
        keys = [range(b * KV_BLOCK, (b + 1) * KV_BLOCK) for b in blocks[:-1]]
        keys.append(range(blocks[-1] * KV_BLOCK, blocks[-1] * KV_BLOCK + last_keys))
        for at in range(0, len(pieces), at_once):
            together = pieces[at : at + at_once]
            first_row = batch.bounds[together[0].sequence] + together[0].first
            stacks.append((first_row, _stack(batch, kv, together, size, keys)))
    # Pieces of one sequence read the same keys.
    return [stack for _, stack in sorted(stacks, key=lambda found: found[0])]


def decode_stacks(
    batch: Packed, kv: KvView, sequences: Sequence[int], window: int | None, at_most: Callable[[int], int]
) -> list[Stack]:
    """Sequences with one new row each, those of about one length together: all their keys are one block.

    `at_most` says how many sequences with so many keys one call may carry.
    """
    groups: dict[int, list[_Piece]] = defaultdict(list)
    for s in sequences:
        seen = visibility(batch, s, window)
        num_keys = min(seen.past + 1, window or seen.past + 1)
        groups[step_up(num_keys)].append(_Piece(s, 0, 0, seen))
    stacks = []
    for most, group in groups.items():
        for at in range(0, len(group), at_most(most)):
            pieces = group[at : at + at_most(most)]
            stacks.append(_decode_stack(batch, kv, pieces, window, most if batch.is_padded else 0))
    return stacks


def _decode_stack(
    batch: Packed, kv: KvView, pieces: Sequence[_Piece], window: int | None, least_keys: int
) -> Stack:
    device = kv.device
    ends = [piece.seen.past + 1 for piece in pieces]
    spans = [
        Span(piece.sequence, 0 if window is None else max(0, end - window), end)
        for piece, end in zip(pieces, ends, strict=True)
    ]
    counts = [span.stop - span.start for span in spans]
    rows_N = indices([batch.bounds[piece.sequence] for piece in pieces], device)
    hidden = None
    size = max(*counts, least_keys)
    if min(counts) < size or least_keys:
        counts_S11 = indices(counts, device)[:, None, None]
        hidden = torch.arange(size, device=device) >= counts_S11
    place = kv.locate(spans, size)
    return Stack(len(pieces), rows_N, None, rows_N, (Block(place, hidden),))


def _stack(batch: Packed, kv: KvView, pieces: Sequence[_Piece], size: int, keys: Sequence[range]) -> Stack:
    device = kv.device
    rows = [
        [min(piece.first + i, piece.last) for i in range(size)] for piece in pieces
    ]  # within the sequence
    starts = [batch.bounds[piece.sequence] for piece in pieces]
    rows_SR = indices(rows, device)
    rows_N = (rows_SR + indices(starts, device)[:, None]).flatten()
    counts = [piece.last - piece.first + 1 for piece in pieces]
    kept, target = None, rows_N
    if min(counts) < size:
        places = [s * size + i for s, count in enumerate(counts) for i in range(count)]
        kept = indices(places, device)
        target = rows_N[kept]
    blocks = tuple(_block(kv, pieces, rows_SR, span) for span in keys)
    return Stack(len(pieces), rows_N, kept, target, blocks)


def _block(kv: KvView, pieces: Sequence[_Piece], rows_SR: Tensor, keys: range) -> Block:
    ends = [piece.seen.past + piece.seen.num_new for piece in pieces]
    place = kv.locate(
        [
            Span(piece.sequence, keys.start, min(keys.stop, end))
            for piece, end in zip(pieces, ends, strict=True)
        ],
        len(keys),
    )
    if all(piece.seen.sees_all(piece.first, piece.last, keys) for piece in pieces):
        return Block(place, None)
    if any(piece.seen.ancestors is not None for piece in pieces):
        hidden = torch.stack(
            [piece.seen.hidden(rows, keys) for piece, rows in zip(pieces, rows_SR, strict=True)]
        )
        return Block(place, hidden)
    pasts = indices([piece.seen.past for piece in pieces], rows_SR.device)
    at_SR1 = (rows_SR + pasts[:, None])[..., None]  # positions
    keys_n = torch.arange(keys.start, keys.stop, device=rows_SR.device)
    hidden = keys_n > at_SR1
    window = pieces[0].seen.window
    if window is not None:
        hidden |= keys_n <= at_SR1 - window
    return Block(place, hidden)
