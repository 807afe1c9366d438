"""The results of a job on disk.  In: result lines as they come.  Out: a file that holds each once, after any crash.

Order of what reaches the disk: result lines, then the journal's word that they are there.  What stands in the
results behind the journal's last word is cut off when the job goes on, and done again.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xxhash import xxh3_64, xxh3_64_hexdigest

from zinfer.chunks.disk import Disk
from zinfer.chunks.journal import Journal, Record, Refusals
from zinfer.errors import UsageError
from zinfer.units import MIB


@dataclass(frozen=True, slots=True)
class Entry:
    """A result on its way to the file: which line of the input it answers, and the line it becomes."""

    line: int
    text: bytes
    is_fault: bool


def journal_path(results: Path) -> Path:
    """Where the journal of these results lies."""
    return results.with_name(f"{results.name}.journal")


class JobOutput:
    """The results file and its journal, open for one job; holds a lock on the journal until close.

    `done[n]` says whether input line n has its result on disk.  Used by one thread at a time.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], num_lines: int, disk: Disk) -> None:
        """Open or begin.

        Raises UsageError ZI-1711 (the file holds something else), ZI-1712 (input, model or settings are others
        than the job began with), ZI-1713 (another process is on it), OSError as the disk does.
        """
        self.path = path
        self.done = bytearray(num_lines + 1)
        self.num_done = self.num_faults = 0
        self.begun_s = 0  # Unix time, the same in every run of the job
        self.num_damaged = 0  # results that were on disk once and are not now; they are made again
        self._disk = disk
        self._end = 0
        if path.exists() and not path.is_file():
            raise UsageError(
                "ZI-1711",
                f"{path} is no file; results are kept in one, so that the job can go on",
                remedy="-o results.jsonl",
            )
        if not journal_path(path).exists() and path.exists() and path.stat().st_size:
            raise UsageError(
                "ZI-1711",
                f"{path} is there already, and is not the output of a job that could go on",
                remedy=f"choose another -o, or: rm {shlex.quote(str(path))}",
            )
        self._fd = disk.open(path)
        try:
            self._journal = Journal(
                journal_path(path),
                identity,
                disk,
                refusals=Refusals(_busy, _differs(identity)),
                take=self._take,
            )
        except BaseException:
            os.close(self._fd)
            raise
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def append(self, entries: Sequence[Entry]) -> None:
        """Add results; returns when they, and the journal's word for them, are on disk.  Raises OSError.

        After an error nothing of them counts: the file is cut back where that can be done.
        """
        raw = b"".join(entry.text for entry in entries)
        record = {
            "end": self._end + len(raw),
            "xxh3": xxh3_64_hexdigest(raw),
            "lines": [entry.line for entry in entries],
            "faults": sum(entry.is_fault for entry in entries),
        }
        try:
            self._disk.write_all(self._fd, raw, self._end)
            self._disk.sync(self._fd)
            self._journal.append(record)
        except OSError:
            self._cut()
            raise
        self._count(record)

    def close(self) -> None:
        """Let go of both files."""
        self._journal.close()
        os.close(self._fd)

    def _begin(self) -> None:
        self._disk.truncate(self._fd, self._end)
        if not self.begun_s:
            self.begun_s = int(time.time())
            self._journal.append({"begun": self.begun_s})

    def _cut(self) -> None:
        with suppress(OSError):  # the next run cuts it before it writes
            self._disk.truncate(self._fd, self._end)

    def _take(self, record: Record) -> bool:
        """One record of an earlier run: whether the results it speaks of are there, byte for byte."""
        if "begun" in record:
            self.begun_s = record["begun"]
            return True
        if self._hash(self._end, record["end"]) != record["xxh3"]:
            self.num_damaged += len(record["lines"])
            return False
        self._count(record)
        return True

    def _count(self, record: Record) -> None:
        self._end = record["end"]
        self.num_done += len(record["lines"])
        self.num_faults += record["faults"]
        for line in record["lines"]:
            self.done[line] = 1

    def _hash(self, start: int, stop: int) -> str:
        digest = xxh3_64()
        while start < stop and (piece := os.pread(self._fd, min(stop - start, MIB), start)):
            digest.update(piece)
            start += len(piece)
        return digest.hexdigest()


def _busy(path: Path) -> UsageError:
    return UsageError(
        "ZI-1713",
        f"another process is writing {path.with_suffix('')}",
        remedy=f"wait for it; who it is: fuser -v {shlex.quote(str(path))}",
    )


def _differs(identity: Mapping[str, Any]) -> Any:
    """The refusal to go on with a job that began with something else, which names what."""

    def refuse(path: Path, first: Record) -> UsageError:
        begun = first.get("identity")
        begun = begun if isinstance(begun, dict) else {}
        names = [name for name in {**identity, **begun} if identity.get(name) != begun.get(name)]
        what = ", ".join(f"{name} was {begun.get(name)!r}, is {identity.get(name)!r}" for name in names)
        results = path.with_suffix("")
        both = f"{shlex.quote(str(results))} {shlex.quote(str(path))}"
        return UsageError(
            "ZI-1712",
            f"{results} was begun with something else: {what}",
            remedy=f"give what it was begun with, choose another -o, or begin anew: rm {both}",
        )

    return refuse
