"""Choose chunk size, homes and lookahead together.  In: a Source and budgets.  Out: the fastest predicted choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf

from zinfer.chunks.at_home import with_packed
from zinfer.chunks.pack import assemble, layer_sizes
from zinfer.chunks.search import search_limit
from zinfer.chunks.source import Source
from zinfer.chunks.table import PIECE_BYTES, ChunkTable
from zinfer.config.machine import Machine
from zinfer.errors import BudgetError, InternalError
from zinfer.plan.cost import RECORDED_ROWS, has_steps
from zinfer.plan.forecast import SteadyPasses, decode_load
from zinfer.plan.place import Reserve, place, size_steps, tier_uses
from zinfer.plan.records import Budget, KvPlan, Placement, Schedule, Tier, Workload
from zinfer.plan.schedule import build_schedule
from zinfer.plan.simulate import PassRun
from zinfer.spec.cost import activation_bytes
from zinfer.spec.records import ModelSpec
from zinfer.units import MIB

_MOST_RECORDED_BYTES = 32 * MIB  # a pass of 256 rows through 1 B parameters takes about 13
_RECORDED_PART = 64  # of a budget: one part of so many at most
_FEW_ROWS = 32  # what happens to be left is room enough for so many
_ROOM_SHARE = 1.4  # of the most that is alive at once: what recordings hand on to each other lies beside it

_LOOKAHEADS = {
    Tier.HOST: (2, 1, 3),
    Tier.DEVICE: (2, 1, 3, 4),
}  # disk, link and engine in a row want one more
# Seen on real disks, and known to no virtual clock: with one chunk in flight an unpunctual read leaves the link idle,
# and a disk that is not asked for a few pieces at once is slower (46 MB ahead: 1.12 times the time of 69 MB).
_LONE_FETCH_LOSS = 1.1
_QUEUE_BYTES = 4 * PIECE_BYTES
_SHORT_QUEUE_LOSS = 0.4
_SLOTS_SHARE = 1 / 16  # of the room for weights: above that, smaller slots are worth a trial
_MAX_TRIAL_UNITS = 4096
_MAX_TRIALS = 4


@dataclass(frozen=True)
class Choice:
    """A chunk limit and what follows from it; `steady` is the simulated decode pass it was chosen by."""

    limit: int
    table: ChunkTable
    reserve: Reserve
    placement: Placement
    steady: PassRun
    parks: bool

    @cached_property
    def schedule(self) -> Schedule:
        """Written down where it is wanted: most choices are only compared."""
        return build_schedule(self.table, self.placement, parks=self.parks)

    def spec_of(self, spec: ModelSpec) -> ModelSpec:
        """The model as its steady passes compute it: with what is packed at home."""
        return with_packed(spec, self.table, self.placement.packed)

    def reserve_with_recorded(self, spec: ModelSpec, budget: Budget, *, device: str) -> Reserve:
        """The reserve and room for passes that a host records, of what its budget has to spare: no weight makes way."""
        if device != "cpu" or not has_steps(spec):
            return self.reserve
        (use,) = tier_uses(self.table, self.placement, budget, self.reserve)
        spare = min(_most_recorded(budget), budget.host - use.total)
        return replace(self.reserve, recorded=max(spare, 0))


def choose(
    spec: ModelSpec,
    source: Source,
    budget: Budget,
    machine: Machine,
    workload: Workload,
    *,
    compute_tier: Tier,
    reserve_of: Callable[[ChunkTable | None], Reserve],
    exact: bool,
    lookahead: int | None = None,
    room: int = 0,
) -> Choice:
    """Try chunk limits and lookaheads and keep the fastest decode pass on the virtual clock.

    What waits between chunks depends on where they end: `reserve_of` says it of a table, or (None) of any.  Where
    weights stream `room` more bytes are left free, if they can be (`recorded_room`).
    Raises BudgetError ZI-2001 when nothing fits, for the smallest chunks and the least lookahead.
    """
    lookaheads = _LOOKAHEADS[compute_tier] if lookahead is None else (lookahead,)
    best: Choice | None = None
    best_s = inf
    for limit in _limits(source, budget, compute_tier, reserve_of(None), [count + 1 for count in lookaheads]):
        table = assemble(source, limit)
        reserve = reserve_of(table)
        passes = SteadyPasses(spec, table, machine, decode_load(workload), exact=exact)
        # Of very many chunks no single one matters: two trials do.
        for count in lookaheads[: 2 if len(table.chunks) > _MAX_TRIAL_UNITS else None]:
            try:
                placement = _place(table, budget, compute_tier, reserve, count, room)
            except BudgetError:
                continue
            if best is not None and passes.least_s(placement) * _lone(placement) >= best_s:
                continue
            steady = passes.under(placement)
            likely_s = steady.seconds * _loss(placement, steady)
            if likely_s < best_s:
                best, best_s = Choice(limit, table, reserve, placement, steady, workload.parks), likely_s
            if best is not None and not placement.slots:
                return best  # nothing streams: no other choice moves less
    if best is None:
        least = assemble(source, 1)
        place(least, budget, compute_tier=compute_tier, reserve=reserve_of(least), lookahead=min(lookaheads))
        raise InternalError(
            "ZI-2092", "single ops can be placed where larger chunks cannot, and were not tried"
        )
    return best


def _place(
    table: ChunkTable, budget: Budget, compute_tier: Tier, reserve: Reserve, lookahead: int, room: int
) -> Placement:
    """With so much room left where something streams anyhow and it fits.  Raises BudgetError ZI-2001."""
    found = place(table, budget, compute_tier=compute_tier, reserve=reserve, lookahead=lookahead)
    if room and found.slots:
        roomy = replace(reserve, activations=reserve.activations + room)
        with suppress(BudgetError):
            return place(table, budget, compute_tier=compute_tier, reserve=roomy, lookahead=lookahead)
    return found


def _most_recorded(budget: Budget) -> int:
    return min(_MOST_RECORDED_BYTES, budget.host // _RECORDED_PART)


def recorded_room(spec: ModelSpec, workload: Workload, budget: Budget, *, exact: bool) -> int:
    """Bytes that recording a host's decode passes takes, where those are worth weights that make way: of so many rows
    that computing counts, and not so few that what happens to be left is enough.  All but the head's activations.
    """
    rows = workload.batch
    if not (_FEW_ROWS < rows <= RECORDED_ROWS and has_steps(spec) and workload.kv == KvPlan()):
        return 0
    costs = activation_bytes(spec, rows, rows, workload.context, exact=exact)
    room = round(_ROOM_SHARE * max(cost.peak for kind, cost in costs.items() if kind != "head"))
    return room if room <= _most_recorded(budget) else 0


def _loss(placement: Placement, steady: PassRun) -> float:
    """What a short queue of reads costs, as a factor; below a device staging slots keep the disk busy."""
    if not placement.slots:
        return 1.0
    loss = _lone(placement)
    reads = [stretch for stretch in steady.timeline if stretch.lane == "disk"]
    if reads and placement.compute_tier is Tier.HOST:
        ahead = placement.lookahead * steady.bytes["disk"] / len(reads)
        loss *= 1 + _SHORT_QUEUE_LOSS * max(1 - ahead / _QUEUE_BYTES, 0.0)
    return loss


def _lone(placement: Placement) -> float:
    return _LONE_FETCH_LOSS if placement.lookahead == 1 else 1.0


def _limits(
    source: Source, budget: Budget, compute_tier: Tier, reserve: Reserve, slots: Sequence[int]
) -> Iterator[int]:
    """Chunk limits worth a trial, the one that should move the fewest bytes first."""
    room = (budget.device if compute_tier is Tier.DEVICE else budget.host) - reserve.total
    found = 1  # every op by itself: then the largest may have to stay
    for count in slots:
        with suppress(BudgetError):
            found = search_limit(source, room, count)
            break
    if compute_tier is Tier.DEVICE:  # staging slots lie in host memory
        found = max(min(found, (budget.host - reserve.below.total) // slots[0]), 1)
    yield found
    if slots[0] * found > room * _SLOTS_SHARE and len(source.units) <= _MAX_TRIAL_UNITS:
        units = size_steps([size for sizes in layer_sizes(source) for size in sizes])
        yield from [size for size in units if size < found][:_MAX_TRIALS]
