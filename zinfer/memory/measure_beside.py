"""What reading costs beside computing.  In: files to read, work to do.  Out: how much each slows, seconds per chunk."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
import torch

from zinfer.chunks.table import HUGE_PAGE, PAGE, PIECE_BYTES, Chunk, ChunkId, ChunkTable, Read
from zinfer.config.machine import Overlap
from zinfer.memory.ahead import Ahead
from zinfer.memory.assemble import open_manager
from zinfer.memory.crowd import CROWD
from zinfer.memory.measure_disk import ReadLoad, ranges
from zinfer.memory.measure_links import typical, typical_seconds
from zinfer.memory.slab import HostSlab
from zinfer.memory.there import held_there
from zinfer.plan.records import Budget, Placement, Tier
from zinfer.units import round_up

# A slowdown beyond this was mostly somebody else's work: where turns said 1.38 to 1.63, passes took 0.96 to 1.66 times
# as long as reads alone, 1.3 in the middle (docs/experiments.md).
_MOST = 1.3
_NUM_CHUNKS = 16
_TURN_S = 0.3  # of measuring overlap: some rounds of reads beside work, some alone before and after them
_FINDERS = 2  # of pages, at once in a first pass: the engine's own, and a reader
_LEAST_ADDED = 0.05  # of the time beside a finder of pages: noise must not make fresh memory cost nothing
_QUARTILE = 0.25
_MOST_THERE = 4  # times what is then found fresh: of a machine whose memory is always there it is enough
_WAIT_S, _MOST_WAITS = 0.01, 20


class Beside:
    """What reads, fresh memory and products cost each other.

    `decode` and `prompt` are products of one row and of many; `seconds` are those of the whole measurement.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        decode: Callable[[], object],
        prompt: Callable[[], object],
        seconds: float,
    ) -> None:
        self._paths = paths
        self._decode = decode
        self._prompt = prompt
        self._seconds = seconds
        self._turns: list[Overlap] = []

    def take_turns(self, left_s: float) -> None:
        """Some turns of reads and products; best at moments apart, for others keep a disk busy for seconds together."""
        with torch.no_grad():
            self._decode()  # a kernel is chosen at its first use
            self._turns += overlap_turns(self._paths, self._decode, min(self._seconds / 14, left_s))

    @property
    def overlap(self) -> Overlap:
        """By all turns so far."""
        return usual_overlap(self._turns)

    def fresh(self, left_s: float, nbytes: int) -> float:
        """Bytes per second of fresh memory."""
        with torch.no_grad():
            self._prompt()
            return measure_fresh(self._prompt, min(self._seconds / 20, left_s), nbytes)


def overlap_turns(paths: Sequence[Path], work: Callable[[], object], seconds: float) -> list[Overlap]:
    """`work` alone, reads alone and both at once, in turns, since disk and processor have changed a second later.

    Both at once as in a streamed pass: products that wait for each other do not spin then (`memory.crowd`).  A turn's
    sides are compared with each other alone, for what lasts longer than a turn is on both of them.
    """
    reads = ranges(paths, PIECE_BYTES)
    if not reads:
        return []
    num_turns = max(int(seconds / _TURN_S), 1)
    with ReadLoad(paths) as load, ThreadPoolExecutor(1, "zinfer-probe") as pool:
        CROWD.hold()
        try:
            return [_turn(load, reads, work, pool, seconds / num_turns) for _ in range(num_turns)]
        finally:
            CROWD.let_go()


def usual_overlap(turns: Sequence[Overlap]) -> Overlap:
    """What reads and products cost each other every turn meets; what somebody else takes, some turns meet.

    Of reads the lower quartile counts: seconds together, a disk that others use is slow beside work and not alone.
    """
    if not turns:
        return Overlap()
    return Overlap(
        disk=min(float(np.quantile([turn.disk for turn in turns], _QUARTILE)), _MOST),
        compute=min(median(turn.compute for turn in turns), _MOST),
    )


def _turn(
    load: ReadLoad,
    reads: Sequence[Read],
    work: Callable[[], object],
    pool: ThreadPoolExecutor,
    seconds: float,
) -> Overlap:
    """How many times longer reads and work take beside each other than alone before and after it."""
    read_s: list[float] = []
    work_s: list[float] = []
    work_beside_s: list[float] = []
    _until_cores_spin()
    work_s += _times(work, seconds / 8)
    read_s += load.round_seconds(reads, seconds / 8)
    reading = pool.submit(load.round_seconds, reads, seconds / 2)
    while not reading.done():
        CROWD.enter()
        begin_s = time.perf_counter()
        work()
        work_beside_s.append(time.perf_counter() - begin_s)
    read_beside_s = reading.result()
    read_s += load.round_seconds(reads, seconds / 8)
    _until_cores_spin()
    work_s += _times(work, seconds / 8)
    # The last one may have outlived the reads.
    beside_s = work_beside_s[:-1] or work_beside_s or work_s
    return Overlap(
        disk=max(median(read_beside_s) / median(read_s), 1.0),
        compute=max(median(beside_s) / median(work_s), 1.0),
    )


def _times(work: Callable[[], object], seconds: float) -> list[float]:
    """Of as many as begin in time, at least one."""
    times: list[float] = []
    end_s = time.perf_counter() + seconds
    while not times or time.perf_counter() < end_s:
        begin_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin_s)
    return times


def _until_cores_spin() -> None:
    """What was read is a moment ago: a product alone is one whose threads do spin again."""
    for _ in range(_MOST_WAITS):
        if not CROWD.is_there:
            break
        time.sleep(_WAIT_S)


def measure_fresh(work: Callable[[], object], seconds: float, nbytes: int) -> float:
    """Bytes per second at which memory that nobody has used gets its pages, by what that adds to `work` beside it.

    A virtual machine finds and clears each page at its first use.  What some process gave back a moment ago is still
    there and is used first: it is held meanwhile, and of what remains the first half of the time is not counted.  It
    ends with `nbytes`.
    """
    alone_s = typical_seconds(work, seconds / 4)
    with held_there(_MOST_THERE * nbytes, seconds):
        return _fresh_rate(work, alone_s, seconds, nbytes)


def _fresh_rate(work: Callable[[], object], alone_s: float, seconds: float, nbytes: int) -> float:
    slab = HostSlab(nbytes)
    share = round_up(-(-nbytes // _FINDERS), HUGE_PAGE)
    finders = [Ahead(slab.bytes_N[begin:], min(share, nbytes - begin)) for begin in range(0, nbytes, share)]
    marks = [(time.perf_counter(), 0, 0)]  # when, bytes found, rounds of work
    try:
        while marks[-1][1] < nbytes and (marks[-1][0] - marks[0][0] < seconds or not marks[-1][1]):
            work()
            found_bytes = sum(finder.found_bytes for finder in finders)
            marks.append((time.perf_counter(), found_bytes, len(marks)))
    finally:
        for finder in finders:
            finder.close()
        slab.close()
    half_s = (marks[0][0] + marks[-1][0]) / 2
    end_s, end_bytes, end_rounds = marks[-1]
    begin_s, begin_bytes, begin_rounds = next(
        mark for mark in reversed(marks[:-1]) if mark[0] <= half_s and mark[1] < end_bytes
    )
    elapsed_s = end_s - begin_s
    added_s = max(elapsed_s - (end_rounds - begin_rounds) * alone_s, _LEAST_ADDED * elapsed_s)
    return (end_bytes - begin_bytes) / max(added_s, 1e-9)


def measure_chunk_overhead(paths: Sequence[Path], seconds: float = 0.05) -> float | None:
    """What the calling thread works to fetch, lease and evict one chunk, its waits aside; None without a file."""
    reads = ranges(paths, PAGE)[:_NUM_CHUNKS]
    if not reads:
        return None
    chunks = tuple(
        Chunk(ChunkId(at), (at,), (), (Read(read.file, read.offset, PAGE, 0, PAGE),), (), PAGE, PAGE)
        for at, read in enumerate(reads)
    )
    placement = Placement(Tier.HOST, (Tier.DISK,) * len(chunks), 2, PAGE, 0, 1)
    manager = open_manager(ChunkTable(tuple(paths), chunks), placement, Budget(host=2 * PAGE))

    def one_pass() -> float:
        begin_s = time.thread_time()
        for at, chunk in enumerate(chunks):
            manager.prefetch(chunk.id)
            if at + 1 < len(chunks):
                manager.prefetch(chunks[at + 1].id)
            manager.lease(chunk.id).release()
            manager.evict(chunk.id)
        return (time.thread_time() - begin_s) / len(chunks)

    try:
        end_s, times = time.perf_counter() + seconds, [one_pass()]
        while time.perf_counter() < end_s:
            times.append(one_pass())
    finally:
        manager.close()
    return typical(times)
