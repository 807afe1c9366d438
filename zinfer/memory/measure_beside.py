"""What reading costs beside computing.  In: files to read, work to do.  Out: how much each slows, seconds per chunk."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from zinfer.chunks.table import HUGE_PAGE, PAGE, PIECE_BYTES, Chunk, ChunkId, ChunkTable, Read
from zinfer.config.machine import Overlap
from zinfer.memory.ahead import Ahead
from zinfer.memory.assemble import open_manager
from zinfer.memory.crowd import CROWD
from zinfer.memory.measure_disk import ReadLoad, ranges
from zinfer.memory.measure_links import typical, typical_seconds
from zinfer.memory.slab import HostSlab
from zinfer.plan.records import Budget, Placement, Tier
from zinfer.units import round_up

_MOST = 4.0  # a slowdown beyond this was somebody else's work
_NUM_CHUNKS = 16
_TURN_S = 0.3  # of measuring overlap: some rounds of reads alone, some beside work
_FINDERS = 2  # of pages, at once in a first pass: the engine's own, and a reader
_LEAST_ADDED = 0.05  # of the time beside a finder of pages: noise must not make fresh memory cost nothing
_WAIT_S, _MOST_WAITS = 0.01, 20


def measure_overlap(paths: Sequence[Path], work: Callable[[], object], seconds: float) -> Overlap:
    """`work` alone, reads alone and both at once, in turns, since disk and processor have changed a second later.

    Both at once as in a streamed pass: products that wait for each other do not spin then (`memory.crowd`).  Medians,
    for what somebody else takes meets one side of a turn and not the other.
    """
    reads = ranges(paths, PIECE_BYTES)
    if not reads:
        return Overlap()
    turns = max(int(seconds / _TURN_S), 1)
    read_s: list[float] = []
    work_s: list[float] = []
    read_beside_s: list[float] = []
    work_beside_s: list[float] = []
    with ReadLoad(paths) as load, ThreadPoolExecutor(1, "zinfer-probe") as pool:
        CROWD.hold()
        try:
            for _ in range(turns):
                _until_cores_spin()
                work_s += _times(work, seconds / turns / 4)
                read_s += load.round_seconds(reads, seconds / turns / 4)
                reading = pool.submit(load.round_seconds, reads, seconds / turns / 2)
                times: list[float] = []
                while not reading.done():
                    CROWD.enter()
                    begin_s = time.perf_counter()
                    work()
                    times.append(time.perf_counter() - begin_s)
                read_beside_s += reading.result()
                work_beside_s += times[:-1] or times  # the last one may have outlived the reads
        finally:
            CROWD.let_go()
    return Overlap(
        disk=_slowdown(median(read_beside_s), median(read_s)),
        compute=_slowdown(median(work_beside_s or work_s), median(work_s)),
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
    there and costs nothing, so the first half of the time is not counted; it ends with `nbytes`.
    """
    alone_s = typical_seconds(work, seconds / 4)
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


def _slowdown(beside_s: float, alone_s: float) -> float:
    return min(max(beside_s / alone_s, 1.0), _MOST)
