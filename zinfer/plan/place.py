"""Decide where chunks live.  In: a chunk table, budgets, what else needs memory.  Out: a Placement that fits.

A pass uses every chunk once in a fixed cycle, so keeping a fixed set and streaming the rest is as good as any policy
to within one chunk (LRU would never hit); the streamed ones are spread evenly between the resident ones, so that
the link works while those compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from math import ceil, floor

from zinfer.chunks.table import Chunk, ChunkId, ChunkTable
from zinfer.errors import BudgetError
from zinfer.plan.records import Budget, Placement, Tier, TierUse
from zinfer.units import GIB, KIB, MIB, Bytes

FLAGS = {Tier.HOST: "--host-mem", Tier.DEVICE: "--device-mem"}


@dataclass(frozen=True, slots=True)
class Reserve:
    """Bytes that hold no weights: the KV cache and the activation peak of a pass.

    `kv` and `activations` lie in the compute tier; `host_kv` and `host_activations` in host memory below a device,
    when the cache is kept there.
    """

    kv: int = 0
    activations: int = 0
    host_kv: int = 0
    host_activations: int = 0
    parked: int = 0  # of the host's: what waits there and is neither read nor written by the host
    recorded: int = 0  # in the compute tier, of what all else leaves: passes that are recorded

    @property
    def total(self) -> int:
        """Of the compute tier."""
        return self.kv + self.activations

    @property
    def below(self) -> Reserve:
        """What host memory below a device has to hold."""
        return Reserve(self.host_kv, self.host_activations)


def place(
    table: ChunkTable, budget: Budget, *, compute_tier: Tier, reserve: Reserve, lookahead: int = 1
) -> Placement:
    """Choose a home for every chunk.  Pure: same arguments, same answer.

    What fits stays in the compute tier.  Otherwise `lookahead` + 1 slots are set aside and the rest of the budget
    keeps as many bytes as it can.  With a device, what streams is kept in host memory as far as that goes; the
    remainder is read from disk in every pass, through staging slots.  A row table is kept in host memory only
    when nothing has to be read from disk in every pass and there is room.
    Raises BudgetError ZI-2001 when it cannot be done, with the smallest budget that would do.
    """
    smallest = smallest_budget(table, compute_tier=compute_tier, reserve=reserve, lookahead=lookahead)
    for tier, have, need in (
        (Tier.DEVICE, budget.device, smallest.device),
        (Tier.HOST, budget.host, smallest.host),
    ):
        if have < need:
            raise _too_small(
                table,
                tier,
                have,
                need,
                reserve if tier is compute_tier else reserve.below,
                f"{lookahead + 1} slots" if tier is compute_tier else "a staging slot",
            )
    homes = {chunk.id: Tier.DISK for chunk in table.chunks}
    room = (budget.device if compute_tier is Tier.DEVICE else budget.host) - reserve.total
    slot_bytes, slots = table.slot_bytes, 0
    streamed: list[Chunk] = []
    if sum(chunk.nbytes for chunk in table.streamable) > room:
        slots = lookahead + 1
        slot_bytes, streamed = min(
            (
                (cap, _split(table.streamable, room - slots * cap, cap))
                for cap in _slot_sizes(table, compute_tier)
                if _forced_bytes(table, cap) + slots * cap <= room
            ),
            key=lambda choice: sum(chunk.nbytes for chunk in choice[1]),
        )
    room -= slots * slot_bytes
    _settle(homes, table.streamable, streamed, compute_tier)
    staging = 0
    if compute_tier is Tier.DEVICE:
        room = budget.host - reserve.below.total
        staging = min(lookahead + 1, room // slot_bytes)
        room -= staging * slot_bytes
        kept, streamed = streamed, _split(streamed, room, slot_bytes)
        _settle(homes, kept, streamed, Tier.HOST)
    room -= sum(chunk.nbytes for chunk in table.streamable if homes[chunk.id] is Tier.HOST)
    for chunk in table.chunks:
        if not chunk.ops and not streamed and chunk.nbytes <= room:
            homes[chunk.id] = Tier.HOST
            room -= chunk.nbytes
    return Placement(
        compute_tier=compute_tier,
        home=tuple(homes[chunk.id] for chunk in table.chunks),
        slots=slots,
        slot_bytes=slot_bytes,
        staging=staging,
        lookahead=lookahead if slots else 0,
    )


def smallest_budget(table: ChunkTable, *, compute_tier: Tier, reserve: Reserve, lookahead: int = 1) -> Budget:
    """The smallest budget that `place` accepts: what cannot stream stays and the rest streams, or all fits."""
    slots = lookahead + 1
    streaming = min(_forced_bytes(table, cap) + slots * cap for cap in _slot_sizes(table, compute_tier))
    compute = reserve.total + min(streaming, sum(chunk.nbytes for chunk in table.streamable))
    if compute_tier is Tier.DEVICE:
        return Budget(host=table.slot_bytes + reserve.below.total, device=compute)  # one staging slot
    return Budget(host=compute)


def spread(sizes: Sequence[int], numerator: int) -> list[bool]:
    """Mark about `numerator` / len(sizes) of all bytes, as evenly along the sequence as whole items allow.

    Error diffusion (Bresenham's line in bytes): the marked bytes of every prefix differ from their share by at
    most half the largest item, so of equal items exactly `numerator` are marked.
    """
    marks = []
    debt, scale = 0, len(sizes)
    for size in sizes:
        debt += size * numerator
        is_marked = 2 * debt >= size * scale
        debt -= size * scale if is_marked else 0
        marks.append(is_marked)
    return marks


def tier_uses(
    table: ChunkTable, placement: Placement, budget: Budget, reserve: Reserve, device: str = "cpu"
) -> tuple[TierUse, ...]:
    """What each memory tier holds at its peak, compute tier first.

    For a CUDA device what copies start from or end in is page-locked: homes, staging, and what is parked.
    """
    uses = []
    for tier, limit in ((Tier.DEVICE, budget.device), (Tier.HOST, budget.host)):
        is_compute = tier is placement.compute_tier
        if tier is Tier.DEVICE and not is_compute:
            continue
        resident = sum(
            placement.at_home(table, chunk.id).nbytes
            for chunk in table.chunks
            if placement.home[chunk.id] is tier
        )
        staging = 0 if is_compute else placement.staging * placement.slot_bytes
        is_locked = device.startswith("cuda") and not is_compute
        uses.append(
            TierUse(
                tier=tier,
                budget=limit,
                resident=resident,
                slots=placement.slots * placement.slot_bytes if is_compute else 0,
                staging=staging,
                locked=resident + staging + reserve.parked if is_locked else 0,
                kv=reserve.kv if is_compute else reserve.host_kv,
                activations=reserve.activations + reserve.recorded
                if is_compute
                else reserve.host_activations,
            )
        )
    return tuple(uses)


def size_flag(tier: Tier, nbytes: int) -> str:
    """A flag that grants at least `nbytes`, written as a person would."""
    whole = [(unit, name) for unit, name in ((GIB, "GiB"), (MIB, "MiB")) if nbytes and nbytes % unit == 0]
    unit, name = [*whole, (MIB, "MiB") if nbytes >= 64 * MIB else (KIB, "KiB")][0]
    return f"{FLAGS[tier]} {ceil(nbytes / unit)}{name}"


def size_steps(sizes: Sequence[int]) -> list[int]:
    """The distinct sizes, largest first, those within an eighth of an octave taken together as their largest."""
    steps: dict[int, int] = {}
    for size in sizes:
        fine_bits = max(size.bit_length() - 4, 0)
        steps[size >> fine_bits << fine_bits] = max(steps.get(size >> fine_bits << fine_bits, 0), size)
    return sorted(steps.values(), reverse=True)


def _slot_sizes(table: ChunkTable, compute_tier: Tier) -> list[int]:
    """Slot sizes worth a trial.

    Chunks larger than a slot must stay, which pays where a few are much larger than the others (a head's blocks).
    Device chunks are loaded through staging slots, so there every chunk has to fit a slot.
    """
    sizes = [chunk.nbytes for chunk in table.streamable]
    return [max(sizes)] if compute_tier is Tier.DEVICE else size_steps(sizes)


def _forced_bytes(table: ChunkTable, cap: int) -> int:
    return sum(chunk.nbytes for chunk in table.streamable if chunk.nbytes > cap)


def _split(chunks: Sequence[Chunk], room: int, cap: int) -> list[Chunk]:
    """The fewest bytes of chunks no larger than `cap`, evenly spread, without which the others fit in `room`."""
    movable = [chunk for chunk in chunks if chunk.nbytes <= cap]
    excess = sum(chunk.nbytes for chunk in chunks) - room
    return list(compress(movable, fewest([chunk.nbytes for chunk in movable], excess)))


def fewest(sizes: Sequence[int], excess: int) -> list[bool]:
    """Marks of the fewest bytes that reach `excess`, evenly spread; all of them may be needed, but must suffice."""
    if excess <= 0:
        return [False] * len(sizes)
    # Shares whose marked bytes can lie nearest above `excess`: see the bound that `spread` keeps.
    mean, largest = sum(sizes) / len(sizes), max(sizes)
    low = max(floor((excess - largest) / mean), 0)
    high = min(ceil((excess + 2 * largest) / mean), len(sizes))
    trials = [spread(sizes, numerator) for numerator in range(low, high + 1)]
    enough = [marks for marks in trials if _marked_bytes(sizes, marks) >= excess]
    return min(enough, key=lambda marks: _marked_bytes(sizes, marks))


def _marked_bytes(sizes: Sequence[int], marks: Sequence[bool]) -> int:
    return sum(compress(sizes, marks))


def _settle(
    homes: dict[ChunkId, Tier], chunks: Sequence[Chunk], leaving: Sequence[Chunk], tier: Tier
) -> None:
    """Give `tier` as a home to the chunks that are not leaving."""
    gone = {chunk.id for chunk in leaving}
    homes |= {chunk.id: tier for chunk in chunks if chunk.id not in gone}


def _too_small(
    table: ChunkTable, tier: Tier, have: int, need: int, reserve: Reserve, slots: str
) -> BudgetError:
    largest = max(table.streamable, key=lambda chunk: chunk.nbytes)
    tensor = max(largest.tensors, key=lambda piece: piece.nbytes)
    return BudgetError(
        "ZI-2001",
        f"the {tier} budget is {Bytes(have)}, {Bytes(need)} are needed: {slots} of {Bytes(largest.nbytes)} for chunk "
        f"{largest.id} ({tensor.name} rows {tensor.start}-{tensor.stop}), KV {Bytes(reserve.kv)}, activations "
        f"{Bytes(reserve.activations)}",
        remedy=size_flag(tier, need),
    )
