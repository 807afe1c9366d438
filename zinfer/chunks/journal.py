"""What of an unfinished store is safely on disk.  In: records, one by one.  Out: those that a crash left intact."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest

from zinfer.chunks.disk import Disk
from zinfer.errors import UsageError

Record = dict[str, Any]


class Journal:
    """An append-only file of JSON lines, each with its own hash in front; durable when `append` returns.

    A line that a crash cut short, and whatever stands behind it, is dropped when the journal is opened.  The first
    line says whose store this is.  Holds a lock on the file until close: one writer at a time.
    """

    def __init__(self, path: Path, identity: str, disk: Disk) -> None:
        """Open or begin.  Raises UsageError ZI-3003 (another writer is here), ZI-3001 (another model's store)."""
        self.disk = disk
        self.records: list[Record] = []
        self._fd = disk.open(path)
        try:
            if not disk.lock(self._fd):
                raise UsageError(
                    "ZI-3003",
                    f"another process is writing the store {path.parent}",
                    remedy=f"wait for it; who it is: fuser -v {shlex.quote(str(path))}",
                )
            intact, self._end = _intact(path.read_bytes())
            if intact and intact[0] != {"identity": identity}:
                raise occupied(path.parent, "holds an unfinished store of another model, or of changed files")
            disk.truncate(self._fd, self._end)
            if not intact:
                self.append({"identity": identity})
                disk.sync_folder(path.parent)
            self.records = intact[1:]
        except BaseException:
            self.close()
            raise

    def append(self, *records: Record) -> None:
        """Add records; returns when they are on disk."""
        lines = b"".join(_line(record) for record in records)
        self.disk.write_all(self._fd, lines, self._end)
        self.disk.sync(self._fd)
        self._end += len(lines)
        self.records += records

    def close(self) -> None:
        """Let go of the file and its lock."""
        os.close(self._fd)


def occupied(folder: Path, what: str) -> UsageError:
    """The refusal to write a store over something else."""
    where = shlex.quote(str(folder))
    return UsageError("ZI-3001", f"{folder} {what}", remedy=f"choose another --out, or: rm -r {where}")


def _line(record: Record) -> bytes:
    text = json.dumps(record, separators=(",", ":"))
    return f"{xxh3_64_hexdigest(text.encode())} {text}\n".encode()


def _intact(raw: bytes) -> tuple[list[Record], int]:
    """The records up to the first damaged line, and where they end."""
    records: list[Record] = []
    end = 0
    for line in raw.splitlines(keepends=True):
        digest, _, text = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or xxh3_64_hexdigest(text).encode() != digest:
            break
        records.append(json.loads(text))
        end += len(line)
    return records, end
