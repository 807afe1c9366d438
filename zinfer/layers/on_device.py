"""Attention by our own kernels.  In: a Packed batch and its cache.  Out: which sequences they serve; their rows.

Prompts, and later pieces of prompts over what is cached, go to torch's packed attention; single rows over their past
to zinfer's kernel over pages in place.  What neither serves is left to the drivers of `zinfer.layers.attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from zinfer.kernels.paged import PageRows, paged_decode, paged_serves
from zinfer.layers.packed import KvView, Packed, Span
from zinfer.layers.steps import step_up
from zinfer.layers.varlen import Pack, varlen, varlen_serves
from zinfer.memory.upload import indices


@dataclass(frozen=True, slots=True)
class DeviceWork:
    """The sequences of a batch that kernels of the device attend, worked out once for all layers.

    `prompts` have no past and share one call, `pieces` a call each, `singles` one call over pages in place.
    """

    prompts: list[int] = field(default_factory=list)
    pieces: list[int] = field(default_factory=list)
    singles: list[int] = field(default_factory=list)
    prompt_pack: Pack | None = None
    prompt_rows_N: Tensor | None = None  # None: all rows of the batch
    piece_rows: list[tuple[slice, Pack, Any]] = field(
        default_factory=list
    )  # rows, pack, KvView.locate's answer
    pages: PageRows | None = None
    single_rows_N: Tensor | None = None

    @property
    def sequences(self) -> set[int]:
        """All of them."""
        return {*self.prompts, *self.pieces, *self.singles}


def device_work(batch: Packed, kv: KvView, q_THD: Tensor, kv_heads: int, window: int | None) -> DeviceWork:
    """Share the batch out."""
    device = q_THD.device
    is_here = kv.device.type == device.type
    is_packing = varlen_serves(
        q_THD.dtype, q_THD.shape[1], kv_heads, q_THD.shape[2], device.type, window is not None
    )
    kinds: dict[str, list[int]] = {"prompt": [], "piece": [], "single": []}
    for s in range(batch.num_sequences):
        if batch.ancestors is None or batch.ancestors[s] is None:
            rows = batch.bounds[s + 1] - batch.bounds[s]
            is_single = rows == 1 and s not in batch.forked  # whose keys do not lie on pages of their own
            kinds["prompt" if not batch.past[s] else "single" if is_single else "piece"].append(s)
    prompts = kinds["prompt"] if is_packing else []
    pieces = kinds["piece"] if is_packing and is_here else []
    singles = kinds["single"]
    is_int8 = bool(singles) and is_here and len(kv.planes(0)) > 1
    case = (q_THD.dtype, q_THD.shape[1], kv_heads, q_THD.shape[2], is_int8, device.type)
    is_paged = is_here and kv.is_resident and bool(singles) and paged_serves(*case)
    pages = kv.pages(singles) if is_paged else None
    singles = singles if pages is not None else []
    if pages is not None and batch.is_padded:
        pages = pages.padded(step_up(pages.longest))
    counts = [batch.bounds[s + 1] - batch.bounds[s] for s in prompts]
    return DeviceWork(
        prompts,
        pieces,
        singles,
        Pack.of(counts, counts, device) if prompts else None,
        _rows(batch, prompts, device),
        [_piece(batch, kv, s, window, device) for s in pieces],
        pages,
        _rows(batch, singles, device),
    )


def on_device(
    out_THD: Tensor,
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    layer: int,
    kv: KvView,
    work: DeviceWork,
    scale: float,
    window: int | None,
) -> None:
    """Put the rows of the sequences that are served into `out_THD`; the new rows are staged already."""
    if work.prompt_pack is not None:
        rows_N = work.prompt_rows_N
        q, k, v = (x if rows_N is None else x.index_select(0, rows_N) for x in (q_THD, k_TKD, v_TKD))
        _put(out_THD, rows_N, varlen(q, k, v, work.prompt_pack, scale=scale, window=window))
    for rows, pack, place in work.piece_rows:
        k, v = (x_1nKD[0].to(q_THD.dtype) for x_1nKD in kv.read(layer, place))
        out_THD[rows] = varlen(q_THD[rows], k, v, pack, scale=scale, window=window)
    if work.pages is not None:
        rows_N = work.single_rows_N
        q = q_THD if rows_N is None else q_THD.index_select(0, rows_N)
        _put(out_THD, rows_N, paged_decode(q, kv.planes(layer), work.pages, scale=scale, window=window))


def _put(out_THD: Tensor, rows_N: Tensor | None, found_NHD: Tensor) -> None:
    if rows_N is None:
        out_THD.copy_(found_NHD)
    else:
        out_THD.index_copy_(0, rows_N, found_NHD)


def _rows(batch: Packed, sequences: Sequence[int], device: torch.device) -> Tensor | None:
    """The rows of the sequences; None where that is the whole batch."""
    if len(sequences) == batch.num_sequences:
        return None
    spans = list(pairwise(batch.bounds))
    return indices([row for s in sequences for row in range(*spans[s])], device)


def _piece(
    batch: Packed, kv: KvView, sequence: int, window: int | None, device: torch.device
) -> tuple[slice, Pack, Any]:
    start, stop = batch.bounds[sequence : sequence + 2]
    past = batch.past[sequence]
    first = 0 if window is None else max(0, past - window + 1)
    end = past + stop - start
    place = kv.locate([Span(sequence, first, end)], end - first)
    return slice(start, stop), Pack.of([stop - start], [end - first], device), place
