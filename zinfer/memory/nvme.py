"""Read weights from disk in the background.  In: chunks and where they go.  Out: their bytes, checked and in place."""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from ctypes import memmove, memset
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from zinfer.checkpoint.read import opened
from zinfer.chunks.table import HUGE_PAGE, PAGE, PIECE_BYTES, Read
from zinfer.errors import IntegrityError, InternalError, MachineError
from zinfer.log import logger
from zinfer.memory.crowd import CROWD
from zinfer.memory.links import LinkLog, Movement, Pace, Ticket, sleep_until, started_pool
from zinfer.memory.pinning import no_entry
from zinfer.units import round_up

IN_FLIGHT = 4  # four reads of 16 MiB reach the disk's own rate
_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)

Verify: TypeAlias = Literal["always", "off"]
Octets: TypeAlias = npt.NDArray[np.uint8]
Landed: TypeAlias = Callable[[BaseException | None], None]


@dataclass(slots=True)
class _File:
    path: Path
    fd: int
    is_direct: bool


@dataclass(slots=True)
class _Fetch:
    """One chunk on its way; its pieces end in any order and the last one to end finishes it."""

    ticket: Ticket
    into_N: Octets
    landed: Landed
    remaining: int
    begin_s: float = 0.0
    num_bytes: int = 0
    error: BaseException | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class _SwitchInterval:
    """How long a busy thread may keep the interpreter: short while any reader is open, as it was afterwards.

    A read returns without the interpreter's lock; with the usual 5 ms it then waits longer than it read.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._before_s, self._holders = seconds, 0.0, 0
        self._lock = threading.Lock()

    def hold(self) -> None:
        with self._lock:
            if self._holders == 0:
                self._before_s = sys.getswitchinterval()
                sys.setswitchinterval(self._seconds)
            self._holders += 1

    def let_go(self) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders == 0:
                sys.setswitchinterval(self._before_s)


SWITCH_INTERVAL = _SwitchInterval(5e-4)


class Files:
    """Weight files, opened when first read and until close(), read directly where that is wanted and possible.

    Elsewhere through the page cache, dropping behind itself, which is announced once.  Used from many threads.
    """

    def __init__(self, paths: Sequence[Path], *, wants_direct: bool = True) -> None:
        self.paths = tuple(paths)
        self._wants_direct = wants_direct
        self._files: dict[int, _File] = {}
        self._lock = threading.RLock()
        self._is_announced = False
        self._closing = ExitStack()
        for holdable in (SWITCH_INTERVAL, CROWD):
            self._closing.callback(holdable.let_go)
            holdable.hold()

    def close(self) -> None:
        """Close the files.  May be called again."""
        self._closing.close()
        self._files.clear()

    def fill(self, number: int, into_N: Octets, offset: int, valid: int, what: str) -> int:
        """Read file `number` from a PAGE-aligned offset until `valid` bytes are there; `what` is for messages.

        Returns how many came, which may be more, up to the page's end.  Raises MachineError ZI-5321 for a read that
        fails, IntegrityError ZI-6102 for a file that ends early, and what opening a file raises.
        """
        file, done = self._opened(number), 0
        while done < valid:
            was_direct = file.is_direct  # another thread may find out first
            try:
                count = os.preadv(file.fd, [into_N[done:].data], offset + done)
            except OSError as error:
                if error.errno in _NOT_DIRECT and was_direct:
                    self._give_up_direct(file, str(error.strerror))
                    continue
                raise MachineError(
                    "ZI-5321",
                    f"{file.path}: {what}, bytes {offset + done} to {offset + valid}, cannot be read: {error.strerror}",
                    remedy="dmesg | tail   # what the kernel says about the disk",
                ) from error
            if count == 0:
                raise IntegrityError(
                    "ZI-6102",
                    f"{file.path} ends at byte {offset + done}, {what} reaches to byte {offset + valid}",
                    remedy=f"ls -l {shlex.quote(str(file.path))}   # it was cut short while in use: fetch it again",
                )
            if not file.is_direct:
                os.posix_fadvise(file.fd, offset + done, count, os.POSIX_FADV_DONTNEED)
            done += count
            if done < valid and file.is_direct and done % PAGE:
                # A direct read can only go on from a page's border; one that gets nowhere cannot go on at all.
                if count < PAGE:
                    self._give_up_direct(file, "it returns less than a page")
                else:
                    done -= done % PAGE
        return done

    def _opened(self, number: int) -> _File:
        with self._lock:
            file = self._files.get(number)
            if file is None:
                path = self.paths[number]
                file = _File(path, self._closing.enter_context(opened(path)), is_direct=self._wants_direct)
                try:
                    if file.is_direct:
                        flags = fcntl.fcntl(file.fd, fcntl.F_GETFL)
                        fcntl.fcntl(file.fd, fcntl.F_SETFL, flags | os.O_DIRECT)
                except OSError as error:
                    if error.errno not in _NOT_DIRECT:
                        raise
                    self._give_up_direct(file, str(error.strerror))
                self._files[number] = file
            return file

    def _give_up_direct(self, file: _File, reason: str) -> None:
        """Through the page cache from now on; other threads' reads of the same descriptor go on undisturbed.

        The descriptor first, the word of it last: who sees that the file is not direct may read from any byte.
        """
        with self._lock:
            fcntl.fcntl(file.fd, fcntl.F_SETFL, fcntl.fcntl(file.fd, fcntl.F_GETFL) & ~os.O_DIRECT)
            file.is_direct = False
            if not self._is_announced:
                logger.warning(
                    "%s allows no direct reads (%s): reading through the page cache", file.path, reason
                )
            self._is_announced = True


class Reader:
    """Reads chunks in its own threads: pieces in the order of issue, IN_FLIGHT at a time.

    Writes only into the places it was given, from `begin` until `landed` is called (in one of its threads).  `pace`
    slows the disk down to a simulated one; `enter` is what its threads do first.
    """

    def __init__(
        self,
        files: Files,
        log: LinkLog,
        *,
        verify: Verify = "always",
        pace: Pace | None = None,
        enter: Callable[[], None] = no_entry,
    ) -> None:
        self._files = files
        self._log = log
        self._verify = verify == "always"
        self._pace = pace
        CROWD.enter()
        self._pool = started_pool(IN_FLIGHT, "zinfer-read", enter)

    def begin(self, ticket: Ticket, into_N: Octets, landed: Landed) -> None:
        """Read a ticket's chunk into its place (PAGE-aligned, `chunk.nbytes` long); never blocks.

        `landed(error)` follows once: None, MachineError ZI-5321 for a read that failed, IntegrityError ZI-6101 for
        a wrong checksum or ZI-6102 for a file that ends early, ZI-5301 for a cancelled ticket.
        """
        CROWD.enter()
        pieces = list(joined(ticket.chunk.reads))
        fetch = _Fetch(ticket, into_N, landed, len(pieces))
        if not pieces:
            landed(None)
        number = 0  # of the piece's first read
        for piece in pieces:
            due_s = self._pace.reserve(sum(read.nbytes for read in piece)) if self._pace else 0.0
            self._pool.submit(self._piece, fetch, number, piece, due_s)
            number += len(piece)

    def close(self) -> None:
        """End the threads after what they were asked for.  May be called again."""
        self._pool.shutdown()

    def _piece(self, fetch: _Fetch, number: int, piece: Sequence[Read], due_s: float) -> None:
        try:
            fetch.begin_s = fetch.begin_s or time.perf_counter()
            if fetch.error is None:
                fetch.ticket.refuse_if_cancelled()
                self._read(fetch, number, piece)
                sleep_until(due_s)
        except BaseException as error:
            fetch.error = fetch.error or error
        with fetch.lock:
            fetch.remaining -= 1
            if fetch.remaining:
                return
        try:
            self._finish(fetch)
        except BaseException as error:
            fetch.error = fetch.error or error
        fetch.landed(fetch.error)

    def _read(self, fetch: _Fetch, number: int, piece: Sequence[Read]) -> None:
        """One request of the disk; what was hashed by itself is checked by itself."""
        first, last = piece[0], piece[-1]
        place_N = fetch.into_N[first.at : last.at + last.nbytes]
        if len(place_N) < last.at + last.nbytes - first.at:
            raise InternalError(
                "ZI-0132", f"chunk {fetch.ticket.chunk.id} is read beyond its {len(fetch.into_N)} bytes"
            )
        _find_pages(place_N)
        blocks = [f"block {at} of chunk {fetch.ticket.chunk.id}" for at in range(number, number + len(piece))]
        valid = last.at + last.valid - first.at
        num_bytes = self._files.fill(first.file, place_N, first.offset, valid, blocks[0])
        with fetch.lock:
            fetch.num_bytes += num_bytes
        for block, read in zip(blocks, piece, strict=True):
            if self._verify and read.digest is not None:
                at = read.at - first.at
                digest = xxhash.xxh3_64_intdigest(place_N[at : at + read.valid].data)
                if digest != read.digest:
                    raise corrupt(self._files.paths[read.file], read, block, digest)

    def _finish(self, fetch: _Fetch) -> None:
        chunk = fetch.ticket.chunk
        base = fetch.into_N.ctypes.data
        for move in chunk.moves if fetch.error is None else ():
            if max(move.source, move.target) + move.nbytes > len(fetch.into_N):
                raise InternalError(
                    "ZI-0132", f"chunk {chunk.id} is moved beyond its {len(fetch.into_N)} bytes"
                )
            memmove(base + move.target, base + move.source, move.nbytes)  # without the interpreter's lock
        self._log.add(Movement("disk", chunk.id, fetch.num_bytes, fetch.begin_s, time.perf_counter()))


def _find_pages(place_N: Octets) -> None:
    """A store into each huge page that a read is about to fill.

    Where the memory is fresh the processor finds its pages now.  The kernel would do that for a direct read under the
    lock of the whole address space, and every product whose kernel is compiled, every thread's stack would wait.
    """
    begin = place_N.ctypes.data
    for address in (begin, *range(round_up(begin + 1, HUGE_PAGE), begin + len(place_N), HUGE_PAGE)):
        memset(address, 0, 1)  # without the interpreter's lock


def joined(reads: Sequence[Read]) -> Iterator[list[Read]]:
    """Reads that continue each other in the file and in the chunk, up to PIECE_BYTES together.

    A store's reads end where its blocks do, which are small where weights are: a disk is slower for small requests.
    """
    piece: list[Read] = []
    for read in reads:
        last = piece[-1] if piece else read
        goes_on = (
            (read.file, read.offset, read.at) == (last.file, last.offset + last.nbytes, last.at + last.nbytes)
            and last.valid == last.nbytes  # what is not valid lies beyond the end of the file
            and read.at + read.nbytes - piece[0].at <= PIECE_BYTES
        )
        if piece and not goes_on:
            yield piece
            piece = []
        piece.append(read)
    if piece:
        yield piece


def corrupt(path: Path, read: Read, what: str, digest: int) -> IntegrityError:
    """The refusal for bytes that are not those that were written."""
    return IntegrityError(
        "ZI-6101",
        f"{path}: {what}, bytes {read.offset} to {read.offset + read.valid}, has XXH3 {digest:016x}, "
        f"{read.digest or 0:016x} was written",
        remedy=f"zinfer verify {shlex.quote(str(path.parent))}   # then write the store again",
    )
