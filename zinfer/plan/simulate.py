"""Carry a schedule out on a virtual clock.  In: steps, seconds of every move and computation.  Out: a timeline."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from zinfer.chunks.table import ChunkTable
from zinfer.config.machine import Machine
from zinfer.errors import InternalError
from zinfer.plan.records import Compute, Evict, Fetch, Placement, Schedule, Settle, Step, Tier
from zinfer.plan.shares import DISK, cut, is_peer, ways_up

_STEADY_PASSES = 2  # after so many the first pass no longer shows
_PACKING_S_PER_GB = 0.5  # where nobody has measured it: 0.37 to 0.46 s were seen on two cores


class Stretch(NamedTuple):
    """One engine or link at work on one chunk (-1: on embedding rows), seconds on the virtual clock."""

    lane: str  # "compute" | "disk" | "h2d" | "rows"; of further devices "h2d:1", "peer:1", ...
    chunk: int
    begin_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class PassRun:
    """What one simulated pass took; `bubble_s` is the time its computation waited for chunks."""

    seconds: float
    bubble_s: float
    busy_s: dict[str, float]  # lane -> seconds
    bytes: dict[str, int]  # link -> bytes of the fetches that the pass began
    peak_bytes: dict[Tier, int]  # weights: chunks on their way or there, slots and staging in full
    timeline: tuple[Stretch, ...]
    disk_slowdown: float = 1.0  # by which computation beside it has stretched the disk's seconds


class Simulator:
    """Links and the compute engine work side by side, each on one thing at a time.

    A fetch begins when its step is reached and, from disk to a device, a staging slot is free; a computation
    begins when its chunk has arrived and the one before has ended.  A link takes what is ready for it, so a chunk
    from host memory may overtake one that is still being read.  Clocks run on from pass to pass.
    """

    def __init__(self, table: ChunkTable, placement: Placement, machine: Machine) -> None:
        self.placement = placement
        self.now_s = 0.0
        self._chunks = table.chunks
        self._home_bytes = [placement.at_home(table, chunk.id).nbytes for chunk in table.chunks]
        self._overlap, self._disk_slowdown = machine.overlap, 1.0
        disk = machine.disk_read
        self._bytes: dict[str, Sequence[int]] = {DISK: table.read_bytes}
        self._seconds = {
            DISK: [
                len(chunk.reads) * disk.latency_s + nbytes / disk.bytes_per_s
                for chunk, nbytes in zip(table.chunks, table.read_bytes, strict=True)
            ]
        }
        ways = ways_up(machine)
        self._lanes_up = [[(lane, not is_peer(lane)) for lane, _ in way.hops] for way in ways]
        rates = [way.bytes_per_s for way in ways]
        shares = {nbytes: cut(nbytes, rates) for nbytes in {chunk.nbytes for chunk in table.chunks}}
        for at, way in enumerate(ways):
            sizes = [shares[chunk.nbytes][at].nbytes for chunk in table.chunks]
            for lane, link in way.hops:
                self._bytes[lane] = sizes
                self._seconds[lane] = [link.seconds(nbytes) for nbytes in sizes]
        self._timeline: list[Stretch] = []  # of the pass under way
        self._ready_s: dict[int, float] = {}  # chunks in the compute tier -> when they are there
        self._host_s: dict[int, float] = {}  # chunks in host memory below a device -> likewise
        self._staging_s = deque([0.0] * placement.staging)  # when each staging slot is free again
        self._disk_free_s = 0.0
        self._busy: dict[str, deque[Stretch]] = {lane: deque() for lane in self._bytes}
        self._host_bytes, self._device_bytes = placement.staging * placement.slot_bytes, 0

    def settle(self, steps: Iterable[Step]) -> None:
        """As if passes of these steps had gone before: what stays is there, and what they do not fetch on its way."""
        tier, fetched = self.placement.compute_tier, set()
        for chunk, home in zip(self._chunks, self.placement.home, strict=True):
            if home is tier and chunk.ops:
                self._ready_s[chunk.id] = self.now_s
                self._hold(tier, self._home_bytes[chunk.id])
            elif home is Tier.HOST:
                self._host_s[chunk.id] = self.now_s
                self._hold(Tier.HOST, chunk.nbytes)
        for step in steps:
            if isinstance(step, Fetch):
                fetched.add(step.chunk)
            elif isinstance(step, Compute) and not (step.chunk in self._ready_s or step.chunk in fetched):
                self._ready_s[step.chunk] = self._fetch(step.chunk, as_guest=False)

    def side_by_side(self, steps: Iterable[Step], compute_s: Sequence[float]) -> Sequence[float]:
        """Slow disk and processor down for as long as both work in this pass; returns the seconds of computation."""
        self._disk_slowdown = 1.0
        both = self._overlap
        if self.placement.compute_tier is not Tier.HOST or both.disk * both.compute == 1:
            return compute_s
        steps = tuple(steps)
        disk_s = sum(self._seconds[DISK][step.chunk] for step in steps if isinstance(step, Fetch))
        work_s = sum(compute_s[step.chunk] for step in steps if isinstance(step, Compute))
        if not disk_s or not work_s:
            return compute_s
        slow_disk_s, slow_work_s = both.at_once(disk_s, work_s)
        self._disk_slowdown = slow_disk_s / disk_s
        return [seconds * slow_work_s / work_s for seconds in compute_s]

    def run(self, steps: Iterable[Step], compute_s: Sequence[float], rows_s: float = 0.0) -> PassRun:
        """One pass; `compute_s` holds seconds per chunk of the table, `rows_s` those of its embedding rows.

        Raises InternalError ZI-2091 when the schedule computes a chunk that it has not fetched.
        """
        begin_s, bubble_s = self.now_s, 0.0
        timeline = self._timeline = []
        ready_s = self._ready_s
        host_peak, device_peak = self._host_bytes, self._device_bytes
        for step in steps:
            if isinstance(step, Compute):
                chunk = step.chunk
                if chunk not in ready_s:
                    raise InternalError("ZI-2091", f"the schedule computes chunk {chunk} before fetching it")
                start_s = max(self.now_s, ready_s[chunk])
                bubble_s += start_s - self.now_s
                self.now_s = start_s + compute_s[chunk]
                timeline.append(Stretch("compute", chunk, start_s, self.now_s))
            elif isinstance(step, Fetch):
                ready_s[step.chunk] = self._fetch(step.chunk, step.as_guest)
                host_peak = max(host_peak, self._host_bytes)
                device_peak = max(device_peak, self._device_bytes)
            elif isinstance(step, Evict):
                del ready_s[step.chunk]
                self._hold(self.placement.compute_tier, -self.placement.slot_bytes)
            elif isinstance(step, Settle):  # the seconds are among those of the pass's computation
                self._hold(self.placement.compute_tier, self._home_bytes[step.chunk])
                host_peak = max(host_peak, self._host_bytes)
                self._hold(self.placement.compute_tier, -self.placement.slot_bytes)
            else:
                timeline.append(Stretch("rows", -1, self.now_s, self.now_s + rows_s))
                self.now_s += rows_s
        busy_s: dict[str, float] = {}
        moved: Counter[str] = Counter()
        for lane, number, start_s, end_s in timeline:
            busy_s[lane] = busy_s.get(lane, 0.0) + end_s - start_s
            if lane in self._bytes:
                moved[lane] += self._bytes[lane][number]
        peak_bytes = {Tier.HOST: host_peak, Tier.DEVICE: device_peak}
        seconds = self.now_s - begin_s
        return PassRun(
            seconds, bubble_s, busy_s, dict(moved), peak_bytes, tuple(timeline), self._disk_slowdown
        )

    def _fetch(self, number: int, as_guest: bool) -> float:
        """Move a chunk as its home wants it; returns when it is there."""
        chunk, home, tier = self._chunks[number], self.placement.home[number], self.placement.compute_tier
        where = tier if chunk.ops else Tier.HOST
        is_home = home is where and not as_guest
        self._hold(where, chunk.nbytes if is_home else self.placement.slot_bytes)
        if where is Tier.HOST:
            return self._read(number, self.now_s)
        if home is Tier.HOST:
            if number not in self._host_s:
                self._hold(Tier.HOST, chunk.nbytes)
                self._host_s[number] = self._read(number, self.now_s)
            there_s, _ = self._rise(number, max(self.now_s, self._host_s[number]))
            return there_s
        read_s = self._read(number, max(self.now_s, self._staging_s.popleft()))
        there_s, left_s = self._rise(number, read_s)
        self._staging_s.append(left_s)
        return there_s

    def _hold(self, tier: Tier, nbytes: int) -> None:
        if tier is Tier.HOST:
            self._host_bytes += nbytes
        else:
            self._device_bytes += nbytes

    def _rise(self, chunk: int, ready_s: float) -> tuple[float, float]:
        """Every way takes its share; one over another device is pulled there first, then sent on.

        Returns when the last share is there, and when the last one has left host memory.
        """
        there_s = left_s = ready_s
        for lanes in self._lanes_up:
            at_s = ready_s
            for lane, from_host in lanes:
                if self._bytes[lane][chunk]:
                    at_s = self._move(chunk, lane, at_s)
                    if from_host and at_s > left_s:
                        left_s = at_s
            there_s = max(there_s, at_s)
        return there_s, left_s

    def _read(self, chunk: int, ready_s: float) -> float:
        """The disk serves in the order of issue, so has no gaps.  Returns the end."""
        begin_s = max(ready_s, self._disk_free_s)
        self._disk_free_s = begin_s + self._seconds[DISK][chunk] * self._disk_slowdown
        self._timeline.append(Stretch(DISK, chunk, begin_s, self._disk_free_s))
        return self._disk_free_s

    def _move(self, chunk: int, lane: str, ready_s: float) -> float:
        """Occupy the link in its first gap from `ready_s` on; returns the end."""
        seconds = self._seconds[lane][chunk]
        busy = self._busy[lane]
        while busy and busy[0].end_s <= self.now_s:
            busy.popleft()
        at = 0
        while at < len(busy) and busy[at].begin_s < ready_s + seconds:
            ready_s = max(ready_s, busy[at].end_s)
            at += 1
        move = Stretch(lane, chunk, ready_s, ready_s + seconds)
        busy.insert(at, move)
        self._timeline.append(move)
        return move.end_s


def simulate(
    table: ChunkTable,
    placement: Placement,
    schedule: Schedule,
    machine: Machine,
    compute_s: Sequence[float],
    *,
    rows_s: float = 0.0,
) -> tuple[PassRun, PassRun]:
    """The first pass, which also loads, and a steady one."""
    runs = simulate_passes(
        table, placement, schedule, machine, [compute_s], rows_s=[rows_s], num_steady=_STEADY_PASSES
    )
    return runs[0], runs[-1]


def simulate_steady(
    table: ChunkTable,
    placement: Placement,
    steps: Sequence[Step],
    machine: Machine,
    compute_s: Sequence[float],
    *,
    rows_s: float = 0.0,
) -> PassRun:
    """The steady pass of `simulate` without the one that loads: what that one leaves behind no longer shows."""
    simulator = Simulator(table, placement, machine)
    simulator.settle(steps)
    slowed_s = simulator.side_by_side(steps, compute_s)
    runs = [simulator.run(steps, slowed_s, rows_s) for _ in range(_STEADY_PASSES)]
    return runs[-1]


def least_seconds(
    table: ChunkTable, placement: Placement, machine: Machine, compute_s: Sequence[float]
) -> float:
    """No steady pass takes less: the busiest link, or computation, with nothing to wait for."""
    disk = machine.disk_read
    streamed = [chunk for chunk in table.streamable if not placement.resident(chunk.id)]
    up_s = 0.0
    if placement.compute_tier is Tier.DEVICE:
        up_s = sum([chunk.nbytes for chunk in streamed]) / machine.up_bytes_per_s
        streamed = [chunk for chunk in streamed if placement.home[chunk.id] is Tier.DISK]
    reads_s = sum([len(chunk.reads) for chunk in streamed]) * disk.latency_s
    disk_s = reads_s + sum([table.read_bytes[chunk.id] for chunk in streamed]) / disk.bytes_per_s
    return max(disk_s, up_s, sum([compute_s[chunk.id] for chunk in table.streamable]))


def simulate_passes(
    table: ChunkTable,
    placement: Placement,
    schedule: Schedule,
    machine: Machine,
    compute_s: Sequence[Sequence[float]],
    *,
    rows_s: Sequence[float],
    num_steady: int = 0,
) -> list[PassRun]:
    """The passes that load, and so many steady ones behind them.

    `compute_s` and `rows_s` hold what the first pass takes, the second and so on; the last ones go for all others.
    """
    simulator = Simulator(table, placement, machine)
    runs, found = [], placement.slots * placement.slot_bytes
    for at, steps in enumerate((*schedule.loading, *[schedule.steady] * num_steady)):
        work_s = compute_s[min(at, len(compute_s) - 1)]
        if at < len(schedule.loading) and placement.compute_tier is Tier.HOST:
            nbytes = fresh_bytes(table, placement, steps)
            work_s = with_packing(table, work_s, machine, steps)
            work_s = with_finding(table, work_s, machine.finding_s(nbytes, found))
            found += nbytes
        slowed_s = simulator.side_by_side(steps, work_s)
        runs.append(simulator.run(steps, slowed_s, rows_s[min(at, len(rows_s) - 1)]))
    return runs


def fresh_bytes(table: ChunkTable, placement: Placement, steps: Iterable[Step]) -> int:
    """Bytes of memory that a pass is the first to use: of what comes to stay in it."""
    new = {
        step.chunk
        for step in steps
        if isinstance(step, Settle) or (isinstance(step, Fetch) and not step.as_guest)
    }
    return sum(
        placement.at_home(table, chunk.id).nbytes
        for chunk in table.streamable
        if chunk.id in new and placement.resident(chunk.id)
    )


def with_packing(
    table: ChunkTable, compute_s: Sequence[float], machine: Machine, steps: Iterable[Step]
) -> Sequence[float]:
    """Computation of a pass behind which chunks settle: packing takes the processor."""
    settled = {step.chunk for step in steps if isinstance(step, Settle)}
    if not settled:
        return compute_s
    byte_s = (machine.host.packing_s_per_gb or _PACKING_S_PER_GB) / 1e9
    return [
        seconds + (chunk.weight_bytes * byte_s if chunk.id in settled else 0.0)
        for seconds, chunk in zip(compute_s, table.chunks, strict=True)
    ]


def with_finding(table: ChunkTable, compute_s: Sequence[float], finding_s: float) -> Sequence[float]:
    """Computation of a pass that loads, which shares the processor with finding pages for what comes to stay.

    They are found ahead of their reads, all through the pass: a large chunk at its end keeps nobody waiting there.
    """
    share_s = finding_s / sum(
        chunk.nbytes for chunk in table.streamable
    )  # of each byte that is computed with
    return [
        seconds + (chunk.nbytes * share_s if chunk.ops else 0.0)
        for seconds, chunk in zip(compute_s, table.chunks, strict=True)
    ]
