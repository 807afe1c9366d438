"""What of an unfinished work is safely on disk.  In: records, one by one.  Out: those that a crash left intact."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from xxhash import xxh3_64_hexdigest

from zinfer.chunks.disk import Disk
from zinfer.errors import UsageError

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Refusals:
    """How a second writer is refused, and somebody else's journal, by its path and its first record."""

    busy: Callable[[Path], UsageError]
    foreign: Callable[[Path, Record], UsageError]


class Journal:
    """An append-only file of JSON lines, each with its own hash in front; durable when `append` returns.

    A line that a crash cut short, and whatever stands behind it, is dropped when the journal is opened.  The first
    line says whose work this is: its `identity`, any JSON value.  `take` is given every other intact record, oldest
    first, and says whether what it tells still holds: the first one that does not is dropped with all behind it.
    Without `take` they are kept in `records`.  Holds a lock on the file until close: one writer at a time.
    """

    def __init__(
        self,
        path: Path,
        identity: Any,
        disk: Disk,
        *,
        refusals: Refusals | None = None,
        take: Callable[[Record], bool] | None = None,
    ) -> None:
        """Open or begin.  Raises what `refusals` say, of a store ZI-3003 (another writer), ZI-3001 (another model)."""
        refusals = refusals or STORE
        self.disk = disk
        self.records: list[Record] = []
        self._keeps = take is None
        self._end = 0
        self._fd = disk.open(path)
        try:
            if not disk.lock(self._fd):
                raise refusals.busy(path)
            with path.open("rb") as file:
                first = _next_record(file)
                if first is not None:
                    if first != {"identity": identity}:
                        raise refusals.foreign(path, first)
                    self._end = file.tell()
                    self._read(file, take or self._keep)
            disk.truncate(self._fd, self._end)
            if first is None:
                self._append({"identity": identity})
                disk.sync_folder(path.parent)
        except BaseException:
            self.close()
            raise

    def append(self, *records: Record) -> None:
        """Add records; returns when they are on disk."""
        self._append(*records)
        if self._keeps:
            self.records += records

    def close(self) -> None:
        """Let go of the file and its lock."""
        os.close(self._fd)

    def _append(self, *records: Record) -> None:
        lines = b"".join(_line(record) for record in records)
        self.disk.write_all(self._fd, lines, self._end)
        self.disk.sync(self._fd)
        self._end += len(lines)

    def _read(self, file: BinaryIO, take: Callable[[Record], bool]) -> None:
        while (record := _next_record(file)) is not None and take(record):
            self._end = file.tell()

    def _keep(self, record: Record) -> bool:
        self.records.append(record)
        return True


def occupied(folder: Path, what: str, *, is_ours: bool = True) -> UsageError:
    """The refusal to write a store over something else; only what zinfer wrote is it said how to remove."""
    remedy = f"--out {shlex.quote(f'{folder}-zinfer')}"
    remedy += f", or: rm -r {shlex.quote(str(folder))}" if is_ours else ""
    return UsageError("ZI-3001", f"{folder} {what}", remedy=remedy)


def _line(record: Record) -> bytes:
    text = json.dumps(record, separators=(",", ":"))
    return f"{xxh3_64_hexdigest(text.encode())} {text}\n".encode()


def _next_record(file: BinaryIO) -> Record | None:
    """The record at the file's position; None at the end and where a line is damaged."""
    line = file.readline()
    digest, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or xxh3_64_hexdigest(text).encode() != digest:
        return None
    record: Record = json.loads(text)
    return record


def _busy(path: Path) -> UsageError:
    return UsageError(
        "ZI-3003",
        f"another process is writing the store {path.parent}",
        remedy=f"wait for it; who it is: fuser -v {shlex.quote(str(path))}",
    )


def _foreign(path: Path, _first: Record) -> UsageError:
    return occupied(path.parent, "holds an unfinished store of another model, or of changed files")


STORE = Refusals(_busy, _foreign)
