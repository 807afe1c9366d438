"""Who owns which page of the KV cache.  In: sequence ids and token counts.  Out: ranges of token slots.  Integers."""

from __future__ import annotations

from bisect import bisect, insort
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from zinfer.errors import BudgetError, InternalError
from zinfer.spec.attention_cost import KV_BLOCK
from zinfer.spec.records import kv_row_bytes

PAGE_TOKENS = 16
_ROOM_TO_GROW = (
    KV_BLOCK // PAGE_TOKENS
)  # pages left behind a sequence, while there are enough, for it to grow into


def pages_for(tokens: int) -> int:
    """Pages that hold `tokens` tokens of one sequence."""
    return -(-tokens // PAGE_TOKENS)


def kv_cache_bytes(num_layers: int, num_kv_heads: int, head_dim: int, num_pages: int, dtype: str) -> int:
    """Bytes of the planes that hold keys and values of all layers; `dtype` as in ModelSpec.dtype, or "INT8"."""
    return num_pages * PAGE_TOKENS * num_layers * kv_row_bytes(num_kv_heads, head_dim, dtype)


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

    Sequences grow page by page, so `take` leaves some room behind whoever owns the pages before: a grown sequence is
    then mostly one run.  `give_back` joins neighbours again.  Not thread-safe: the generation loop is its only user.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.free_pages = num_pages
        self._free = [Run(0, num_pages)] if num_pages else []

    def take(self, count: int, *, after: int | None = None) -> tuple[Run, ...]:
        """Hand out `count` pages: first those from page `after` on if they are free, then out of the largest runs.

        Raises BudgetError ZI-2501 when they lack, and nothing has changed.
        """
        if count > self.free_pages:
            raise BudgetError(
                "ZI-2501",
                f"{count} KV pages of {PAGE_TOKENS} tokens were wanted, {self.free_pages} of "
                f"{self.num_pages} are free",
                remedy=f"run fewer sequences at once, ask for at most {self.free_pages * PAGE_TOKENS} tokens, "
                "or allow more memory (--host-mem, --device-mem)",
            )
        self.free_pages -= count
        taken: list[Run] = []
        if count and after is not None:
            following = next((run for run in self._free if run.start == after), None)
            if following is not None:
                taken.append(self._cut(following, after, count))
        while (left := count - sum(run.count for run in taken)) > 0:
            largest = max(self._free, key=lambda run: (run.count, -run.start))
            room = min(max(largest.count - left, 0) // 2, _ROOM_TO_GROW) if largest.start else 0
            taken.append(self._cut(largest, largest.start + room, left))
        return tuple(taken)

    def give_back(self, runs: Iterable[Run]) -> None:
        """Return pages that `take` gave; a page that is already free is an InternalError ZI-2502."""
        for run in runs:
            low = high = bisect(self._free, run)
            start, stop = run.start, run.stop
            if low and self._free[low - 1].stop >= start:
                low -= 1
                start = self._free[low].start
            if high < len(self._free) and self._free[high].start <= stop:
                stop = self._free[high].stop
                high += 1
            if stop - start != run.count + sum(other.count for other in self._free[low:high]):
                raise InternalError("ZI-2502", f"KV pages {run} were given back twice")
            self._free[low:high] = [Run(start, stop - start)]
            self.free_pages += run.count

    def _cut(self, run: Run, start: int, most: int) -> Run:
        """Take at most `most` pages from `start` on out of a free run."""
        piece = Run(start, min(most, run.stop - start))
        self._free.remove(run)
        for rest in (Run(run.start, start - run.start), Run(piece.stop, run.stop - piece.stop)):
            if rest.count:
                insort(self._free, rest)
        return piece


def _append(runs: list[Run], run: Run) -> None:
    """Put a run behind the others, joined to the last one where they are neighbours."""
    if runs and runs[-1].stop == run.start:
        runs[-1] = Run(runs[-1].start, runs[-1].count + run.count)
    else:
        runs.append(run)


@dataclass(frozen=True, slots=True)
class Fork:
    """Where one of several branches of a sequence lies: they share its first `trunk` tokens, and the branch's own,
    from its token `trunk` on, lie `shift` tokens further in the pages than they count."""

    trunk: int
    shift: int


@dataclass(slots=True)
class PageTable:
    """One sequence's pages: token t lies in the t // PAGE_TOKENS-th of them.  `length` tokens are committed."""

    runs: list[Run]
    length: int = 0

    @property
    def num_pages(self) -> int:
        """Pages it owns."""
        return sum(run.count for run in self.runs)

    @property
    def room(self) -> int:
        """Tokens that its pages hold, committed ones included."""
        return self.num_pages * PAGE_TOKENS

    def pages(self, count: int) -> list[int]:
        """The first `count` pages, in the order of their tokens."""
        return [page for run in self.runs for page in range(run.start, run.stop)][:count]

    def slots(self, start: int, stop: int, fork: Fork | None = None) -> list[range]:
        """The slots of tokens start .. stop - 1, oldest first, as few ranges as the pages and the fork allow."""
        if fork is not None:
            own = max(start, fork.trunk)
            return self.slots(start, min(stop, fork.trunk)) + self.slots(own + fork.shift, stop + fork.shift)
        found: list[range] = []
        first_token = 0
        for run in self.runs:
            if first_token >= stop:
                break
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

    def __contains__(self, sequence_id: int) -> bool:
        return sequence_id in self._tables

    def __len__(self) -> int:
        return len(self._tables)

    def open(self, sequence_id: int, num_tokens: int) -> PageTable:
        """Give a new sequence the pages of its first `num_tokens` tokens; `grow` gets it more.

        Raises BudgetError ZI-2501 when the pages are not there, InternalError ZI-2503 when the id is open.
        """
        if sequence_id in self._tables:
            raise InternalError("ZI-2503", f"sequence {sequence_id} is open already")
        table = PageTable([])
        for run in self.pool.take(pages_for(num_tokens)):
            _append(table.runs, run)
        self._tables[sequence_id] = table
        return table

    def grow(self, sequence_id: int, num_tokens: int) -> bool:
        """See that the sequence has pages for `num_tokens` tokens in all; False, and nothing changed, if they lack.

        Its last page's neighbours are preferred, so that its tokens stay one run while they can.
        """
        table = self._tables[sequence_id]
        missing = pages_for(num_tokens) - table.num_pages
        if missing > self.pool.free_pages:
            return False
        if missing > 0:
            after = table.runs[-1].stop if table.runs else None
            for run in self.pool.take(missing, after=after):
                _append(table.runs, run)
        return True

    def close(self, sequence_id: int) -> None:
        """Give a sequence's pages back.  Raises InternalError ZI-2505 for one that is not open."""
        if sequence_id not in self._tables:
            raise InternalError("ZI-2505", f"sequence {sequence_id} is not open")
        self.pool.give_back(self._tables.pop(sequence_id).runs)

    def check(self) -> None:
        """Every page is free or owned by one sequence; raises InternalError ZI-2504 when they do not add up."""
        owned = sorted(run for table in self._tables.values() for run in table.runs)
        held = sum(run.count for run in owned)
        overlap = any(left.stop > right.start for left, right in pairwise(owned))
        too_long = [id_ for id_, table in self._tables.items() if table.length > table.room]
        if overlap or too_long or held + self.pool.free_pages != self.pool.num_pages:
            raise InternalError(
                "ZI-2504",
                f"KV pages do not balance: {held} held, {self.pool.free_pages} free, {self.pool.num_pages} "
                f"in all, overlap: {overlap}, sequences longer than their pages: {too_long}",
            )
