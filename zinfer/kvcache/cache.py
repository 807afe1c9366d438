"""Keys and values of past tokens.  In: a pass's new rows per layer.  Out: views of what is committed, in blocks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from zinfer.errors import BudgetError
from zinfer.kvcache.pages import PAGE_TOKENS, PageTable, PageTables, kv_cache_bytes, pages_for
from zinfer.spec.attention_cost import KV_BLOCK

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class PagedKv:
    """One slab [layers, 2, pages * PAGE_TOKENS, K, D], allocated once and exactly; sequences own pages of it.

    Owns the slab until it is garbage; views handed out point into it and are valid until their sequence closes.
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
    ) -> None:
        slots = num_pages * PAGE_TOKENS
        self.nbytes = kv_cache_bytes(num_layers, num_kv_heads, head_dim, num_pages, dtype)
        self.tables = PageTables(num_pages)
        self.slab = torch.empty(
            (num_layers, 2, slots, num_kv_heads, head_dim), dtype=_DTYPES[dtype], device=device
        )

    @property
    def capacity_tokens(self) -> int:
        """Tokens that a lone sequence could have."""
        return self.tables.pool.num_pages * PAGE_TOKENS

    def has_room(self, max_tokens: int) -> bool:
        """Whether `open` would find its pages now."""
        return pages_for(max_tokens) <= self.tables.pool.free_pages

    def open(self, sequence_id: int, max_tokens: int) -> None:
        """Reserve pages for a sequence of at most `max_tokens` tokens; BudgetError ZI-2501 when they lack."""
        self.tables.open(sequence_id, max_tokens)

    def close(self, sequence_id: int) -> None:
        """Forget a sequence and free its pages."""
        self.tables.close(sequence_id)

    def length(self, sequence_id: int) -> int:
        """Committed tokens of a sequence."""
        return self.tables[sequence_id].length

    def view(self, sequence_ids: Sequence[int], bounds: Sequence[int]) -> PagedView:
        """The cache as one pass sees it: sequence s of the batch stages rows bounds[s]:bounds[s+1].

        Raises BudgetError ZI-2506 when a sequence would outgrow the tokens it was opened for.
        """
        return PagedView(self.slab, [self.tables[id_] for id_ in sequence_ids], bounds)


class PagedView:
    """A KvView over the slab.  Rows staged lie behind the committed ones and count only once committed."""

    def __init__(self, slab: Tensor, tables: Sequence[PageTable], bounds: Sequence[int]) -> None:
        self._slab = slab
        self._tables = tables
        self._counts = [stop - start for start, stop in pairwise(bounds)]
        for table, count in zip(tables, self._counts, strict=True):
            if table.length + count > table.max_tokens:
                raise BudgetError(
                    "ZI-2506",
                    f"a sequence opened for {table.max_tokens} tokens holds {table.length} and was given "
                    f"{count} more",
                    remedy=f"open it for at least {table.length + count} tokens (a larger max_tokens)",
                )
        staged = [
            slots
            for table, count in zip(tables, self._counts, strict=True)
            for slots in table.slots(table.length, table.length + count)
        ]
        self._slots_T = _index(staged, slab.device)

    def stage(self, layer: int, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Write the pass's new rows of one layer."""
        with torch.no_grad():
            self._slab[layer, 0].index_copy_(0, self._slots_T, k_TKD.detach())
            self._slab[layer, 1].index_copy_(0, self._slots_T, v_TKD.detach())

    def past(self, layer: int, sequence: int) -> list[tuple[Tensor, Tensor]]:
        """Committed (k, v) in blocks of KV_BLOCK tokens, each [n, K, D], oldest first.

        A block whose pages are neighbours is a view of the slab, any other is gathered.
        """
        length = self._tables[sequence].length
        return [
            self._rows(layer, sequence, start, min(start + KV_BLOCK, length))
            for start in range(0, length, KV_BLOCK)
        ]

    def span(self, layer: int, sequence: int, start: int = 0) -> tuple[Tensor, Tensor]:
        """(k, v) [n, K, D] of all tokens from `start` on, committed and staged: a view where pages are one run."""
        stop = self._tables[sequence].length + self._counts[sequence]
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
        keys, values = self._slab[layer]
        runs = self._tables[sequence].slots(start, stop)
        if len(runs) == 1:
            slots = slice(runs[0].start, runs[0].stop)
            return keys[slots], values[slots]
        index = _index(runs, self._slab.device)
        return keys.index_select(0, index), values.index_select(0, index)


def _index(runs: Sequence[range], device: torch.device) -> Tensor:
    """The slots of all runs, one after the other, as an index tensor."""
    return torch.tensor([slot for run in runs for slot in run], dtype=torch.long, device=device)
