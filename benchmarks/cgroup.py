"""A memory limit from outside.  In: a number of bytes.  Out: a memory control group that a child can be started in.

Works with version 1 and 2 of the kernel's interface, and changes nothing of the groups that are there: it makes one
group below the caller's own or, where that cannot limit memory, below the nearest ancestor that can.  The group
counts page cache as well as the child's own memory, which is the point; files cached before on another group's
account do not count, so caches are dropped before a run.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

LIMIT = {1: "memory.limit_in_bytes", 2: "memory.max"}
PEAK = {1: "memory.max_usage_in_bytes", 2: "memory.peak"}
SWAP = {1: "memory.memsw.limit_in_bytes", 2: "memory.swap.max"}
JOIN = 'echo $$ > "$0" && exec "$@"'


class NoGroupError(RuntimeError):
    """No memory group can be made here; the text says why."""


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """One group of our own.  `limit_bytes` holds for everything that is started through `enter`."""

    folder: Path
    version: int
    limit_bytes: int

    def enter(self, command: list[str]) -> list[str]:
        """The command that joins the group and then becomes `command`, in the same process."""
        return ["/bin/sh", "-c", JOIN, str(self.folder / "cgroup.procs"), *command]

    def peak_bytes(self) -> int | None:
        """The most the group has held at once, page cache included; None where the kernel does not say."""
        with suppress(OSError, ValueError):
            return int((self.folder / PEAK[self.version]).read_text())
        return None

    def remove(self) -> None:
        """End what is left inside and remove the group.  Raises OSError if it stays occupied for 5 seconds."""
        for pid in (self.folder / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        for _ in range(100):
            with suppress(OSError):
                self.folder.rmdir()
                return
            time.sleep(0.05)
        self.folder.rmdir()


def hierarchies(mounts: str, own: str) -> list[tuple[int, Path, Path]]:
    """(version, mount point, the caller's group in it) for each hierarchy that may limit memory.

    `mounts` is the text of /proc/self/mounts, `own` that of /proc/self/cgroup.
    """
    groups = {}
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            groups[1 if controllers else 2] = path.lstrip("/")
    found = []
    for line in mounts.splitlines():
        _, point, kind, options, *_ = line.split()
        version = 2 if kind == "cgroup2" else 1 if kind == "cgroup" and "memory" in options.split(",") else 0
        if version in groups:
            found.append((version, Path(point), Path(point) / groups[version]))
    return found


def try_below(parent: Path, version: int, limit_bytes: int) -> MemoryGroup:
    """A limited group below `parent`.  Raises OSError, leaving nothing behind, if it cannot be made or limited."""
    for left in parent.glob("benchmark-*-*"):  # by a run that was killed and could not clean up
        if not Path("/proc", left.name.split("-")[1]).exists():
            with suppress(OSError):
                left.rmdir()
    folder = parent / f"benchmark-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    try:
        # Opening for reading and writing, never creating: on a hierarchy without the controller it is not there.
        with open(folder / LIMIT[version], "r+") as file:
            file.write(str(limit_bytes))
        swap = str(limit_bytes) if version == 1 else "0"  # version 1 counts memory and swap together
        with suppress(OSError), open(folder / SWAP[version], "r+") as file:
            file.write(swap)
        os.close(os.open(folder / "cgroup.procs", os.O_WRONLY))
    except OSError:
        folder.rmdir()
        raise
    return MemoryGroup(folder, version, limit_bytes)


def make(limit_bytes: int) -> MemoryGroup:
    """A new group of at most `limit_bytes`.  Raises NoGroupError with what was tried."""
    tried = []
    try:
        known = hierarchies(Path("/proc/self/mounts").read_text(), Path("/proc/self/cgroup").read_text())
    except OSError as error:
        raise NoGroupError(f"control groups cannot be read: {error}") from None
    for version, point, own in known:
        parent = own if own.is_dir() and ".." not in own.parts else point
        while True:
            try:
                return try_below(parent, version, limit_bytes)
            except OSError as error:
                tried.append(f"version {version}: {error.strerror}")
            if parent == point:
                break
            parent = parent.parent
    why = "; ".join(dict.fromkeys(tried)) or "none is mounted"
    raise NoGroupError(f"no memory control group can be made ({why})")


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """A group for the time of a `with` block, removed whatever happens in it."""
    group = make(limit_bytes)
    try:
        yield group
    finally:
        group.remove()


def drop_caches(switch: Path = Path("/proc/sys/vm/drop_caches")) -> str:
    """Empty the page cache of the whole machine; "dropped", or why it could not be (it takes root)."""
    os.sync()
    try:
        with open(os.open(switch, os.O_WRONLY), "w") as file:
            file.write("3")
    except OSError as error:
        return f"not dropped: {error.strerror}"
    return "dropped"
