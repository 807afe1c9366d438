"""Attention on the host by compiled code.  In: a Packed batch and its cache.  Out: its rows, in tiles over the pages.

A row's bits depend on the row and the keys it sees, so exact mode has no other driver; and nothing is gathered that
lies on the host already.  Of a branch or a tree, every row has its keys in the order of their positions: it gets the
bits of its path alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zinfer.kernels import served
from zinfer.kernels.native.calls import Kernels, kernels
from zinfer.kernels.paged import PageRows
from zinfer.layers.packed import KvView, Packed, Span
from zinfer.units import round_up

_STEP = 1024  # tokens: tables of lengths within a step have one shape, so that passes are alike
_Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows that one call attends: worked out once for all layers.

    `rows_N` are rows of the batch (None: all of it).  `pages` has a line per sequence and a length per row; `tiles` are
    bounds of rows and lines of the table (None: row i has line i).  `place` is where `KvView.read` finds the keys of a
    lone sequence, in whose order slots then count; None where the pages are read in place.
    """

    rows_N: Tensor | None
    pages: PageRows
    tiles: tuple[Tensor, Tensor] | None
    place: Any


def tiles_of(batch: Packed, kv: KvView, like_THD: Tensor, kv_heads: int) -> list[Tiles] | None:
    """How compiled code attends a batch with queries like these; None where it does not serve."""
    num_heads, head_dim = like_THD.shape[1:]
    found = serving(like_THD.device.type, like_THD.dtype)
    planes = kv.planes(0)
    is_plain = len(planes) <= 1 and all(plane.dtype == like_THD.dtype for plane in planes)
    if found is None or not is_plain or not found.attends(num_heads, kv_heads, head_dim):
        return None
    most = found.tile_rows(num_heads, kv_heads, head_dim)
    everyone = range(batch.num_sequences)
    trees = [s for s in everyone if batch.ancestors is not None and batch.ancestors[s] is not None]
    branches = [s for s in everyone if s in batch.forked and s not in trees]
    others = [s for s in everyone if s not in batch.forked and s not in trees]
    return [tiles for group in (others, branches) for tiles in _group(batch, kv, group, most)] + [
        _tree(batch, kv, s) for s in trees
    ]


def serving(device: str, dtype: torch.dtype) -> Kernels | None:
    """The compiled kernels, where they attend such rows; none where Triton is interpreted in their place."""
    is_theirs = device == "cpu" and dtype == torch.bfloat16
    return kernels() if is_theirs and not served.serves(device) else None


def attend_tiles(
    q_THD: Tensor, layer: int, kv: KvView, work: Sequence[Tiles], *, scale: float, window: int | None
) -> Tensor:
    """[T, H, D]; the new rows are staged already."""
    found = serving(q_THD.device.type, q_THD.dtype)
    assert found is not None, "it served when the pass was prepared"
    out_THD: Tensor | None = None
    for part in work:
        q_NHD = q_THD if part.rows_N is None else q_THD.index_select(0, part.rows_N)
        if part.place is None:
            k_nKD, v_nKD = kv.planes(layer)[0].unbind()
        else:
            k_nKD, v_nKD = (x_1nKD[0].contiguous() for x_1nKD in kv.read(layer, part.place))
        where = part.pages.table, part.pages.lengths, part.pages.page_tokens
        y_NHD = found.attend(
            q_NHD, k_nKD, v_nKD, *where, scale=scale, window=window, cap=0.0, tiles=part.tiles
        )
        if part.rows_N is None:
            return y_NHD
        out_THD = torch.empty_like(q_THD) if out_THD is None else out_THD
        out_THD.index_copy_(0, part.rows_N, y_NHD)
    assert out_THD is not None, "a batch has sequences"
    return out_THD


def _group(batch: Packed, kv: KvView, sequences: Sequence[int], most: int) -> list[Tiles]:
    """Sequences whose rows follow each other: one call over their pages, or one each where keys come from elsewhere."""
    if not sequences:
        return []
    pages = kv.pages(sequences)
    if pages is None:
        return [_gathered(batch, kv, s, most) for s in sequences]
    spans = [batch.bounds[s : s + 2] for s in sequences]
    rows_N = None if len(sequences) == batch.num_sequences else _rows(spans)
    if all(stop - start == 1 for start, stop in spans):
        padded = round_up(pages.longest, _STEP) if batch.is_padded else pages.longest
        return [Tiles(rows_N, pages.padded(padded), None, None)]
    lengths = np.concatenate([_lengths(batch, s) for s in sequences])
    counts = [stop - start for start, stop in spans]
    whole = PageRows(pages.table, torch.from_numpy(lengths), pages.longest, pages.page_tokens)
    return [Tiles(rows_N, whole, _cut(counts, most), None)]


def _gathered(batch: Packed, kv: KvView, sequence: int, most: int) -> Tiles:
    """A sequence whose keys are read as one piece."""
    lengths, end, place = _read(batch, kv, sequence)
    pages = PageRows(torch.zeros(1, 1, dtype=torch.int32), torch.from_numpy(lengths), end, end)
    rows_N = _rows([batch.bounds[sequence : sequence + 2]]) if batch.num_sequences > 1 else None
    return Tiles(rows_N, pages, _cut([len(lengths)], most), place)


def _tree(batch: Packed, kv: KvView, sequence: int) -> Tiles:
    """A sequence whose new rows see what their table of ancestors says: a line of slots for each."""
    _, end, place = _read(batch, kv, sequence)
    assert batch.ancestors is not None, "whoever asks has seen it"
    table = batch.ancestors[sequence]
    assert table is not None, "whoever asks has seen it"
    pages = kv.pages([sequence])
    slots = np.arange(end, dtype=np.int32)
    if pages is not None:
        place = None
        line, size = pages.table[0].numpy(), pages.page_tokens
        slots = line[slots // size] * size + slots % size
    past = batch.past[sequence]
    seen = [np.concatenate((slots[:past], slots[past:][row.numpy()])) for row in table]
    lines = np.zeros((len(seen), max(map(len, seen))), np.int32)
    for line, found in zip(lines, seen, strict=True):
        line[: len(found)] = found
    counts = torch.tensor([len(found) for found in seen], dtype=torch.int32)
    rows = PageRows(torch.from_numpy(lines), counts, lines.shape[1], 1)
    rows_N = _rows([batch.bounds[sequence : sequence + 2]]) if batch.num_sequences > 1 else None
    return Tiles(rows_N, rows, None, place)


def _read(batch: Packed, kv: KvView, sequence: int) -> tuple[_Ints, int, Any]:
    """The keys that each new row sees, how many there are, and where they are read together."""
    end = batch.past[sequence] + batch.bounds[sequence + 1] - batch.bounds[sequence]
    return _lengths(batch, sequence), end, kv.locate([Span(sequence, 0, end)], end)


def _lengths(batch: Packed, sequence: int) -> _Ints:
    start, stop = batch.bounds[sequence : sequence + 2]
    return np.arange(batch.past[sequence] + 1, batch.past[sequence] + 1 + stop - start, dtype=np.int32)


def _cut(counts: Sequence[int], most: int) -> tuple[Tensor, Tensor]:
    """Rows of sequences, back to back, in tiles of at most `most`: bounds, and whose each is."""
    bounds, lines, start = [0], [], 0
    for line, count in enumerate(counts):
        ends = [*range(start + most, start + count, most), start + count]
        bounds += ends
        lines += [line] * len(ends)
        start += count
    return torch.tensor(bounds, dtype=torch.int32), torch.tensor(lines, dtype=torch.int32)


def _rows(spans: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([row for start, stop in spans for row in range(start, stop)])
