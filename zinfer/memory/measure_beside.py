"""What reading costs beside computing.  In: files to read, work to do.  Out: how much each slows, seconds per chunk."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from zinfer.chunks.table import PAGE, PIECE_BYTES, Chunk, ChunkId, ChunkTable, Read
from zinfer.config.machine import Overlap
from zinfer.memory.assemble import open_manager
from zinfer.memory.crowd import CROWD
from zinfer.memory.measure_links import ReadLoad, ranges, typical, typical_seconds
from zinfer.plan.records import Budget, Placement, Tier

_MOST = 4.0  # a slowdown beyond this was somebody else's work
_NUM_CHUNKS = 16


def measure_overlap(paths: Sequence[Path], work: Callable[[], object], seconds: float) -> Overlap:
    """Reads and `work` alone for a quarter of the time each, then both at once, as in a streamed pass: products that
    wait for each other do not spin then (`memory.crowd`).
    """
    reads = ranges(paths, PIECE_BYTES)
    if not reads:
        return Overlap()
    with ReadLoad(paths) as load, ThreadPoolExecutor(1, "zinfer-probe") as pool:
        read_s, work_s = load.piece_seconds(reads, seconds / 4), typical_seconds(work, seconds / 4)
        times: list[float] = []
        CROWD.hold()
        try:
            CROWD.enter()
            reading = pool.submit(load.piece_seconds, reads, seconds / 2)
            while not reading.done():
                CROWD.enter()
                begin_s = time.perf_counter()
                work()
                times.append(time.perf_counter() - begin_s)
            beside_s = reading.result()
        finally:
            CROWD.let_go()
    whole = times[:-1] or [work_s]  # the last one may have outlived the reads
    return Overlap(disk=_slowdown(beside_s, read_s), compute=_slowdown(typical(whole), work_s))


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
