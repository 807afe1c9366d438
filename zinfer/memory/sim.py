"""A device that is not there.  In: chunks, a machine's rates.  Out: real copies into an arena, as slow as its links."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from zinfer.config.machine import Link
from zinfer.memory.clock import Clock, HostClock
from zinfer.memory.links import LinkLog, Movement, Pace, Ticket, sleep_until
from zinfer.memory.nvme import Reader
from zinfer.memory.transfer import StagedTransfer, Trip

SimMode: TypeAlias = Literal["copy", "alias"]
POISON = 0xFF  # every byte of a released place: in any float format a NaN


class SimTransfer(StagedTransfer):
    """One worker copies host -> device arena, paced by the link's clock, one chunk at a time.

    The clock runs from the moment of issue, so a late worker catches up and the link's mean rate is the machine's.
    `mode` "copy" is for correctness; "alias" copies only what enters a place for the first time and then merely
    paces, for timing on machines whose memory the copies would load: its results mean nothing.  Released places are
    filled with POISON, behind all copies issued before.
    """

    def __init__(
        self,
        reader: Reader,
        staging: Sequence[Tensor],
        log: LinkLog,
        link: Link,
        *,
        d2h: Link | None = None,
        mode: SimMode = "copy",
    ) -> None:
        super().__init__(reader, staging, torch.device("cpu"))
        self.clock: Clock = HostClock()
        self._log = log
        self._pace = Pace(link)  # of whatever goes up: weights and the cache share the link
        self._pace_down = Pace(d2h or link)
        self._mode = mode
        self._used: set[int] = set()  # addresses of places that hold a chunk's bytes already
        self._worker = ThreadPoolExecutor(1, "zinfer-h2d")

    def ready(self, ticket: Ticket) -> None:
        """Landed is ready."""

    def fence(self) -> None:
        """Computation on this device is over when it returns."""

    def release(self, place_N: Tensor) -> None:
        """Poison the place: a stale view shows."""
        if self._mode == "copy":
            self._worker.submit(place_N.fill_, POISON)

    def to_device(self, x: Tensor) -> Tensor:
        """A copy, when the link would have brought it."""
        return self._cross(x, "h2d", self._pace)

    def to_host(self, x: Tensor) -> Tensor:
        """A copy, when the link would have brought it."""
        return self._cross(x, "d2h", self._pace_down)

    park, unpark = to_host, to_device

    def forget(self) -> None:
        """Copies are the caller's."""

    def close(self) -> None:
        """End the worker after what it was asked for."""
        self._worker.shutdown()

    def _copy(self, trip: Trip) -> None:
        self._worker.submit(self._move, trip, self._pace.reserve(trip.order.chunk.nbytes))

    def _move(self, trip: Trip, due_s: float) -> None:
        error: BaseException | None = None
        chunk = trip.order.chunk
        try:
            trip.ticket.refuse_if_cancelled()
            begin_s = time.perf_counter()
            if trip.source_N is not None and self._is_copied(trip.order.target_N):
                trip.order.target_N[: chunk.nbytes].copy_(trip.source_N[: chunk.nbytes])
            sleep_until(due_s)
            self._log.add(Movement("h2d", chunk.id, chunk.nbytes, begin_s, time.perf_counter()))
        except BaseException as failure:
            error = failure
        self._copied(trip)
        trip.ticket.land(error)

    def _cross(self, x: Tensor, link: str, pace: Pace) -> Tensor:
        begin_s, due_s = time.perf_counter(), pace.reserve(x.nbytes)
        copy = x.clone() if self._mode == "copy" else x
        sleep_until(due_s)
        self._log.add(Movement(link, None, x.nbytes, begin_s, time.perf_counter()))
        return copy

    def _is_copied(self, target_N: Tensor) -> bool:
        is_new = target_N.data_ptr() not in self._used
        self._used.add(target_N.data_ptr())
        return is_new or self._mode == "copy"
