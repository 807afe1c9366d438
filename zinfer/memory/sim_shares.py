"""Several devices that are not there.  In: chunks, one pace per link.  Out: shares really copied, by way of each."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Any

from torch import Tensor

from zinfer.config.machine import Link
from zinfer.memory.links import LinkLog, Movement, Pace, sleep_until
from zinfer.memory.nvme import Reader
from zinfer.memory.shares import Gathering, Helper, lost_share, shares_of
from zinfer.memory.sim import POISON, SimMode, SimTransfer
from zinfer.memory.transfer import Trip
from zinfer.plan.shares import Share, Way


class SimShares(SimTransfer):
    """Every way up has a worker and a pace for each of its links, so that all of them work at once.

    A share of a further device is copied into a slot of that device, and from there into its place on the first one;
    a slot that has been sent on is poisoned.  A chunk lands when its last share is there.
    """

    def __init__(
        self,
        reader: Reader,
        staging: Sequence[Tensor],
        log: LinkLog,
        ways: Sequence[Way],
        helpers: Mapping[int, Helper],
        *,
        d2h: Link | None = None,
        mode: SimMode = "copy",
    ) -> None:
        super().__init__(reader, staging, log, ways[0].hops[0][1], d2h=d2h, mode=mode)
        self.ledgers = {f"device:{at}": helper.ledger for at, helper in helpers.items()}
        self._ways, self._helpers = ways, helpers
        self._lanes = {lane: _Lane(lane, link) for way in ways for lane, link in way.hops}
        self._slots: dict[int, SimpleQueue[Tensor]] = {at: SimpleQueue() for at in helpers}
        for at, helper in helpers.items():
            for slot_N in helper.slots:
                self._slots[at].put(slot_N)

    def close(self) -> None:
        """End the workers, those last who are handed work by others; then give the further devices' memory back."""
        super().close()
        for hop in range(2):
            for way in self._ways:
                for lane, _ in way.hops[hop : hop + 1]:
                    self._lanes[lane].worker.shutdown()
        for helper in self._helpers.values():
            helper.slab.close()

    def _copy(self, trip: Trip) -> None:
        self._worker.submit(self._spread, trip)  # behind the poison of the place

    def _spread(self, trip: Trip) -> None:
        chunk = trip.order.chunk
        shares = shares_of(chunk, self._ways)
        is_copied = self._is_copied(trip.order.target_N)
        gathering = Gathering(trip, len(shares), self._all_came)
        for at, (way, share) in enumerate(zip(self._ways, shares, strict=True)):
            if share.nbytes:
                due_s = self._lanes[way.hops[0][0]].pace.reserve(share.nbytes)
                pull = partial(self._pull, gathering, at, share, due_s, is_copied)
                self._lanes[way.hops[0][0]].worker.submit(pull)
            else:
                gathering.ended(at)

    def _pull(self, gathering: Gathering, at: int, share: Share, due_s: float, is_copied: bool) -> None:
        """Over the device's own link: to the place itself, or to a slot, from which another worker sends it on."""
        (lane, _), *onward = self._ways[at].hops
        trip = gathering.trip
        assert trip.source_N is not None, "a trip is copied from a place"
        source_N, target_N = (x_N[share.begin : share.end] for x_N in (trip.source_N, trip.order.target_N))
        if not onward:
            gathering.ended(at, error=self._hop(lane, trip, share, source_N, target_N, due_s, is_copied))
            return
        slot_N = self._slots[at].get()  # given back by the worker that sends
        error = self._hop(lane, trip, share, source_N, slot_N, due_s, is_copied)
        sender = self._lanes[onward[0][0]]
        sent_s = sender.pace.reserve(share.nbytes, max(due_s, time.perf_counter()))

        def send() -> None:
            failed = error or self._hop(sender.name, trip, share, slot_N, target_N, sent_s, is_copied)
            if self._mode == "copy":
                slot_N.fill_(POISON)
            self._slots[at].put(slot_N)
            gathering.ended(at, error=failed)

        sender.worker.submit(send)

    def _hop(
        self,
        lane: str,
        trip: Trip,
        share: Share,
        from_N: Tensor,
        into_N: Tensor,
        due_s: float,
        is_copied: bool,
    ) -> BaseException | None:
        """One copy at a link's pace; what went wrong is the answer, not raised: the slot must go on."""
        begin_s, chunk = time.perf_counter(), trip.order.chunk
        try:
            trip.ticket.refuse_if_cancelled()
            if is_copied:
                into_N[: share.nbytes].copy_(from_N[: share.nbytes])
            sleep_until(due_s)
            self._log.add(Movement(lane, chunk.id, share.nbytes, begin_s, time.perf_counter()))
        except BaseException as error:
            return lost_share(chunk, lane, share, error)
        return None

    def _all_came(self, trip: Trip, _marks: list[Any], error: BaseException | None) -> None:
        self._copied(trip)
        trip.ticket.land(error)


class _Lane:
    """One link: its pace, its worker."""

    def __init__(self, name: str, link: Link) -> None:
        self.name, self.pace = name, Pace(link)
        self.worker = ThreadPoolExecutor(1, f"zinfer-{name}")
