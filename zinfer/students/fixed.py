"""Passes of a few fixed sizes, for a device that replays them.  In: packed texts.  Out: a recorded pass's answers.

Rows and texts are filled up to the next size; what fills up is a text of its own that nobody reads.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from zinfer.layers.packed import Packed
from zinfer.runtime.captured import Captured, Outputs, SharedPool

ROWS = (16, 32, 64, 128, 256, 512, 1024)
TEXTS = (1, 4, 16, 64)
Run = Callable[[int, Packed, Tensor, Tensor], Outputs]  # m, rows, each row's text, each text's first row


@dataclass(frozen=True, slots=True)
class Bucket:
    """How many rows and texts a recorded pass has."""

    rows: int
    texts: int


BUCKETS = tuple(Bucket(rows, texts) for rows in ROWS for texts in TEXTS if texts <= rows)


def bucket_of(rows: int, texts: int) -> Bucket | None:
    """The smallest bucket that holds so many; None beyond the largest."""
    at, to = bisect_left(ROWS, rows), bisect_left(TEXTS, texts)
    if at == len(ROWS) or to == len(TEXTS):
        return None
    return Bucket(max(ROWS[at], TEXTS[to]), TEXTS[to])


def fill_up(batch: Packed, bucket: Bucket) -> tuple[Packed, Tensor, Tensor]:
    """(rows, each row's text [rows], each text's first row [texts]); rows that fill up belong to text `texts`."""
    return _parts(_flat(batch, bucket), bucket)


def _flat(batch: Packed, bucket: Bucket) -> Tensor:
    """All that a pass reads, in one tensor: one copy takes it to the device."""
    texts, missing = batch.num_sequences, bucket.rows - batch.num_rows
    starts_S = torch.tensor(batch.bounds[:-1])
    lengths_S = torch.tensor(batch.bounds).diff()
    rows = [
        *(batch.ids(role) for role in ("tokens", "positions", "segments")),
        torch.repeat_interleave(torch.arange(texts), lengths_S),
    ]
    fillers = (0, 0, 0, bucket.texts)
    filled = [F.pad(ids, (0, missing), value=value) for ids, value in zip(rows, fillers, strict=True)]
    return torch.cat([*filled, F.pad(starts_S, (0, bucket.texts - texts))])


def _parts(flat: Tensor, bucket: Bucket) -> tuple[Packed, Tensor, Tensor]:
    sizes = [bucket.rows] * 4 + [bucket.texts]
    tokens_T, positions_T, segments_T, text_T, starts_S = torch.split(flat, sizes)
    batch = Packed(tokens_T, positions_T, (0, bucket.rows), (0,), starts_S)
    return replace(batch, segments_T=segments_T), text_T, starts_S


class Replays:
    """Recorded passes by (bucket, m).  `warm_up` records, `run` never does: what is not recorded it leaves alone."""

    def __init__(self, run: Run, device: torch.device) -> None:
        self._run, self._device = run, device
        self._pool = SharedPool(device)
        self.recorded: dict[tuple[Bucket, int], Captured] = {}
        self.num_replayed = 0

    def warm_up(self, students: Iterable[int], buckets: Iterable[Bucket] = BUCKETS) -> None:
        """Record every bucket for each number of students, the largest first: later ones fit into its memory."""
        sizes = sorted(buckets, key=lambda bucket: (-bucket.rows, -bucket.texts))
        for m in sorted(students, reverse=True):
            for bucket in sizes:
                self.recorded[bucket, m] = self._record(bucket, m)

    def run(self, batch: Packed, num_students: int) -> Outputs | None:
        """A recorded pass's outputs, cut to the texts that there are; None where none was recorded for the size."""
        bucket = bucket_of(batch.num_rows, batch.num_sequences)
        captured = self.recorded.get((bucket, num_students)) if bucket is not None else None
        if bucket is None or captured is None:
            return None
        self.num_replayed += 1
        return tuple(output[: batch.num_sequences] for output in captured(_flat(batch, bucket)))

    def _record(self, bucket: Bucket, num_students: int) -> Captured:
        def run(flat: Tensor) -> Outputs:
            return self._run(num_students, *_parts(flat, bucket))

        example = torch.zeros(4 * bucket.rows + bucket.texts, dtype=torch.long, device=self._device)
        return Captured(run, example, self._pool)
