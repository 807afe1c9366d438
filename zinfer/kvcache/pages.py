"""Who owns which page of the KV cache.  In: sequence ids and token counts.  Out: ranges of token slots.  Integers."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from itertools import pairwise

from zinfer.errors import BudgetError, InternalError
from zinfer.spec.records import DTYPE_BYTES

PAGE_TOKENS = 16


def pages_for(tokens: int) -> int:
    """Pages that hold `tokens` tokens of one sequence."""
    return -(-tokens // PAGE_TOKENS)


def kv_cache_bytes(num_layers: int, num_kv_heads: int, head_dim: int, num_pages: int, dtype: str) -> int:
    """Bytes of the slab that holds keys and values of all layers; `dtype` as in ModelSpec.dtype."""
    return 2 * num_layers * num_pages * PAGE_TOKENS * num_kv_heads * head_dim * DTYPE_BYTES[dtype]


@dataclass(frozen=True, slots=True, order=True)
class Run:
    """Pages start .. start + count - 1: neighbours, so that their tokens are one view."""

    start: int
    count: int

    @property
    def stop(self) -> int:
        """The page after the last."""
        return self.start + self.count


class PagePool:
    """Free pages as sorted runs that never touch each other.

    `take` gives one run where one fits (the smallest that does), else the fewest runs; `give_back` joins
    neighbours again.  Not thread-safe: the generation loop is its only user.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = [Run(0, num_pages)] if num_pages else []

    @property
    def free_pages(self) -> int:
        """Pages nobody owns."""
        return sum(run.count for run in self._free)

    def take(self, count: int) -> tuple[Run, ...]:
        """Hand out `count` pages, or raise BudgetError ZI-2501 and change nothing."""
        if count > self.free_pages:
            raise BudgetError(
                "ZI-2501",
                f"{count} KV pages of {PAGE_TOKENS} tokens were wanted, {self.free_pages} of "
                f"{self.num_pages} are free",
                remedy=f"run fewer sequences at once, ask for at most {self.free_pages * PAGE_TOKENS} tokens, "
                "or allow more memory (--host-mem, --device-mem)",
            )
        taken: list[Run] = []
        while count:
            fitting = [run for run in self._free if run.count >= count]
            run = min(fitting, key=lambda run: (run.count, run.start)) if fitting else self._largest()
            piece = Run(run.start, min(run.count, count))
            self._free.remove(run)
            if piece.count < run.count:
                insort(self._free, Run(piece.stop, run.count - piece.count))
            taken.append(piece)
            count -= piece.count
        return tuple(sorted(taken))

    def give_back(self, runs: tuple[Run, ...]) -> None:
        """Return pages that `take` gave; a page that is already free is an InternalError ZI-2502."""
        joined: list[Run] = []
        for run in sorted([*self._free, *runs]):
            if joined and run.start < joined[-1].stop:
                raise InternalError("ZI-2502", f"KV pages {run} were given back twice")
            if joined and run.start == joined[-1].stop:
                joined[-1] = Run(joined[-1].start, joined[-1].count + run.count)
            else:
                joined.append(run)
        self._free = joined

    def _largest(self) -> Run:
        return max(self._free, key=lambda run: (run.count, -run.start))


@dataclass(slots=True)
class PageTable:
    """One sequence's pages: token t lies in the t // PAGE_TOKENS-th of them.  `length` tokens are committed."""

    runs: tuple[Run, ...]
    max_tokens: int
    length: int = 0

    def slots(self, start: int, stop: int) -> list[range]:
        """The slots of tokens start .. stop - 1, oldest first, as few ranges as the pages allow."""
        found: list[range] = []
        first_token = 0
        for run in self.runs:
            end_token = first_token + run.count * PAGE_TOKENS
            low, high = max(start, first_token), min(stop, end_token)
            if low < high:
                shift = run.start * PAGE_TOKENS - first_token
                found.append(range(low + shift, high + shift))
            first_token = end_token
        return found


class PageTables:
    """The page tables of all open sequences over one pool."""

    def __init__(self, num_pages: int) -> None:
        self.pool = PagePool(num_pages)
        self._tables: dict[int, PageTable] = {}

    def __getitem__(self, sequence_id: int) -> PageTable:
        return self._tables[sequence_id]

    def __len__(self) -> int:
        return len(self._tables)

    def open(self, sequence_id: int, max_tokens: int) -> PageTable:
        """Reserve every page that `max_tokens` tokens will need, so that a running sequence never runs out.

        Raises BudgetError ZI-2501 when the pages are not there, InternalError ZI-2503 when the id is open.
        """
        if sequence_id in self._tables:
            raise InternalError("ZI-2503", f"sequence {sequence_id} is open already")
        table = PageTable(self.pool.take(pages_for(max_tokens)), max_tokens)
        self._tables[sequence_id] = table
        return table

    def close(self, sequence_id: int) -> None:
        """Give a sequence's pages back."""
        self.pool.give_back(self._tables.pop(sequence_id).runs)

    def check(self) -> None:
        """Every page is free or owned by one sequence; raises InternalError ZI-2504 when they do not add up."""
        owned = sorted(run for table in self._tables.values() for run in table.runs)
        held = sum(run.count for run in owned)
        overlap = any(left.stop > right.start for left, right in pairwise(owned))
        if overlap or held + self.pool.free_pages != self.pool.num_pages:
            raise InternalError(
                "ZI-2504",
                f"KV pages do not balance: {held} held, {self.pool.free_pages} free, {self.pool.num_pages} "
                f"in all, overlap: {overlap}",
            )
