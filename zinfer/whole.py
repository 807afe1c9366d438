"""Files that appear whole or not at all.  In: a path, bytes as they come.  Out: the file, or one error and no trace."""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from zinfer.errors import MachineError, UsageError


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Begun at once, so that a place that takes no file is found before any work; there when the block has ended.

    A device or a pipe gets the bytes as they come.  Where `path` is a link, what it points to is replaced.
    Raises MachineError ZI-5931; whatever is raised, nothing is left.
    """
    try:
        if path.exists() and not path.is_file():
            with path.open("wb") as file:
                yield file
            return
        target = Path(os.path.realpath(path))
        with _begun(target.with_name(target.name + ".partial")) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(target)
    except OSError as error:
        raise unwritable(path, error) from error


@contextmanager
def _begun(partial: Path) -> Iterator[BinaryIO]:
    with partial.open("wb") as file:
        try:
            yield file
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def refuse_unwritable(path: Path | None) -> None:
    """For what is written at the end of a long work: raises now what `written_whole` would raise then."""
    if path is None:
        return
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not path.exists() or path.is_file():
            target = Path(os.path.realpath(path))
            partial = target.with_name(target.name + ".partial")
            partial.open("wb").close()
            partial.unlink()
    except OSError as error:
        raise unwritable(path, error) from error


def refuse_input_as_output(source: Path | None, target: Path | None) -> None:
    """Raises UsageError ZI-1118 where the results would take the place of what they are made from."""
    with suppress(OSError):
        if source is not None and target is not None and target.samefile(source):
            raise UsageError(
                "ZI-1118",
                f"{target} is the input too: the results would take its place",
                remedy=f"--output {shlex.quote(str(target.with_stem(target.stem + '-results')))}",
            )


def unwritable(path: Path, error: OSError) -> MachineError:
    """The refusal for a place that takes no file."""
    return MachineError(
        "ZI-5931",
        f"{path} cannot be written: {error.strerror or error}",
        remedy=f"ls -ld {shlex.quote(str(path.parent))}; df -h {shlex.quote(str(path.parent))}   "
        "# is it a folder, yours, and has it room?",
    )
