"""Read embedding rows from disk.  In: a row table and ids.  Out: their bytes, in that order, whatever the repeats."""

from __future__ import annotations

import mmap
import queue
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from zinfer.chunks.table import PAGE, Read, RowTable
from zinfer.errors import InternalError
from zinfer.memory.links import LinkLog, Movement, Pace, sleep_until, started_pool
from zinfer.memory.nvme import IN_FLIGHT, Files, Octets, corrupt
from zinfer.plan.profile import ROW_STAGING_BYTES
from zinfer.units import round_up

WINDOW_BYTES = (
    ROW_STAGING_BYTES // IN_FLIGHT
)  # one read; the plan counts all the memory that rows pass through


@dataclass(slots=True)
class _Window:
    """A PAGE-aligned beginning, the end of what is wanted, (file offset, bytes, row, column) of what lies between."""

    begin: int
    end: int
    parts: list[tuple[int, int, int, int]]


class RowReader:
    """Small direct reads by threads of their own, so that what a pass needs first does not queue behind look-ahead.

    `blocks` are checksummed ranges of the files, per table: before rows are taken from one for the first time it is
    read as a whole and checked.  Later damage to it is not noticed.
    """

    def __init__(
        self,
        files: Files,
        log: LinkLog,
        *,
        blocks: Mapping[str, Sequence[Read]] | None = None,
        pace: Pace | None = None,
    ) -> None:
        self._files = files
        self._log = log
        self._pace = pace
        self._unchecked = {name: set(reads) for name, reads in (blocks or {}).items()}
        self._pool = started_pool(IN_FLIGHT, "zinfer-rows")
        self._buffers: queue.SimpleQueue[Octets] = queue.SimpleQueue()
        for _ in range(IN_FLIGHT):
            memory = mmap.mmap(-1, WINDOW_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._buffers.put(np.frombuffer(memory, dtype=np.uint8))

    def read(self, table: RowTable, ids: npt.NDArray[np.int64]) -> Octets:
        """Rows by id: uint8 [len(ids), row_bytes].  Each is read once, neighbours together; blocks until there.

        Raises MachineError ZI-5321, IntegrityError ZI-6101 or ZI-6102, and InternalError ZI-0131 for an id that the
        table does not have.
        """
        rows_NB = np.empty((len(ids), table.row_bytes), dtype=np.uint8)
        if not len(ids):
            return rows_NB
        unique, places = np.unique(ids, return_inverse=True)
        if unique[0] < 0 or unique[-1] >= table.num_rows:
            raise InternalError(
                "ZI-0131", f"{table.name} has {table.num_rows} rows; {unique[0]} to {unique[-1]} are wanted"
            )
        users = np.split(np.argsort(places, kind="stable"), np.cumsum(np.bincount(places))[:-1])
        windows = list(_windows(table, unique.tolist()))
        self._check_blocks(table, windows)
        if len(windows) == 1:
            self._fetch(table, windows[0], rows_NB, users)  # no other thread is faster
        else:
            turns, num_jobs = iter(windows), min(IN_FLIGHT, len(windows))
            for job in [
                self._pool.submit(self._fetch_all, table, turns, rows_NB, users) for _ in range(num_jobs)
            ]:
                job.result()
        return rows_NB

    def close(self) -> None:
        """End the threads.  May be called again."""
        self._pool.shutdown()
        while not self._buffers.empty():
            self._buffers.get()

    def _fetch_all(
        self,
        table: RowTable,
        turns: Iterator[_Window],
        rows_NB: Octets,
        users: Sequence[npt.NDArray[np.int64]],
    ) -> None:
        """One window after the other, in turn with other threads: a job for each would cost more than its read."""
        for window in turns:
            self._fetch(table, window, rows_NB, users)

    def _fetch(
        self, table: RowTable, window: _Window, rows_NB: Octets, users: Sequence[npt.NDArray[np.int64]]
    ) -> None:
        for at, window_N in self._stream(table.file, window.begin, window.end, f"rows of {table.name}"):
            for offset, nbytes, row, column in window.parts:
                part_N = window_N[offset - at : offset - at + nbytes]
                rows_NB[users[row], column : column + nbytes] = part_N

    def _check_blocks(self, table: RowTable, windows: Sequence[_Window]) -> None:
        unchecked = self._unchecked.get(table.name)
        if unchecked:
            touched = [
                block
                for block in unchecked
                if block.file == table.file
                and any(
                    window.begin < block.offset + block.valid and block.offset < window.end
                    for window in windows
                )
            ]
            for block, job in [(block, self._pool.submit(self._check, table, block)) for block in touched]:
                job.result()
                unchecked.discard(block)

    def _check(self, table: RowTable, block: Read) -> None:
        what = f"the block at byte {block.offset} of {table.name}"
        hasher = xxhash.xxh3_64()
        for _, window_N in self._stream(block.file, block.offset, block.offset + block.valid, what):
            hasher.update(window_N.data)
        if hasher.intdigest() != block.digest:
            raise corrupt(self._files.paths[block.file], block, what, hasher.intdigest())

    def _stream(self, file: int, begin: int, end: int, what: str) -> Iterator[tuple[int, Octets]]:
        """Yield (offset, bytes) of the range, WINDOW_BYTES at a time, in a buffer that the next turn overwrites."""
        buffer_N = self._buffers.get()
        try:
            for at in range(begin, end, WINDOW_BYTES):
                begin_s = time.perf_counter()
                valid = min(WINDOW_BYTES, end - at)
                due_s = self._pace.reserve(round_up(valid, PAGE)) if self._pace else 0.0
                num_bytes = self._files.fill(file, buffer_N[: round_up(valid, PAGE)], at, valid, what)
                sleep_until(due_s)
                self._log.add(Movement("disk", None, num_bytes, begin_s, time.perf_counter()))
                yield at, buffer_N[:valid]
        finally:
            self._buffers.put(buffer_N)


def _windows(table: RowTable, ids: Sequence[int]) -> Iterator[_Window]:
    """Group ascending rows into reads of at most WINDOW_BYTES; a row that is longer is cut."""
    longest = WINDOW_BYTES - 2 * PAGE
    window: _Window | None = None
    for row, row_id in enumerate(ids):
        for column in range(0, table.row_bytes, longest):
            offset = table.offset + row_id * table.row_bytes + column
            nbytes = min(longest, table.row_bytes - column)
            begin, end = offset - offset % PAGE, offset + nbytes
            is_near = window is not None and begin <= round_up(window.end, PAGE)
            if window is None or not is_near or round_up(end, PAGE) - window.begin > WINDOW_BYTES:
                if window is not None:
                    yield window
                window = _Window(begin, end, [])
            window.end = end
            window.parts.append((offset, nbytes, row, column))
    if window is not None:
        yield window
