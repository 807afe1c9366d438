"""Which kernel, at which row counts.  In: candidates.  Out: row counts that agree bit for bit; the fastest.

Libraries pick a kernel by the number of rows, and kernels add in different orders.  Exact mode runs every product
with row counts of one agreeing group only, so that a row's bits depend on the row alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from zinfer.spec.cover import BALANCE_ROWS, cover

__all__ = ["agreeing_sizes", "cover", "device_clock", "fastest", "one_thread", "pad_rows"]

_ROUNDS = 7
_WORTH = 0.9  # another kernel is chosen only when it takes less than this share of the first one's time


def agreeing_sizes(
    product: Callable[[Tensor], Tensor], x_PI: Tensor, sizes: Sequence[int]
) -> tuple[int, ...]:
    """The cheapest group of `sizes` (ascending row counts) that give every row the same bits.

    `product` maps [r, I] to [r, O].  It is fed the rows of `x_PI` over and over, so that one call also shows
    whether a row's place matters; a size where it does agrees with nothing.  When no size is left the answer is
    (1,): one row per call, which needs no trust.
    """
    groups: list[tuple[list[int], Tensor]] = []
    period = x_PI.shape[0]
    for size in sorted(sizes, reverse=True):
        places = torch.arange(size, device=x_PI.device) % period
        y = product(x_PI[places])
        if not torch.equal(y, y[places]):
            continue
        for members, rows in groups:
            if torch.equal(rows[:size], y[:period]):
                members.append(size)
                break
        else:
            groups.append(([size], y[:period].clone()))
    return min((tuple(members[::-1]) for members, _ in groups), key=_cost, default=(1,))


def _cost(sizes: tuple[int, ...]) -> float:
    """Ranks a group: decode pays for its smallest size, prefill per row of its largest; decode counts double."""
    decode = 1 + sizes[0] / BALANCE_ROWS
    prefill = (1 + sizes[-1] / BALANCE_ROWS) / sizes[-1]
    return decode**2 * prefill


def pad_rows(x_RI: Tensor, size: int) -> Tensor:
    """Append zero rows (dimension -2) up to `size`."""
    missing = size - x_RI.shape[-2]
    return torch.nn.functional.pad(x_RI, (0, 0, 0, missing)) if missing else x_RI


def fastest(
    candidates: Mapping[str, Callable[[], object]], clock: Callable[[], float] = time.thread_time
) -> str:
    """The name of the candidate with the shortest best time; the first unless another is clearly faster.

    The candidates take turns, so that a slow moment of the machine meets them all, and by default the time is that
    of the calling thread, so that other work on the machine counts little: the same machine should choose the same.
    """
    best = dict.fromkeys(candidates, float("inf"))
    for _ in range(_ROUNDS):
        for name, run in candidates.items():
            begin_s = clock()
            run()
            best[name] = min(best[name], clock() - begin_s)
    first = next(iter(candidates))
    name = min(best, key=best.__getitem__)
    return name if best[name] < _WORTH * best[first] else first


def device_clock(device: str) -> Callable[[], float]:
    """Seconds by which a device has ended what it was given; on the CPU those of the calling thread."""
    if device != "cuda":
        return time.thread_time
    mark = torch.zeros(1, device=device)

    def clock() -> float:
        mark.item()  # comes to the host behind all that was issued before it
        return time.perf_counter()

    return clock


@contextmanager
def one_thread() -> Iterator[None]:
    """Timings of one thread rank kernels as those of all do, and need no second core to be free."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
