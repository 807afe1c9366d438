"""Several CUDA devices in one process.  In: chunks in page-locked host memory.  Out: shares by every link, events."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from zinfer.memory.cuda import CudaTransfer
from zinfer.memory.links import LinkLog, Movement, Ticket
from zinfer.memory.nvme import Reader
from zinfer.memory.shares import Gathering, Helper, lost_share, shares_of
from zinfer.memory.transfer import StagedTransfer, Trip
from zinfer.plan.shares import Share, Way


@dataclass(slots=True)
class _Slot:
    """A place for a share on a further device; `sent` is the mark behind its last reader."""

    bytes_N: Tensor
    sent: Any = None


class CudaShares(StagedTransfer):
    """One copy stream per link, and for each further device one more on either side of its peer copy.

    A peer copy runs on the sending device's stream and is ordered by torch with the receiving device's current one:
    both are streams of this way alone, so that no way waits for another.  A slot is written again only behind the
    peer copy that read it; a place only behind its last reader.  Computation waits on the device for the marks of all
    shares.  A ticket lands when every copy is queued.  What the computing device does besides is `CudaTransfer`'s.
    """

    def __init__(
        self,
        reader: Reader,
        staging: Sequence[Tensor],
        log: LinkLog,
        ways: Sequence[Way],
        helpers: Mapping[int, Helper],
        device: torch.device | None = None,
        parking_bytes: int = 0,
    ) -> None:
        super().__init__(reader, staging, device or torch.device("cuda", 0))
        self.ledgers = {f"device:{at}": helper.ledger for at, helper in helpers.items()}
        self._log, self._ways, self._helpers = log, ways, helpers
        self._near = CudaTransfer(reader, [], log, self.device, parking_bytes=parking_bytes)
        self.clock, self.crossing, self.enter = self._near.clock, self._near.crossing, self._near.enter
        self._routes = [_Route(way, self.device, helpers[at] if at else None) for at, way in enumerate(ways)]
        self._issuer = ThreadPoolExecutor(1, "zinfer-shares")
        self._retirer = ThreadPoolExecutor(1, "zinfer-shares-done")
        self._failure: BaseException | None = None  # of a copy whose ticket had landed; set once, read by all

    def ready(self, ticket: Ticket) -> None:
        """Order the computation that is issued next behind every share.  Raises what a copy died of."""
        if self._failure is not None:
            raise self._failure
        for mark in ticket.arrival:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def fence(self) -> Any:
        """A mark behind all computation issued so far."""
        return self._near.fence()

    def release(self, place_N: Tensor) -> None:
        """The next copies into the place wait for its fence; nothing else to do."""

    def to_device(self, x: Tensor) -> Tensor:
        """Over the computing device's own link."""
        return self._near.to_device(x)

    def to_host(self, x: Tensor) -> Tensor:
        """Over the computing device's own link."""
        return self._near.to_host(x)

    def park(self, x: Tensor) -> Tensor:
        """Over the computing device's own link."""
        return self._near.park(x)

    def unpark(self, x: Tensor) -> Tensor:
        """Over the computing device's own link."""
        return self._near.unpark(x)

    def forget(self) -> None:
        """Nobody will come for what is parked."""
        self._near.forget()

    def close(self) -> None:
        """End the workers; the last copy has then ended, and the further devices' memory goes back."""
        self._issuer.shutdown()
        self._retirer.shutdown()
        self._near.close()
        for helper in self._helpers.values():
            helper.slab.close()

    def _copy(self, trip: Trip) -> None:
        self._issuer.submit(self._issue, trip)

    def _issue(self, trip: Trip) -> None:
        shares = shares_of(trip.order.chunk, self._ways)
        gathering = Gathering(trip, len(shares), self._issued)
        for at, (route, share) in enumerate(zip(self._routes, shares, strict=True)):
            try:
                trip.ticket.refuse_if_cancelled()
                gathering.ended(at, route.issue(trip, share) if share.nbytes else None)
            except BaseException as error:
                gathering.ended(at, None, lost_share(trip.order.chunk, route.lane, share, error))

    def _issued(self, trip: Trip, moves: list[Any], error: BaseException | None) -> None:
        """All copies are queued, or some could not be: what was queued still reads the source until it has ended."""
        queued = [move for move in moves if move is not None]
        trip.ticket.arrival = tuple(move.arrived for move in queued)
        self._retirer.submit(partial(self._retire, trip, queued, error))
        if error is None:
            trip.ticket.land()

    def _retire(self, trip: Trip, moves: Sequence[_Move], error: BaseException | None) -> None:
        for move in moves:
            try:
                move.arrived.synchronize()
                now_s = time.perf_counter()
                for lane, begin, end in move.hops:
                    seconds = begin.elapsed_time(end) / 1e3
                    self._log.add(
                        Movement(lane, trip.order.chunk.id, move.share.nbytes, now_s - seconds, now_s)
                    )
            except BaseException as failure:
                lost = lost_share(trip.order.chunk, move.hops[0][0], move.share, failure)
                self._failure = self._failure or lost
        self._copied(trip)
        if error is not None:  # only now: nothing writes into the place any more
            trip.ticket.land(error)


@dataclass(frozen=True, slots=True)
class _Move:
    """The queued copies of one share: per link its begin and end, and the mark of its arrival."""

    share: Share
    hops: Sequence[tuple[str, Any, Any]]
    arrived: Any


class _Route:
    """One way up.  Used from the issuing thread alone."""

    def __init__(self, way: Way, near: torch.device, helper: Helper | None) -> None:
        self.lane = way.hops[0][0]
        self._peer_lane = way.hops[-1][0]
        slots = [_Slot(bytes_N) for bytes_N in helper.slots] if helper else []
        self._slots = cycle(slots) if slots else None
        far = slots[0].bytes_N.device if slots else near
        self._pull, self._send, self._gather = (_stream(device) for device in (far, far, near))

    def issue(self, trip: Trip, share: Share) -> _Move:
        """Queue the copies of a share; blocks only where the source is pageable memory."""
        assert trip.source_N is not None, "a trip is copied from a place"
        source_N, target_N = (x_N[share.begin : share.end] for x_N in (trip.source_N, trip.order.target_N))
        if self._slots is None:
            begin, end = _timed_copy(self._pull, target_N, source_N, trip.order.after)
            return _Move(share, [(self.lane, begin, end)], end)
        slot = next(self._slots)
        slot_N = slot.bytes_N[: share.nbytes]
        begin, pulled = _timed_copy(self._pull, slot_N, source_N, slot.sent)
        if trip.order.after is not None:
            for stream in (self._send, self._gather):  # within one device torch would order neither
                stream.wait_event(trip.order.after)
        with torch.cuda.stream(self._gather):
            sent_begin, slot.sent = _timed_copy(self._send, target_N, slot_N, pulled)
            self._gather.wait_event(slot.sent)
            arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            arrived.record(self._gather)
        return _Move(share, [(self.lane, begin, pulled), (self._peer_lane, sent_begin, slot.sent)], arrived)


def _stream(device: torch.device) -> Any:
    """A stream of our own, behind whatever is pending on the device: the slab may be recycled memory."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream


def _timed_copy(stream: Any, target_N: Tensor, source_N: Tensor, after: Any) -> tuple[Any, Any]:
    """Queue one copy on the stream, behind `after`; the events around it."""
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        if after is not None:
            stream.wait_event(after)
        begin.record(stream)
        target_N.copy_(source_N, non_blocking=True)
        end.record(stream)
    return begin, end
