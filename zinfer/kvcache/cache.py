"""Keys and values of past tokens.  In: a pass's new rows per layer.  Out: views of what is committed, in blocks."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from zinfer.chunks.disk import Disk
from zinfer.errors import BudgetError, InternalError
from zinfer.kernels.paged import PageRows
from zinfer.kvcache.pages import PAGE_TOKENS, Fork, PageTable, PageTables, pages_for
from zinfer.kvcache.planes import Planes, make_planes
from zinfer.kvcache.spill import SpilledCopy
from zinfer.layers.packed import Span
from zinfer.memory.upload import indices as on_device
from zinfer.memory.upload import upload
from zinfer.spec.attention_cost import KV_BLOCK

Attend = Literal["resident", "device", "host"]


class Crossing(Protocol):
    """The links between a device and the host memory below it: copies that are counted and take their time."""

    device: torch.device

    def to_device(self, x: Tensor) -> Tensor: ...

    def to_host(self, x: Tensor) -> Tensor: ...


class PagedKv:
    """Planes [layers, 2, pages * PAGE_TOKENS, ...], allocated once and exactly; sequences own pages of them.

    They lie where attention is computed ("resident"), or in host memory below a device: then either their rows come
    up to the device for every use ("device"), or queries go down to them and results up ("host"), over `crossing`.
    Owns the planes until it is garbage; views handed out point into it and are valid until their sequence closes or is
    spilled.  A sequence has pages or a copy on disk, in `spill_folder` (None: the system's folder for such files).
    Used by one thread.  `dtype` is the word of ModelSpec.dtype, or "INT8".
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        dtype: str,
        device: torch.device | str = "cpu",
        attend: Attend = "resident",
        crossing: Crossing | None = None,
        spill_folder: Path | None = None,
        disk: Disk | None = None,
    ) -> None:
        self.tables = PageTables(num_pages)
        self.planes = make_planes(num_layers, num_kv_heads, head_dim, num_pages, dtype, device)
        self.nbytes = self.planes.nbytes
        self._road = Road(attend, crossing)
        self._spilled: dict[int, SpilledCopy] = {}
        self._spill_folder = Path(tempfile.gettempdir()) if spill_folder is None else spill_folder
        self._disk = disk

    @property
    def capacity_tokens(self) -> int:
        """Tokens that a lone sequence could have."""
        return self.tables.pool.num_pages * PAGE_TOKENS

    @property
    def free_tokens(self) -> int:
        """Tokens for which nobody owns a page yet."""
        return self.tables.pool.free_pages * PAGE_TOKENS

    def open(self, sequence_id: int, num_tokens: int) -> None:
        """Give a new sequence pages for its first `num_tokens` tokens; BudgetError ZI-2501 when they lack."""
        if sequence_id in self._spilled:
            raise InternalError("ZI-2503", f"sequence {sequence_id} is open already, on disk")
        self.tables.open(sequence_id, num_tokens)

    def grow(self, sequence_id: int, num_tokens: int) -> bool:
        """See that there are pages for `num_tokens` tokens in all; False, and nothing changed, when they lack."""
        return self.tables.grow(sequence_id, num_tokens)

    def close(self, sequence_id: int) -> None:
        """Forget a sequence: its pages are free, and its copy on disk is gone."""
        copy = self._spilled.pop(sequence_id, None)
        if copy is not None:
            copy.close()
        else:
            self.tables.close(sequence_id)

    def spill(self, sequence_id: int) -> int:
        """Write a sequence's committed rows to disk and free its pages; returns the bytes written.

        Raises MachineError ZI-5501 when the disk refuses; the sequence then still has its pages.
        """
        table = self.tables[sequence_id]
        copy = SpilledCopy.write(
            self.planes.tensors, table.slots(0, table.length), self._spill_folder, self._disk
        )
        self.tables.close(sequence_id)
        self._spilled[sequence_id] = copy
        return copy.nbytes

    def restore(self, sequence_id: int, num_tokens: int) -> bool:
        """Take pages for `num_tokens` tokens and read a spilled sequence back into them.

        False when its bytes are damaged or unreadable: it is then forgotten, and whoever wants it computes it again.
        Raises BudgetError ZI-2501 when pages lack; nothing has changed then.
        """
        copy = self._spilled[sequence_id]
        table = self.tables.open(sequence_id, max(num_tokens, copy.length))
        is_whole = False
        try:
            is_whole = copy.read(self.planes.tensors, table.slots(0, copy.length))
        finally:
            del self._spilled[sequence_id]
            copy.close()
            if is_whole:
                table.length = copy.length
            else:
                self.tables.close(sequence_id)
        return is_whole

    def spilled_tokens(self, sequence_id: int) -> int | None:
        """Committed tokens of a sequence that is on disk; None when it is not there."""
        copy = self._spilled.get(sequence_id)
        return None if copy is None else copy.length

    def length(self, sequence_id: int) -> int:
        """Committed tokens of a sequence, wherever they are."""
        copy = self._spilled.get(sequence_id)
        return self.tables[sequence_id].length if copy is None else copy.length

    def check(self) -> None:
        """Every page is free or owned once, and no sequence is in two places.  Raises InternalError ZI-2504."""
        self.tables.check()
        both = [id_ for id_ in self._spilled if id_ in self.tables]
        if both:
            raise InternalError("ZI-2504", f"sequences {both} have pages and a copy on disk")

    def end(self) -> None:
        """Forget what is on disk; may be called again."""
        while self._spilled:
            self._spilled.popitem()[1].close()

    def view(
        self,
        sequence_ids: Sequence[int],
        bounds: Sequence[int],
        starts: Sequence[int] | None = None,
        forks: Sequence[Fork | None] | None = None,
    ) -> PagedView:
        """The cache as one micro-batch sees it: sequence s of the batch stages rows bounds[s]:bounds[s+1].

        They lie at tokens starts[s] on: behind the committed ones (None), or behind what an earlier micro-batch of
        the same pass stages, which then counts as past.  Branches of one sequence are sequences of the batch with its
        id, a fork each, and starts that count from the branch's first token; its trunk is committed, or staged in
        this micro-batch or an earlier one.
        Raises BudgetError ZI-2506 when a sequence would outgrow its pages: `grow` comes first.
        """
        tables = [self.tables[id_] for id_ in sequence_ids]
        return PagedView(self.planes, self._road, tables, bounds, starts, forks)


@dataclass(frozen=True, slots=True)
class Road:
    """How queries, keys and values meet: who crosses the link, if anyone."""

    attend: Attend
    crossing: Crossing | None

    def rows_down(self, x: Tensor) -> Tensor:
        """New rows to where the pages are."""
        return x if self.attend == "resident" or self.crossing is None else self.crossing.to_host(x)

    def rows_up(self, x: Tensor) -> Tensor:
        """Rows of pages to where attention is computed."""
        return self.crossing.to_device(x) if self.attend == "device" and self.crossing else x

    def queries(self, x: Tensor) -> Tensor:
        """Queries to where attention is computed."""
        return self.crossing.to_host(x) if self.attend == "host" and self.crossing else x

    def results(self, x: Tensor) -> Tensor:
        """The way back."""
        return self.crossing.to_device(x) if self.attend == "host" and self.crossing else x


@dataclass(frozen=True, slots=True)
class Place:
    """Slots of S sequences' tokens, `size` of each: one slice where a lone sequence's are neighbours."""

    slots: slice | Tensor
    spans: tuple[Span, ...]
    size: int

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.spans)

    @property
    def sequence(self) -> int | None:
        """The lone sequence; None where there are several."""
        return self.spans[0].sequence if len(self.spans) == 1 else None

    @property
    def key(self) -> tuple[Span, int]:
        """What a lone sequence's place is known by."""
        return self.spans[0], self.size


class PagedView:
    """A KvView over the planes.  Rows staged lie behind the committed ones and count only once committed.

    `slots_T` are the places of the new rows.
    """

    def __init__(
        self,
        planes: Planes,
        road: Road,
        tables: Sequence[PageTable],
        bounds: Sequence[int],
        starts: Sequence[int] | None = None,
        forks: Sequence[Fork | None] | None = None,
    ) -> None:
        self._planes = planes
        self._road = road
        self._device = planes.tensors[0].device
        self.device = road.crossing.device if road.attend == "device" and road.crossing else self._device
        self._tables = tables
        self._counts = [stop - start for start, stop in pairwise(bounds)]
        self._starts = [table.length for table in tables] if starts is None else list(starts)
        self._forks = [None] * len(tables) if forks is None else list(forks)
        for table, start, count, fork in zip(tables, self._starts, self._counts, self._forks, strict=True):
            held = start + (fork.shift if fork else 0)
            if held + count > table.room:
                raise BudgetError(
                    "ZI-2506",
                    f"a sequence with cache pages for {table.room} tokens holds {held} and was given {count} more",
                    remedy="run fewer sequences at once (runtime.max_batch)",
                )
        staged = [
            slots
            for s, (start, count) in enumerate(zip(self._starts, self._counts, strict=True))
            for slots in self._slots(s, start, start + count)
        ]
        self.slots_T = _index(staged, self._device)
        self._risen: dict[tuple[Span, int], tuple[Tensor, Tensor]] = {}
        self._risen_for: tuple[int, int] | None = None  # layer and sequence
        self._places: dict[Span, Place] = {}  # of lone sequences, which many pieces of rows ask for

    def stage(self, layer: int, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Write the pass's new rows of one layer."""
        self.stage_at(layer, self.slots_T, k_TKD, v_TKD)

    def stage_at(self, layer: int, slots_T: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """The same into slots that the caller knows to be those of the new rows."""
        with torch.no_grad():
            for kind, rows_TKD in enumerate((k_TKD, v_TKD)):
                self._planes.write(layer, kind, slots_T, self._road.rows_down(rows_TKD.detach()))

    def bring(self, q_THD: Tensor) -> Tensor:
        """Queries to where the pages are read: themselves, or a copy over the link."""
        return self._road.queries(q_THD)

    def take_back(self, out_THD: Tensor) -> Tensor:
        """Results to where the queries came from."""
        return self._road.results(out_THD)

    def locate(self, spans: Sequence[Span], size: int) -> Place:
        """Where the tokens of the spans lie, each span filled up to `size` with its last token."""
        if len(spans) > 1:
            return self._locate(spans, size)
        place = self._places.get(spans[0])
        if place is None or place.size != size:
            place = self._places[spans[0]] = self._locate(spans, size)
        return place

    def read(self, layer: int, place: Place) -> tuple[Tensor, Tensor]:
        """(k, v) [S, size, K, D]: views where the place is a slice of plain resident pages, else gathered.

        What came up to a device is kept for the other pieces of its sequence in this layer.
        """
        if self._road.attend != "device" or place.sequence is None:
            return self._read(layer, place)
        if self._risen_for != (layer, place.sequence):
            self._risen_for, self._risen = (layer, place.sequence), {}
        if place.key not in self._risen:
            self._risen[place.key] = self._read(layer, place)
        return self._risen[place.key]

    def _read(self, layer: int, place: Place) -> tuple[Tensor, Tensor]:
        parts = [self._road.rows_up(part) for part in self._planes.parts(layer, place.slots)]
        both = self._planes.decode(parts)
        k, v = both.view(2, place.num_sequences, place.size, *both.shape[2:]).unbind()
        return k, v

    def pages(self, sequences: Sequence[int]) -> PageRows | None:
        """Page tables of the sequences, where the pages are; of slots in place of pages where a branch is among them.
        None where rows come up for every use."""
        if self._road.attend == "device":
            return None
        ends = [self._starts[s] + self._counts[s] for s in sequences]
        has_branches = any(self._forks[s] for s in sequences)
        tokens = 1 if has_branches else PAGE_TOKENS
        table = np.zeros((len(sequences), -(-max(ends) // tokens)), np.int32)
        for row, sequence, end in zip(table, sequences, ends, strict=True):
            if has_branches:
                row[:end] = np.concatenate(
                    [np.arange(run.start, run.stop) for run in self._slots(sequence, 0, end)]
                )
            else:
                row[: pages_for(end)] = self._tables[sequence].pages(pages_for(end))
        lengths = upload(torch.tensor(ends, dtype=torch.int32), self._device)
        return PageRows(upload(torch.from_numpy(table), self._device), lengths, max(ends), tokens)

    def planes(self, layer: int) -> list[Tensor]:
        """One layer of the pages: views."""
        return [plane[layer] for plane in self._planes.tensors]

    def past(self, layer: int, sequence: int) -> list[tuple[Tensor, Tensor]]:
        """Committed (k, v) in blocks of KV_BLOCK tokens, each [n, K, D], oldest first.

        A block whose pages are neighbours is a view where pages are plain and resident, any other is gathered.
        """
        length = self._starts[sequence]
        spans = [Span(sequence, start, min(start + KV_BLOCK, length)) for start in range(0, length, KV_BLOCK)]
        pairs = [self.read(layer, self.locate([span], span.stop - span.start)) for span in spans]
        return [(k[0], v[0]) for k, v in pairs]

    @property
    def is_resident(self) -> bool:
        """Whether nothing of an attention crosses a link."""
        return self._road.attend == "resident"

    def commit(self, rows: Sequence[Sequence[int] | None] | None = None) -> None:
        """Keep staged rows: for each sequence the indices (ascending, counted within it) to keep, None for all.

        Kept rows close up behind the committed ones in every layer; the rest is forgotten.  Ends the view.
        """
        kept = [None] * len(self._tables) if rows is None else rows
        for table, count, indices in zip(self._tables, self._counts, kept, strict=True):
            if indices is None:
                table.length += count
                continue
            if list(indices) != list(range(len(indices))):  # a prefix lies in its place already
                target = _index(table.slots(table.length, table.length + len(indices)), self._device)
                staged = _index(table.slots(table.length, table.length + count), self._device)
                self._planes.move(staged[on_device(indices, self._device)], target)
            table.length += len(indices)

    def _slots(self, sequence: int, start: int, stop: int) -> list[range]:
        return self._tables[sequence].slots(start, stop, self._forks[sequence])

    def _locate(self, spans: Sequence[Span], size: int) -> Place:
        found = [self._slots(span.sequence, span.start, span.stop) for span in spans]
        if len(found) == 1 and len(found[0]) == 1 and len(found[0][0]) == size:
            return Place(slice(found[0][0].start, found[0][0].stop), tuple(spans), size)
        slots_Sn = np.empty((len(spans), size), np.int64)
        for row_n, runs in zip(slots_Sn, found, strict=True):
            at = 0
            for run in runs:
                row_n[at : at + len(run)] = np.arange(run.start, run.stop)
                at += len(run)
            row_n[at:] = row_n[at - 1]
        return Place(upload(torch.from_numpy(slots_Sn).view(-1), self._device), tuple(spans), size)


def _index(runs: Sequence[range], device: torch.device) -> Tensor:
    """The slots of all runs, one after the other, as an index tensor."""
    return on_device([slot for run in runs for slot in run], device)
