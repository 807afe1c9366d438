"""Run texts through an encoder.  In: encoded texts.  Out: flows with pooled rows and logits, a pass at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain

import numpy as np
import torch
from torch import Tensor

from zinfer.layers.packed import Packed
from zinfer.models.encoder import EncoderFlow
from zinfer.runtime.executor import Executor, Micro
from zinfer.tokenizer import Encoded


def group_texts(lengths: Sequence[int], max_rows: int, max_batch: int) -> list[list[int]]:
    """Which texts share a pass: numbers of texts, longest first, at most `max_rows` rows and `max_batch` texts each.

    A text longer than `max_rows` has a pass of its own.  Every text is in exactly one group.
    """
    groups: list[list[int]] = []
    rows = max_rows
    for number in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        if not groups or rows + lengths[number] > max_rows or len(groups[-1]) == max_batch:
            groups.append([])
            rows = 0
        groups[-1].append(number)
        rows += lengths[number]
    return groups


def pack_texts(texts: Sequence[Encoded], *, has_segments: bool = True) -> Packed:
    """Texts back to back, without padding; without `has_segments` all rows are of token type 0."""
    bounds = np.fromiter(accumulate((len(text.ids) for text in texts), initial=0), dtype=np.int64)
    positions_T = np.arange(bounds[-1]) - np.repeat(bounds[:-1], np.diff(bounds))
    return Packed(
        tokens_T=_column(text.ids for text in texts),
        positions_T=torch.from_numpy(positions_T),
        bounds=tuple(bounds.tolist()),
        past=(0,) * len(texts),
        logit_rows=torch.from_numpy(bounds[:-1]),
        segments_T=_column(text.types for text in texts) if has_segments else None,
    )


def _column(parts: Iterable[Iterable[int]]) -> Tensor:
    """One after the other, [T]; a list on the way would take twice as long."""
    return torch.from_numpy(np.fromiter(chain.from_iterable(parts), dtype=np.int64))


def in_order(
    passes: Iterable[tuple[list[int], Tensor, Tensor | None]],
) -> tuple[Tensor, Tensor | None]:
    """What passes over some texts gave, by number of the text: (rows [S, D], logits [S, C] or None)."""
    numbers, rows, logits = zip(*passes, strict=True)
    back = torch.argsort(torch.tensor([number for some in numbers for number in some]))
    rows_SD = torch.cat(rows)[back]
    return rows_SD, None if logits[0] is None else torch.cat(logits)[back]


def encode(
    executor: Executor, texts: Sequence[Encoded], *, max_rows: int, max_batch: int, keep_layers: bool = False
) -> Iterator[tuple[list[int], Packed, EncoderFlow]]:
    """Yield (numbers of the texts, their batch, the flow after the pass) until every text has been through.

    With `keep_layers` the flow also holds every layer's output.
    """
    num_segments = executor.spec.encoder.num_segments if executor.spec.encoder is not None else 0
    for numbers in group_texts([len(text.ids) for text in texts], max_rows, max_batch):
        # RoBERTa's tokenizers tell the parts of a pair by special tokens alone.
        batch = pack_texts([texts[number] for number in numbers], has_segments=num_segments > 1)
        flow = EncoderFlow(layers=[] if keep_layers else None)
        executor.traverse([Micro(batch, None, flow)])
        yield numbers, batch, flow
