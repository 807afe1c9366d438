"""One tier's memory.  In: a slab, an account, who lives there.  Out: a place for every chunk that comes, or none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from zinfer.arena import Arena
from zinfer.chunks.table import ChunkId, ChunkTable
from zinfer.errors import InternalError
from zinfer.memory.ledger import Ledger
from zinfer.memory.numa import Near
from zinfer.memory.pinning import Pinning, no_entry
from zinfer.memory.slab import HostSlab, Slab
from zinfer.plan.records import Placement, Tier


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes [offset, offset + nbytes) of a slab; its generation grows each time the place is emptied."""

    offset: int
    nbytes: int
    generation: int


@dataclass(frozen=True, slots=True)
class Split:
    """How a tier is divided: bytes of the chunks that stay, slots, and the budget; `reserved` by name beside them."""

    homes: Mapping[ChunkId, int]
    slots: int
    slot_bytes: int
    capacity_bytes: int
    reserved: Mapping[str, int] = field(default_factory=dict)


def homes_in(table: ChunkTable, placement: Placement, tier: Tier) -> dict[ChunkId, int]:
    """The chunks whose lasting copy lies in `tier`, and their bytes there, as the first pass brings them."""
    last = sorted(table.chunks, key=lambda chunk: not chunk.ops)  # row tables
    return {
        chunk.id: placement.at_home(table, chunk.id).nbytes
        for chunk in last
        if placement.home[chunk.id] is tier
    }


def split_of(
    table: ChunkTable, placement: Placement, tier: Tier, capacity_bytes: int, reserved: Mapping[str, int]
) -> Split:
    """A tier as a placement divides it; staging slots are lent once for all and not among them."""
    slots = placement.slots if tier is placement.compute_tier else 0
    return Split(homes_in(table, placement, tier), slots, placement.slot_bytes, capacity_bytes, reserved)


class TierMemory:
    """Slots for chunks that pass through, and for each chunk that stays a home of its exact size.

    Offsets are fixed when a chunk gets its home, so addresses repeat and nothing fragments.  A place costs its bytes
    in the ledger from take() to give_back().  A guest is in a slot and leaves its home empty.  `fences` keeps the mark
    of each place's last reader.
    """

    def __init__(
        self, ledger: Ledger, slab: Slab, homes: Mapping[ChunkId, int], slots: int, slot_bytes: int
    ) -> None:
        self.ledger = ledger
        self.slab = slab
        self.slot_bytes = slot_bytes
        self.places: dict[ChunkId, Place] = {}
        self.fences: dict[int, object] = {}  # offset -> what a write must come after
        self._arena = Arena(len(slab.bytes_N))
        self._num_slots = 0
        self._free: list[int] = []
        self._waiting: frozenset[ChunkId] = frozenset()  # guests whose homes nobody has found yet
        self._cut_slots(slots)
        self._homes = {chunk: (self._cut(nbytes), nbytes) for chunk, nbytes in homes.items()}
        self._generations: Counter[int] = Counter()

    def has_home(self, chunk: ChunkId) -> bool:
        """Whether the chunk has bytes of its own here."""
        return chunk in self._homes

    def is_home(self, chunk: ChunkId) -> bool:
        """Whether the chunk is in its home: not away, nor a guest in a slot."""
        return (
            chunk in self._homes
            and chunk in self.places
            and self._homes[chunk][0] == self.places[chunk].offset
        )

    def has_room(self, chunk: ChunkId, *, as_guest: bool = False) -> bool:
        """Whether take() would succeed."""
        has_home = chunk in self._homes and not as_guest
        need = self._homes[chunk][1] if has_home else self.slot_bytes
        return need <= self.ledger.free_bytes and (has_home or bool(self._free))

    def needs_slot(self, chunk: ChunkId, *, as_guest: bool = False) -> bool:
        """Whether a free slot is what the chunk lacks."""
        return (as_guest or chunk not in self._homes) and not self._free

    @property
    def empty_bytes(self) -> int:
        """Bytes of places that nobody is in."""
        cut = sum(nbytes for _, nbytes in self._homes.values()) + self._num_slots * self.slot_bytes
        return cut - sum(place.nbytes for place in self.places.values())

    def lend_slots(self, name: str) -> list[Tensor]:
        """All slots, for someone else to fill and empty (staging); reserved under `name` in the ledger."""
        self.ledger.reserve(name, len(self._free) * self.slot_bytes)
        lent = [self.slab.bytes_N[offset : offset + self.slot_bytes] for offset in self._free]
        self._free.clear()
        self._num_slots = 0
        return lent

    def refuse_less_than(self, split: Split) -> None:
        """Raises BudgetError ZI-2401 when homes and slots do not fit the budget beside what is reserved."""
        trial = Ledger(self.ledger.tier, split.capacity_bytes, self.ledger.reserved | dict(split.reserved))
        trial.reserve("slots", split.slots * split.slot_bytes)
        trial.reserve("weights", sum(split.homes.values()))

    def rehome(self, split: Split) -> None:
        """Other homes, slots and budget; all slots are free, and whoever has a place keeps a home.

        Chunks that had a home of that size before stay where they are.  Memory that holds nothing any more goes back.
        """
        homes, self._waiting = split.homes, frozenset()
        gone = [chunk for chunk in self._homes if not self.keeps(chunk, split)]
        for offset, nbytes in [(offset, self.slot_bytes) for offset in self._free] + [
            self._homes.pop(chunk) for chunk in gone
        ]:
            self._arena.give_back(offset)
            self.fences.pop(offset, None)
            self.slab.discard(offset, nbytes)
        for name in split.reserved:
            self.ledger.reserve(name, 0)
        self.ledger.resize(split.capacity_bytes)
        for name, nbytes in split.reserved.items():
            self.ledger.reserve(name, nbytes)
        self._free.clear()
        self.slot_bytes = split.slot_bytes
        self._cut_slots(split.slots)
        for chunk, nbytes in homes.items():
            if chunk not in self._homes:
                self._homes[chunk] = (self._cut(nbytes), nbytes)

    def keeps(self, chunk: ChunkId, split: Split) -> bool:
        """Whether a chunk that has a home here has it under `split` too: one of another size is another form's."""
        return chunk in self._homes and split.homes.get(chunk) == self._homes[chunk][1]

    def pin(
        self, runtime: Any, *, near: Near | None = None, enter: Callable[[], None] = no_entry
    ) -> Pinning | None:
        """Begin to page-lock the whole slab, in pieces that end where places do.

        Slots lie first and are locked first: what is read from disk passes through them in every pass, while a home
        is copied from once per pass.  Where only a part can be locked, they are in it.
        """
        if not isinstance(self.slab, HostSlab):
            return None
        blocks = self._arena.blocks()
        cuts = [offset for offset, _ in blocks] + [sum(block) for block in blocks[-1:]]
        return self.slab.pin(cuts, runtime, near=near, enter=enter)

    def find_ahead(self, num_streamed: int, guests: Iterable[ChunkId] = ()) -> None:
        """Begin to find the memory of homes, and of as many slots as chunks stream, in the background.

        The homes of `guests` can wait until the first of them comes home.
        """
        self._waiting = frozenset(guests)
        idle = self._free[: max(len(self._free) - num_streamed, 0)]
        self._find_all_but({*idle, *(self._homes[chunk][0] for chunk in self._waiting)})

    def _find_all_but(self, offsets: Collection[int]) -> None:
        """In the background, the memory of every place that does not begin at one of these."""
        if isinstance(self.slab, HostSlab):
            blocks = self._arena.blocks()
            end = max((offset + nbytes for offset, nbytes in blocks), default=0)
            self.slab.find_ahead(end, [block for block in blocks if block[0] in offsets])

    def _find_homes(self) -> None:
        """The homes of the guests that have waited; whatever else there is may hold a chunk."""
        empty = {self._homes[chunk][0] for chunk in self._waiting if not self.is_home(chunk)}
        self._waiting = frozenset()
        self._find_all_but({offset for offset, _ in self._arena.blocks()} - empty)

    def take(self, chunk: ChunkId, *, as_guest: bool = False) -> Place:
        """A place for the chunk, a slot for a guest.  Raises BudgetError ZI-2401 when the ledger has not the bytes."""
        home = None if as_guest else self._homes.get(chunk)
        offset, nbytes = home or (self._free[-1], self.slot_bytes)
        self.ledger.take(chunk, nbytes)
        if home is not None and chunk in self._waiting:
            self._find_homes()
        self.slab.claim(offset, nbytes)
        if home is None:
            self._free.pop()
        self.places[chunk] = Place(offset, nbytes, self._generations[offset])
        return self.places[chunk]

    def move_home(self, chunk: ChunkId) -> None:
        """Out of a slot into the chunk's home.  Until the next take() the slot holds on to its bytes."""
        self.give_back(chunk)
        self.take(chunk)

    def give_back(self, chunk: ChunkId) -> None:
        """Empty the chunk's place."""
        was_home = self.is_home(chunk)
        place = self.places.pop(chunk)
        self.ledger.give_back(chunk)
        self._generations[place.offset] += 1
        if not was_home:
            self._free.append(place.offset)

    def bytes_of(self, chunk: ChunkId) -> Tensor:
        """The chunk's place as uint8."""
        place = self.places[chunk]
        return self.slab.bytes_N[place.offset : place.offset + place.nbytes]

    def discard_empty(self) -> None:
        """Return the memory of every empty place to the system, so that others can really have it."""
        for offset in self._free:
            self.slab.discard(offset, self.slot_bytes)
        for chunk, (offset, nbytes) in self._homes.items():
            if not self.is_home(chunk):
                self.slab.discard(offset, nbytes)

    def check(self) -> None:
        """Books balance, and no two places overlap.  Raises InternalError."""
        self.ledger.check()
        self._arena.check()
        if {chunk: place.nbytes for chunk, place in self.places.items()} != self.ledger.held:
            raise InternalError(
                "ZI-0141", f"{self.ledger.tier}: places {self.places} are not what {self.ledger.held} says"
            )
        live = sorted((place.offset, place.offset + place.nbytes) for place in self.places.values())
        live += [(offset, offset + self.slot_bytes) for offset in self._free]
        end = 0
        for begin, stop in sorted(live):
            if begin < end:
                raise InternalError("ZI-0142", f"{self.ledger.tier}: two places overlap at offset {begin}")
            end = stop

    def close(self) -> None:
        """Empty every place, give the slab back."""
        for chunk in list(self.places):
            self.give_back(chunk)
        self.fences.clear()
        self.slab.close()

    def _cut_slots(self, slots: int) -> None:
        self._num_slots = slots
        self._free = [self._cut(self.slot_bytes) for _ in range(slots)]
        self._free.reverse()  # taken from the end: the lowest and the warmest first

    def _cut(self, nbytes: int) -> int:
        offset = self._arena.take(nbytes)
        if offset is None:
            raise InternalError(
                "ZI-0143", f"a place of {nbytes} bytes does not fit in a slab of {self._arena.size}"
            )
        return offset
