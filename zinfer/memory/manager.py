"""Move chunks as the schedule says.  In: prefetch, lease, evict.  Out: weight views that are there and stay there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import NoReturn

from torch import Tensor

from zinfer.chunks.table import Chunk, ChunkId, ChunkTable
from zinfer.errors import InternalError
from zinfer.log import logger
from zinfer.memory.holdings import Memory, MemoryStats
from zinfer.memory.lease import Lease, Views, WeightKey
from zinfer.memory.ledger import Ledger
from zinfer.memory.links import Ticket
from zinfer.memory.residency import Event, Residency, State
from zinfer.memory.row_source import RowSource
from zinfer.memory.tier import Place, TierMemory, split_of
from zinfer.memory.transfer import HostTransfer, Order
from zinfer.memory.upload import upload
from zinfer.memory.victims import Choose, Victims
from zinfer.plan.evict import Policy
from zinfer.plan.records import Placement, Tier

_MOMENT = "moment"  # the name under which advance() reserves

Reserved = Mapping[Tier, Mapping[str, int]]
Weights = Mapping[WeightKey, Tensor]


class ChunkManager:
    """Keeps the states of all chunks; alone starts transfers and gives bytes away.

    Used from one thread at a time: workers only land tickets, and what they landed is booked at the next call.
    After any error the books balance, the chunk is absent, and close() works.  `moments` are the bytes of the
    compute tier that each moment of a pass needs beside weights, for advance().
    """

    def __init__(
        self,
        table: ChunkTable,
        placement: Placement,
        memory: Memory,
        *,
        policy: Policy | None = None,
        moments: Sequence[int] = (),
    ) -> None:
        self.table = table
        self.placement = placement
        self.device = memory.transfer.device  # of views and rows
        self.transfer, self.log = memory.transfer, memory.log  # the log: bytes per link, and what moved when
        self._memory = memory
        self._victims = Victims(policy)
        self._moments = moments
        self._residency = Residency()
        self._tickets: dict[tuple[ChunkId, Tier], Ticket] = {}  # of all chunks that are not absent
        self._arriving: dict[ChunkId, Tier] = {}
        self._failed: dict[ChunkId, BaseException] = {}  # booked, but not yet told to anyone
        self._pushed_out: list[ChunkId] = []  # chunks that stay, but had to go for a moment
        self._views = Views()
        self.surprises, self._num_fetches, self._wait_s, self._is_closed = 0, 0, 0.0, False
        self._to_host = HostTransfer(memory.reader)
        self._rows = RowSource(table, memory.rows, self._gather, memory.transfer)

    def prefetch(self, chunk: ChunkId, *, as_guest: bool = False) -> Ticket:
        """Begin to bring a chunk to where it computes (a row table: into host memory); never blocks.

        A guest comes into a slot, as does what is packed at home.  A chunk that is there or on its way answers with its
        ticket.  Raises InternalError ZI-5401 when no place is free and the policy names no victim.
        """
        self._settle()
        tier = self._goal(chunk)
        self._victims.forget(chunk)
        self._failed.pop(chunk, None)
        as_guest = as_guest or chunk in self.placement.packed
        if self._residency.state(chunk, tier) is State.ABSENT:
            if not self._make_room(chunk, tier, self._victims.choose, as_guest=as_guest):
                self._no_room(chunk, tier)
            self._begin(chunk, tier, as_guest=as_guest)
        return self._tickets[chunk, tier]

    def lease(self, chunk: ChunkId) -> Lease:
        """Wait for one chunk and protect it: a context manager that gives its weights.

        A chunk that nobody has fetched is a surprise: counted, fetched, and right all the same.  Raises what its
        transfer raised (MachineError, IntegrityError).
        """
        tier = self.placement.compute_tier
        self._settle()
        if chunk in self._failed:
            raise self._failed.pop(chunk)
        if self._residency.state(chunk, tier) is State.ABSENT:
            self._fetch_late(chunk, tier)
        ticket = self._tickets[chunk, tier]
        if chunk in self._arriving:
            begin_s = time.perf_counter()
            try:
                ticket.wait()
            finally:
                self._wait_s += time.perf_counter() - begin_s
                self._settle()
                self._failed.pop(chunk, None)
        self._memory.transfer.ready(ticket)
        self._residency.move(chunk, tier, Event.LEASE)
        self._victims.used(chunk)
        memory = self._memory.tiers[tier]
        views = self._views.of(self._form(chunk, memory), memory)
        return Lease(chunk, memory.places[chunk], views, self._end_lease, memory.places.get)

    def evict(self, chunk: ChunkId) -> None:
        """Drop a chunk from the compute tier.  One still on its way is cancelled; one that is absent is no matter.

        Raises InternalError ZI-0121 for a leased chunk.
        """
        tier = self.placement.compute_tier
        if self._arriving.get(chunk) is tier:
            self._tickets[chunk, tier].cancel()
            self._tickets[chunk, tier].join()
        self._settle()
        self._failed.pop(chunk, None)
        if self._residency.state(chunk, tier) is not State.ABSENT:
            self._drop(chunk, tier)

    def settle(self, chunk: ChunkId, pack: Callable[[Weights, Weights], None]) -> None:
        """Bring a guest home, its weights packed: `pack` fills views of the second form from those of the first.

        One that is home, or absent, is no matter.  Raises what `pack` raises, and the chunk is absent; InternalError
        ZI-0121 for a leased one.
        """
        tier = self.placement.compute_tier
        memory = self._memory.tiers[tier]
        self._settle()
        if self._residency.state(chunk, tier) is State.ABSENT or memory.is_home(chunk):
            return
        self._residency.move(chunk, tier, Event.SETTLE)
        published = self._views.of(self.table.chunks[chunk], memory)
        memory.move_home(chunk)
        try:
            pack(published, self._views.of(self._form(chunk, memory), memory))
        except BaseException as error:
            self._book(chunk, tier, error)
            del self._tickets[chunk, tier]
            raise
        self._book(chunk, tier, None)

    def drop_streamed(self) -> None:
        """After an error: every chunk that is not at home in the compute tier goes, also those on their way.

        A lease that an interruption left behind ends here.
        """
        tier = self.placement.compute_tier
        memory = self._memory.tiers[tier]
        streamed = [chunk for chunk in memory.places if not memory.is_home(chunk)]
        for chunk in streamed:
            self._tickets[chunk, tier].cancel()
        for chunk in streamed:
            while self._residency.state(chunk, tier) is State.LEASED:
                self._end_lease(chunk, memory.places[chunk])
            self.evict(chunk)
        self._failed.clear()
        self.transfer.forget()

    def advance(self, moment: int) -> None:
        """Before a moment begins: make room for what it needs beside weights (PatrickStar 1.1), and reserve it.

        Evicts the policy's victims, waiting for chunks on their way where nothing else is left.  Raises BudgetError
        ZI-2401 when even that does not suffice.
        """
        tier = self.placement.compute_tier
        memory = self._memory.tiers[tier]
        need = self._moments[moment] if moment < len(self._moments) else 0
        extra = need - memory.ledger.reserved.get(_MOMENT, 0)
        self._settle()
        while memory.ledger.free_bytes < extra:
            victim = self._victims.choose(list(self._residency.chunks(tier, State.RESIDENT)))
            if victim is not None:
                comes_back = memory.is_home(ChunkId(victim)) and victim not in self.placement.packed
                self._pushed_out += [ChunkId(victim)] if comes_back else []
                self._drop(ChunkId(victim), tier)
            elif not self._await_one(tier):
                break
        memory.ledger.reserve(_MOMENT, need)
        if extra > 0 and memory.ledger.free_bytes < memory.empty_bytes:
            memory.discard_empty()
        elif self._pushed_out and not extra:
            self._bring_back(tier)

    def expect(self, order: Sequence[int], moments: Sequence[int]) -> None:
        """From the next pass on: the order in which chunks are used, and what each moment needs beside weights."""
        self._moments = moments
        if any(moments):  # else nobody ever has to go
            self._victims.expect(order)

    def rows(self, name: str, ids_T: Tensor) -> Tensor:
        """Rows of an embedding table by id (int [T], any order, repeated at will): [T, *row shape] on the device.

        From chunks that stay in memory where they have arrived (the table's own, or a tied head's), else from disk;
        the bytes are the same.  Raises as RowReader.read.
        """
        self._settle()
        return self._rows.read(name, ids_T)

    def adopt(self, placement: Placement, budget: Mapping[Tier, int], reserved: Reserved) -> None:
        """Between passes: other homes, budgets, reservations.  Who has a home as before stays; nothing is read.

        Streamed chunks go, so the next pass begins as the first did.  Raises BudgetError ZI-2401 when it does not
        fit; everything is then as before.
        """
        self.drop_streamed()
        while any(map(self._await_one, self._memory.tiers)):
            pass
        tiers = self._memory.tiers
        splits = {
            tier: split_of(self.table, placement, tier, budget[tier], reserved.get(tier, {}))
            for tier in tiers
        }
        for tier, split in splits.items():
            tiers[tier].refuse_less_than(split)
        for tier, split in splits.items():
            for chunk in [chunk for chunk in tiers[tier].places if not tiers[tier].keeps(chunk, split)]:
                self._drop(chunk, tier)
            tiers[tier].rehome(split)
        self.placement = placement

    def ledger(self, tier: Tier | None = None) -> Ledger:
        """The account of a tier (None: of the one that computes)."""
        return self._memory.tiers[tier or self.placement.compute_tier].ledger

    def stats(self) -> MemoryStats:
        """Totals so far."""
        return self._memory.stats(self._num_fetches, self._wait_s, self.surprises)

    def check(self) -> None:
        """Ledgers balance, no live places overlap, states and places agree.  Raises InternalError otherwise."""
        self._settle()
        self._memory.check(self._residency)

    def close(self) -> None:
        """Await or cancel what is on its way, end the threads, close the files, give every byte back.

        May be called again, and after any error; views must not be used afterwards.
        """
        if self._is_closed:
            return
        self._is_closed = True
        with ExitStack() as closing:
            for memory in self._memory.tiers.values():
                closing.callback(memory.close)
            closing.callback(self._views.clear)
            closing.callback(self._memory.files.close)
            closing.callback(self._memory.rows.close)
            closing.callback(self._memory.reader.close)
            closing.callback(self._memory.transfer.close)
            for chunk, tier in self._arriving.items():
                self._tickets[chunk, tier].cancel()
            for chunk, tier in self._arriving.items():
                self._tickets[chunk, tier].join()
            self._arriving.clear()
            self._tickets.clear()
            self._residency = Residency()

    def _form(self, chunk: ChunkId, memory: TierMemory) -> Chunk:
        """As it lies in its place: as published in a slot, in its home perhaps packed."""
        return (
            self.placement.at_home(self.table, chunk) if memory.is_home(chunk) else self.table.chunks[chunk]
        )

    def _goal(self, chunk: ChunkId) -> Tier:
        """Where a prefetch takes the chunk."""
        home = self.placement.home[chunk]
        if not self.table.chunks[chunk].ops and home is not self.placement.compute_tier:
            if home is Tier.DISK:
                raise InternalError(
                    "ZI-5402", f"chunk {chunk} is a row table that is read by rows: it is not fetched"
                )
            return home
        return self.placement.compute_tier

    def _begin(self, chunk: ChunkId, tier: Tier, *, as_guest: bool = False) -> None:
        memory, host = self._memory.tiers[tier], self._memory.tiers[Tier.HOST]
        home_N, is_filled = None, False
        if host is not memory and host.has_home(chunk):
            is_filled = self._residency.state(chunk, Tier.HOST) is State.RESIDENT
            if not is_filled:
                host.take(chunk)
            # The copy reads the home: leased, or not yet readable by anyone else, until the ticket is booked.
            self._residency.move(chunk, Tier.HOST, Event.LEASE if is_filled else Event.FETCH)
            home_N = host.bytes_of(chunk)
        place = memory.take(chunk, as_guest=as_guest)
        self._pushed_out = [other for other in self._pushed_out if other != chunk]
        self._residency.move(chunk, tier, Event.FETCH)
        after = memory.fences.pop(place.offset, None)
        order = Order(self.table.chunks[chunk], memory.bytes_of(chunk), home_N, is_filled, after)
        mover = self._memory.transfer if tier is self.placement.compute_tier else self._to_host
        self._arriving[chunk] = tier
        self._tickets[chunk, tier] = mover.begin(order)
        self._num_fetches += 1

    def _settle(self) -> None:
        """Book every ticket that has landed."""
        landed = [chunk for chunk, tier in self._arriving.items() if self._tickets[chunk, tier].done]
        for chunk in landed:
            tier = self._arriving.pop(chunk)
            error = self._tickets[chunk, tier].error
            self._book(chunk, tier, error)
            if tier is not Tier.HOST and self._memory.tiers[Tier.HOST].has_home(chunk):
                self._book(chunk, Tier.HOST, error)
            if error is not None:
                del self._tickets[chunk, tier]
                self._victims.forget(chunk)
                self._failed[chunk] = error

    def _book(self, chunk: ChunkId, tier: Tier, error: BaseException | None) -> None:
        if self._residency.state(chunk, tier) is State.LEASED:
            self._residency.move(chunk, tier, Event.RELEASE)
        elif error is None:
            self._residency.move(chunk, tier, Event.ARRIVED)
        else:
            self._residency.move(chunk, tier, Event.FAILED)
            self._memory.tiers[tier].give_back(chunk)

    def _bring_back(self, tier: Tier) -> None:
        """Fetch what a moment has pushed out, as far as there is room without pushing out more."""
        memory = self._memory.tiers[tier]
        while self._pushed_out and memory.has_room(self._pushed_out[0]):
            self._begin(self._pushed_out[0], tier)

    def _drop(self, chunk: ChunkId, tier: Tier) -> None:
        memory = self._memory.tiers[tier]
        self._residency.move(chunk, tier, Event.EVICT)
        self._memory.transfer.release(memory.bytes_of(chunk))
        memory.give_back(chunk)
        self._tickets.pop((chunk, tier), None)  # a home below the device came with the device's ticket
        self._victims.forget(chunk)

    def _make_room(self, chunk: ChunkId, tier: Tier, choose: Choose, *, as_guest: bool = False) -> bool:
        """Evict until the chunk has a place; False when `choose` names nobody before that."""
        memory = self._memory.tiers[tier]
        while not memory.has_room(chunk, as_guest=as_guest):
            there = list(self._residency.chunks(tier, State.RESIDENT))
            if memory.needs_slot(chunk, as_guest=as_guest):
                there = [other for other in there if not memory.is_home(other)]
            victim = choose(there)
            if victim is None:
                return False
            self._drop(ChunkId(victim), tier)
        return True

    def _fetch_late(self, chunk: ChunkId, tier: Tier) -> None:
        """Bring a chunk that the schedule has not: any unleased one may go for it, and this call may wait."""
        self.surprises += 1
        logger.debug("chunk %d is needed and was not fetched: the order differs from the schedule", chunk)
        as_guest = chunk in self.placement.packed
        while not self._make_room(chunk, tier, self._victims.choose_any, as_guest=as_guest):
            if not self._await_one(tier):
                self._no_room(chunk, tier)
        self._begin(chunk, tier, as_guest=as_guest)
        if as_guest or not self._memory.tiers[tier].has_home(chunk):
            self._victims.strayed(chunk)

    def _await_one(self, tier: Tier) -> bool:
        """Wait until a chunk that is on its way to the tier has landed; False when there is none."""
        for chunk, where in self._arriving.items():
            if where is tier:
                self._tickets[chunk, tier].join()
                self._settle()
                return True
        return False

    def _no_room(self, chunk: ChunkId, tier: Tier) -> NoReturn:
        ledger = self._memory.tiers[tier].ledger
        raise InternalError(
            "ZI-5401",
            f"no place for chunk {chunk} in {tier} memory: {ledger.free_bytes} of {ledger.capacity_bytes} bytes free, "
            f"{self.placement.slots} slots, held by {ledger.held}",
        )

    def _gather(self, chunk: ChunkId, key: WeightKey, ids_N: Tensor) -> Tensor | None:
        """Rows of a weight of a chunk that stays in memory; None where it does not, or has not come yet."""
        tier = self.placement.home[chunk]
        if tier is Tier.DISK or self._residency.state(chunk, tier) in (State.ABSENT, State.ARRIVING):
            return None
        memory = self._memory.tiers[tier]
        view = self._views.of(self._form(chunk, memory), memory)[key]
        if tier is not self.placement.compute_tier:
            return view.index_select(0, ids_N)
        self._memory.transfer.ready(self._tickets[chunk, tier])
        rows = view.index_select(0, upload(ids_N, self.device))
        memory.fences[memory.places[chunk].offset] = self._memory.transfer.fence()
        return rows

    def _end_lease(self, chunk: ChunkId, place: Place) -> None:
        tier = self.placement.compute_tier
        memory = self._memory.tiers[tier]
        if memory.places.get(chunk) == place:  # else it was dropped, or all was closed, under the lease
            memory.fences[place.offset] = self._memory.transfer.fence()
            self._residency.move(chunk, tier, Event.RELEASE)
