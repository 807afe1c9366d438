"""How large should chunks be?  In: a Source, a budget for weights, slots.  Out: the limit that moves the least."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from zinfer.chunks.pack import chunk_sizes, layer_sizes
from zinfer.chunks.source import Source
from zinfer.errors import BudgetError
from zinfer.units import KIB, Bytes

# What a link could have moved in the fixed time of one more fetch (about 0.1 ms at 3 GB/s): the price of small
# chunks.  Without it the smallest would always win, for they leave the most room to what stays.
FETCH_BYTES = 256 * KIB
MAX_CANDIDATES = 256


def search_limit(source: Source, budget: int, slots: int, fetch_bytes: int = FETCH_BYTES) -> int:
    """The `limit` for `assemble` under which a steady pass streams the fewest bytes, `fetch_bytes` per fetch added.

    `budget` bytes hold `slots` slots of the largest chunk and, in the rest, chunks that stay.  Where everything
    fits nothing is streamed and what counts is the first load: its fetches and the chunk that nothing hides.
    Row tables are left out: they can be read by rows.

    After Elixir's search (arXiv 2212.05339, section 2), with a fixed resident set in place of Belady's rule and a
    finite list of candidates: every limit at which the grouping can change.
    Raises BudgetError ZI-2301 where `slots` of the largest op's weights exceed the budget.
    """
    layers = layer_sizes(source)
    largest = max((size for sizes in layers for size in sizes), default=0)
    total = sum(map(sum, layers))
    if total > budget and slots * largest > budget:
        least = min(total, slots * largest)
        raise BudgetError(
            "ZI-2301",
            f"{slots} slots of the largest op's {Bytes(largest)} need {Bytes(slots * largest)},"
            f" the budget for weights is {Bytes(budget)}",
            remedy=f"allow {Bytes(least - budget)} more: at least {Bytes(least)} for weights",
        )
    candidates = [limit for limit in _candidates(layers) if largest <= limit <= max(budget, largest)]
    # A model of many unlike layers: a sample that keeps both ends is close to the best.
    step = -(-len(candidates) // MAX_CANDIDATES)
    return min(
        {*candidates[::step], candidates[-1]},
        key=lambda limit: (_cost(layers, limit, budget, slots, fetch_bytes), limit),
    )


def _candidates(layers: Sequence[tuple[int, ...]]) -> list[int]:
    """Sums of consecutive units of a layer and of consecutive layers: between two of them no grouping changes."""
    runs = {tuple(map(sum, layers)), *layers}
    return sorted({total for run in runs for begin in range(len(run)) for total in accumulate(run[begin:])})


def _cost(layers: Sequence[tuple[int, ...]], limit: int, budget: int, slots: int, fetch_bytes: int) -> float:
    chunks = chunk_sizes(layers, limit)
    total, largest = sum(nbytes * count for nbytes, count in chunks.items()), max(chunks)
    if total <= budget:
        return chunks.total() * fetch_bytes + largest
    room = budget - slots * largest
    if room < 0:
        return float("inf")
    cost = 0
    for nbytes, count in sorted(chunks.items(), reverse=True):
        stay = min(count, room // nbytes)
        room -= stay * nbytes
        cost += (count - stay) * (nbytes + fetch_bytes)
    return cost
