"""Keys and values of past tokens.  In: a pass's new rows per layer.  Out: views of what is committed, in blocks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zinfer.chunks.disk import Disk
from zinfer.errors import BudgetError, InternalError
from zinfer.kvcache.pages import PAGE_TOKENS, PageTable, PageTables, kv_cache_bytes, pages_for
from zinfer.kvcache.spill import SpilledCopy
from zinfer.spec.attention_cost import KV_BLOCK

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class PagedKv:
    """One slab [layers, 2, pages * PAGE_TOKENS, K, D], allocated once and exactly; sequences own pages of it.

    Owns the slab until it is garbage; views handed out point into it and are valid until their sequence closes or is
    spilled.  A sequence has pages or a copy on disk, in `spill_folder` (None: the system's folder for such files).
    Used by one thread.  `dtype` is the word of ModelSpec.dtype.
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
        spill_folder: Path | None = None,
        disk: Disk | None = None,
    ) -> None:
        slots = num_pages * PAGE_TOKENS
        self.nbytes = kv_cache_bytes(num_layers, num_kv_heads, head_dim, num_pages, dtype)
        self.tables = PageTables(num_pages)
        self.slab = torch.empty(
            (num_layers, 2, slots, num_kv_heads, head_dim), dtype=_DTYPES[dtype], device=device
        )
        self._planes = (self.slab,)
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

    def has_room(self, num_tokens: int) -> bool:
        """Whether `open` would find its pages now."""
        return pages_for(num_tokens) <= self.tables.pool.free_pages

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
        copy = SpilledCopy.write(self._planes, table.slots(0, table.length), self._spill_folder, self._disk)
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
            is_whole = copy.read(self._planes, table.slots(0, copy.length))
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
        self, sequence_ids: Sequence[int], bounds: Sequence[int], starts: Sequence[int] | None = None
    ) -> PagedView:
        """The cache as one micro-batch sees it: sequence s of the batch stages rows bounds[s]:bounds[s+1].

        They lie at tokens starts[s] on: behind the committed ones (None), or behind what an earlier micro-batch of
        the same pass stages, which then counts as past.
        Raises BudgetError ZI-2506 when a sequence would outgrow its pages: `grow` comes first.
        """
        return PagedView(self.slab, [self.tables[id_] for id_ in sequence_ids], bounds, starts)


class PagedView:
    """A KvView over the slab.  Rows staged lie behind the committed ones and count only once committed."""

    def __init__(
        self,
        slab: Tensor,
        tables: Sequence[PageTable],
        bounds: Sequence[int],
        starts: Sequence[int] | None = None,
    ) -> None:
        self._slab = slab
        self._tables = tables
        self._counts = [stop - start for start, stop in pairwise(bounds)]
        self._starts = [table.length for table in tables] if starts is None else list(starts)
        for table, start, count in zip(tables, self._starts, self._counts, strict=True):
            if start + count > table.room:
                raise BudgetError(
                    "ZI-2506",
                    f"a sequence with cache pages for {table.room} tokens holds {start} and was given {count} more",
                    remedy="run fewer sequences at once (runtime.max_batch)",
                )
        staged = [
            slots
            for table, start, count in zip(tables, self._starts, self._counts, strict=True)
            for slots in table.slots(start, start + count)
        ]
        self._slots_T = _index(staged, slab.device)
        self._places: dict[tuple[int, int, int], slice | Tensor] = {}  # the same in every layer

    def stage(self, layer: int, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Write the pass's new rows of one layer."""
        with torch.no_grad():
            self._slab[layer, 0].index_copy_(0, self._slots_T, k_TKD.detach())
            self._slab[layer, 1].index_copy_(0, self._slots_T, v_TKD.detach())

    def past(self, layer: int, sequence: int) -> PastBlocks:
        """Committed (k, v) in blocks of KV_BLOCK tokens, each [n, K, D], oldest first.

        A block whose pages are neighbours is a view of the slab, any other is gathered, each time it is asked for.
        """
        return PastBlocks(self._starts[sequence], partial(self._rows, layer, sequence))

    def span(self, layer: int, sequence: int, start: int = 0) -> tuple[Tensor, Tensor]:
        """(k, v) [n, K, D] of all tokens from `start` on, committed and staged: a view where pages are one run."""
        stop = self._starts[sequence] + self._counts[sequence]
        return self._rows(layer, sequence, start, stop)

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
                target = _index(table.slots(table.length, table.length + len(indices)), self._slab.device)
                staged = _index(table.slots(table.length, table.length + count), self._slab.device)
                source = staged[torch.tensor(indices, device=self._slab.device)]
                self._slab.index_copy_(2, target, self._slab.index_select(2, source))
            table.length += len(indices)

    def _rows(self, layer: int, sequence: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        place = self._places.get((sequence, start, stop))
        if place is None:
            runs = self._tables[sequence].slots(start, stop)
            is_one = len(runs) == 1
            place = slice(runs[0].start, runs[0].stop) if is_one else _index(runs, self._slab.device)
            self._places[sequence, start, stop] = place
        keys, values = self._slab[layer]
        if isinstance(place, slice):
            return keys[place], values[place]
        return keys.index_select(0, place), values.index_select(0, place)


class PastBlocks(Sequence[tuple[Tensor, Tensor]]):
    """(k, v) of a sequence's committed tokens in blocks; a block exists only while somebody holds it."""

    def __init__(self, length: int, rows: Callable[[int, int], tuple[Tensor, Tensor]]) -> None:
        self._length, self._rows = length, rows

    def __len__(self) -> int:
        """Number of blocks."""
        return ceil(self._length / KV_BLOCK)

    def __getitem__(self, block: Any) -> Any:
        """One block, or a list of them for a slice."""
        if isinstance(block, slice):
            return [self[at] for at in range(*block.indices(len(self)))]
        if not -len(self) <= block < len(self):
            raise IndexError(block)
        start = block % len(self) * KV_BLOCK
        return self._rows(start, min(start + KV_BLOCK, self._length))


def _index(runs: Sequence[range], device: torch.device) -> Tensor:
    """The slots of all runs, one after the other, as an index tensor."""
    return torch.tensor([slot for run in runs for slot in run], dtype=torch.long, device=device)
