"""Time products with cold weights.  In: what layers multiply with.  Out: seconds per GB of weights, by rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import cycle, islice
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor

from zinfer.config.machine import ProductRate
from zinfer.memory.measure_links import lasting_seconds

ROWS = (1, 64, 512, 8, 2, 4)  # what a plan needs most first
DEVICE_ROWS = (1, 64, 512, 4096, 8, 2, 4)  # a device's passes are fuller
_DEVICE_ROUNDS = 8  # between two waits for a device: a wait takes as long as a product
_MAX_POOL = 1024  # matrices
_PAST_A_LINE = 8  # bytes: what a header of safetensors is a multiple of
_SWEEPS = 2
_DISTURBED = 1.5  # times as long as the other sweep: less is what passes meet as well
_RECORDED_ROWS = 64  # decode passes of so many are recorded when they come again: products cost no call then


class Product(Protocol):
    """A product as layers call it: x [T, I] times weight [O, I] gives [T, O]."""

    def __call__(self, x_TI: Tensor, weight: Any, *, exact: bool) -> Tensor: ...


class Weight(Protocol):
    """What is multiplied with: a tensor, or a weight of another format that the product knows."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def nbytes(self) -> int: ...
    def new_ones(self, *shape: int) -> Tensor: ...


class Record(Protocol):
    """SmallPasses.recorded, of zinfer.memory.measure."""

    def __call__(self, run: Callable[[], None], *, exact: bool) -> Callable[[], None] | None: ...


Shape = tuple[int, int]  # [out, in] of a matrix
SHAPES: tuple[Shape, ...] = ((8192, 2048), (4096, 4096), (2048, 8192))  # of layers, where no model is named
MakeWeight = Callable[[Shape, torch.device], Weight]  # made-up numbers in one format


class Clock:
    """Time for a measurement.  What is not `allowed` because none is left is noted, for the profile."""

    def __init__(self, seconds: float, skipped: list[str] | None = None) -> None:
        self.end_s = time.perf_counter() + seconds
        self.skipped: list[str] = [] if skipped is None else skipped

    @property
    def left_s(self) -> float:
        """Seconds left, never negative."""
        return max(self.end_s - time.perf_counter(), 0.0)

    def allows(self, what: str, need_s: float = 0.0) -> bool:
        """Whether there is time for it."""
        if self.left_s > need_s:
            return True
        self.skipped.append(what)
        return False


def dense(dtype: torch.dtype) -> MakeWeight:
    """Ordinary numbers, for denormal ones are slow; a short piece is repeated.

    On a host they begin where a published file's do: anywhere, and so across the lines of its cache.  To a device
    they are brought aligned.
    """
    noise = torch.randn(65_537, generator=torch.Generator().manual_seed(0)).to(dtype)

    def make(shape: Shape, device: torch.device) -> Tensor:
        past = _PAST_A_LINE // dtype.itemsize if device.type == "cpu" else 0
        size = shape[0] * shape[1] + past
        return noise.repeat(-(-size // noise.numel())).to(device)[past:size].view(shape)

    return make


def pool_of(make: MakeWeight, device: torch.device, shapes: Sequence[Shape], nbytes: int) -> list[Weight]:
    """Weights of the shapes in turn, `nbytes` in all or more."""
    pool: list[Weight] = []
    made = 0
    for shape in islice(cycle(shapes), _MAX_POOL):
        # Whole turns of all shapes: each round of the timing has then the same bytes.
        if made >= nbytes and pool and len(pool) % len(shapes) == 0:
            break
        pool.append(make(shape, device))
        made += pool[-1].nbytes
    return pool


def one_round(product: Product, weights: Iterable[Weight], rows: int, exact: bool) -> None:
    """One product with each weight; blocks until they are done."""
    outputs = [product(weight.new_ones(rows, weight.shape[1]), weight, exact=exact) for weight in weights]
    outputs[-1][0, 0].item()  # waits for a device


class Turns:
    """Products with the weights of a pool in turn, and how long they take."""

    def __init__(
        self, product: Product, pool: Sequence[Weight], num_shapes: int, record: Record, exact: bool
    ) -> None:
        self._product, self._pool, self._record, self._exact = product, pool, record, exact
        self._num_shapes, self._next = num_shapes, cycle(pool)
        self._is_device = pool[0].new_ones(1, 1).device.type != "cpu"

    @property
    def rows(self) -> tuple[int, ...]:
        """That a plan needs, the most telling first."""
        return DEVICE_ROWS if self._is_device else ROWS

    @property
    def round_bytes(self) -> int:
        """Of one weight of each shape."""
        return sum(weight.nbytes for weight in self._pool[: self._num_shapes])

    def seconds_per_gb(self, rows: int, seconds: float) -> float:
        """Seconds per 10**9 bytes of weights: as decode passes have their products, where such passes are recorded.

        Slow rounds count: what other guests take away comes again in every pass.
        """
        rounds = max(min(_DEVICE_ROUNDS, max(DEVICE_ROWS) // rows), 1) if self._is_device else 1
        if self._is_device:  # a library chooses its kernel, and loads it, when it first meets a shape
            self._rounds(rows, 1)
        run = self._recorded(rows) if rows <= _RECORDED_ROWS else None
        run_s = lasting_seconds(run or partial(self._rounds, rows, rounds), seconds)
        nbytes = sum(weight.nbytes for weight in self._pool) if run else rounds * self.round_bytes
        return run_s / nbytes * 1e9

    def _rounds(self, rows: int, count: int) -> None:
        one_round(self._product, islice(self._next, count * self._num_shapes), rows, self._exact)

    def _recorded(self, rows: int) -> Callable[[], None] | None:
        # What is recorded reads them where they lie, as it does the weights.
        inputs = {weight.shape[1]: weight.new_ones(rows, weight.shape[1]) for weight in self._pool}

        def all_products() -> None:
            for weight in self._pool:
                self._product(inputs[weight.shape[1]], weight, exact=self._exact)

        replay = self._record(all_products, exact=self._exact)
        return None if replay is None else partial(_carry_out, replay, inputs)


def _carry_out(replay: Callable[[], None], _read: object) -> None:
    """Whoever may call this keeps what is read alive."""
    replay()


def product_rates(turns: Turns, clock: Clock, name: str) -> tuple[ProductRate, ...]:
    """At all rows that a plan needs; points for which there is no time are left out.

    Twice, one row count after the other: what somebody else takes for a second is in one of the two.
    """
    seen: dict[int, list[float]] = {}
    share_s, longest = clock.left_s / (_SWEEPS * len(turns.rows)), (1, 0.0)  # rows and seconds
    for rows in turns.rows:
        need_s = longest[1] * rows / longest[0] if rows > longest[0] else 0.0
        if len(seen) < 2 or clock.allows(f"{name}, {rows} rows", need_s):
            seen[rows] = [turns.seconds_per_gb(rows, share_s)]
            longest = max(longest, (rows, seen[rows][0] * turns.round_bytes / 1e9))
    for rows, found in seen.items():
        if clock.left_s > found[0] * turns.round_bytes / 1e9:
            found.append(turns.seconds_per_gb(rows, share_s))
    return tuple(ProductRate(rows=rows, seconds_per_gb=undisturbed(seen[rows])) for rows in sorted(seen))


def undisturbed(found: Sequence[float]) -> float:
    """The mean of a rate's sweeps, or the lowest where they are so far apart that somebody else had a part in one."""
    return fmean(found) if max(found) <= _DISTURBED * min(found) else min(found)
