"""The one seam through which weights move.  In: a chunk and where it goes.  Out: a ticket that lands.

Three implementations: HostTransfer here (host memory is compute memory), SimTransfer, CudaTransfer.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from zinfer.chunks.table import Chunk
from zinfer.errors import InternalError
from zinfer.memory.clock import Clock, HostClock
from zinfer.memory.ledger import Ledger
from zinfer.memory.links import Ticket
from zinfer.memory.nvme import Reader


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be moved: `chunk` into `target_N`, a place in the compute tier.

    `home_N` is the chunk's lasting copy in host memory below a device, None if it has none; `is_home_filled` says
    whether its bytes are there already.  Writing must come `after` the last reader's fence.
    """

    chunk: Chunk
    target_N: Tensor
    home_N: Tensor | None = None
    is_home_filled: bool = False
    after: Any = None


class Transfer(Protocol):
    """Moves chunks into the compute tier.  `begin` never blocks; all but the landing happens in its own threads.

    The compute side calls `ready` before it reads what a ticket brought, and `fence` when it has issued its last
    read: the fence orders the next write into that place.
    """

    device: torch.device
    ledgers: Mapping[str, Ledger]  # of further devices whose memory it uses, by name
    clock: Clock

    def begin(self, order: Order) -> Ticket: ...

    def ready(self, ticket: Ticket) -> None: ...

    def fence(self) -> Any: ...

    def release(self, place_N: Tensor) -> None:
        """The bytes there are no longer wanted."""
        ...

    def to_device(self, x: Tensor) -> Tensor:
        """A copy of a host tensor beside the computation: rows of the cache, attention's results."""
        ...

    def to_host(self, x: Tensor) -> Tensor:
        """A copy in host memory of what was computed: rows for the cache, queries."""
        ...

    def park(self, x: Tensor) -> Tensor:
        """A copy in host memory of what waits there for `unpark`; nobody else may read it."""
        ...

    def unpark(self, x: Tensor) -> Tensor:
        """The way back, once."""
        ...

    def forget(self) -> None:
        """Nobody will come for what is parked."""
        ...

    def close(self) -> None:
        """End the threads.  Every ticket has landed before."""
        ...


class HostTransfer:
    """Host memory is compute memory: disk -> place, nothing is copied."""

    device = torch.device("cpu")
    ledgers: Mapping[str, Ledger] = MappingProxyType({})

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.clock: Clock = HostClock()

    def begin(self, order: Order) -> Ticket:
        """Read straight into the place."""
        ticket = Ticket(order.chunk)
        self._reader.begin(ticket, order.target_N.numpy(), ticket.land)
        return ticket

    def ready(self, ticket: Ticket) -> None:
        """Landed is ready."""

    def fence(self) -> None:
        """Computation on the host is over when it returns."""

    def release(self, place_N: Tensor) -> None:
        """Nothing to do."""

    def to_device(self, x: Tensor) -> Tensor:
        """It is there."""
        return x

    to_host = park = unpark = to_device

    def forget(self) -> None:
        """Nothing was parked elsewhere."""

    def close(self) -> None:
        """The reader is closed by its owner."""


@dataclass(slots=True)
class Trip:
    """One order on its way over two links; `source_N` is where the second begins."""

    order: Order
    ticket: Ticket
    source_N: Tensor | None
    is_staged: bool = False


class StagedTransfer(ABC):
    """Disk -> host -> device.  A chunk without a host home passes through a staging slot, taken in the order of
    issue; fetches beyond the free slots wait in a queue, not in the caller.

    `_copy` is the second hop: it must call `_copied` once the source may be overwritten, and land the ticket.
    """

    ledgers: Mapping[str, Ledger] = MappingProxyType({})

    def __init__(self, reader: Reader, staging: Sequence[Tensor], device: torch.device) -> None:
        self.device = device
        self._reader = reader
        self._free = list(staging)
        self._num_staging = len(self._free)
        self._waiting: deque[Trip] = deque()
        self._lock = threading.Lock()

    def begin(self, order: Order) -> Ticket:
        """Copy from the host home, after filling it from disk where it is not; or come by way of staging."""
        trip = Trip(order, Ticket(order.chunk), order.home_N)
        if trip.source_N is None and not self._num_staging:
            trip.ticket.land(
                InternalError("ZI-5404", f"chunk {order.chunk.id} has no host home and no staging slot")
            )
        elif trip.source_N is None:
            with self._lock:
                self._waiting.append(trip)
            self._stage()
        elif order.is_home_filled:
            self._copy(trip)
        else:
            self._read(trip)
        return trip.ticket

    @abstractmethod
    def _copy(self, trip: Trip) -> None: ...

    def _copied(self, trip: Trip) -> None:
        """The source has been read for the last time."""
        if trip.is_staged and trip.source_N is not None:
            with self._lock:
                self._free.append(trip.source_N)
            self._stage()

    def _stage(self) -> None:
        """Start reading as many waiting trips as there are staging slots."""
        while True:
            with self._lock:
                if not (self._waiting and self._free):
                    return
                trip = self._waiting.popleft()
                trip.source_N, trip.is_staged = self._free.pop(), True
            self._read(trip)

    def _read(self, trip: Trip) -> None:
        def arrived(error: BaseException | None) -> None:
            if error is None:
                self._copy(trip)
            else:
                self._copied(trip)
                trip.ticket.land(error)

        assert trip.source_N is not None, "a trip is read into a place"
        self._reader.begin(trip.ticket, trip.source_N.numpy(), arrived)
