"""Positioned reads of files that are safe to open.  In: a path and ranges.  Out: bytes.  Not the hot path."""

from __future__ import annotations

import hashlib
import os
import shlex
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from zinfer.errors import CheckpointError, MachineError

BLOCK_BYTES = 16 * 2**20

Advance = Callable[[int], None]  # told how many more bytes are done


def regular_size(path: Path) -> int:
    """Size of a regular file in bytes, asked without opening it: opening a fifo blocks, a device may act.

    Raises CheckpointError ZI-4012 for anything but a regular file, MachineError ZI-5041 where it cannot look.
    """
    try:
        status = path.lstat()
    except OSError as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise _not_regular(path)
    return status.st_size


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A read-only descriptor of a regular file (no link in its last component), closed at the end.

    Raises as `regular_size`.  The second look is at what was opened: the name may change in between.
    """
    regular_size(path)
    try:
        # O_NONBLOCK: should a fifo slip in, the open returns and the second look refuses it.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise _not_regular(path)
        yield fd
    finally:
        os.close(fd)


def read_into(fd: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill `view` from `offset` on.  Raises CheckpointError ZI-4101 at an early end, MachineError ZI-5041."""
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise unreadable(path, error) from error
        if count == 0:
            raise CheckpointError(
                "ZI-4101",
                f"{path}: ends at byte {offset + done}, {len(view) - done} bytes were still wanted",
                remedy=f"ls -l {shlex.quote(str(path))}   # it was changed or cut short: fetch it again",
            )
        done += count


def read_range(path: Path, offset: int, nbytes: int) -> bytes:
    """Bytes [offset, offset + nbytes) of a regular file; raises as `opened` and `read_into`."""
    buffer = bytearray(nbytes)
    with opened(path) as fd:
        read_into(fd, memoryview(buffer), offset, path)
    return bytes(buffer)


def read_blocks(path: Path, offset: int, nbytes: int, block_bytes: int = BLOCK_BYTES) -> Iterator[memoryview]:
    """The range in blocks of at most `block_bytes`, all views of one buffer: each is valid until the next."""
    buffer = memoryview(bytearray(min(block_bytes, nbytes)))
    with opened(path) as fd:
        for at in range(0, nbytes, block_bytes):
            view = buffer[: min(block_bytes, nbytes - at)]
            read_into(fd, view, offset + at, path)
            yield view


def sha256_file(path: Path, advance: Advance = lambda _: None) -> str:
    """Hex SHA-256 of a whole file, for provenance; `advance` hears of every block."""
    digest = hashlib.sha256()
    for view in read_blocks(path, 0, regular_size(path)):
        digest.update(view)
        advance(len(view))
    return digest.hexdigest()


def unreadable(path: Path, error: OSError) -> MachineError:
    """The refusal for a file that the system will not let us read."""
    return MachineError(
        "ZI-5041",
        f"{path} cannot be read: {error.strerror or error}",
        remedy=f"ls -l {shlex.quote(str(path))}   # is it there, and yours to read?",
    )


def _not_regular(path: Path) -> CheckpointError:
    return CheckpointError(
        "ZI-4012",
        f"{path} is not a regular file, so it was not opened",
        remedy=f"ls -ld {shlex.quote(str(path))}   # a model folder holds plain files",
    )
