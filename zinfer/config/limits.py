"""How much memory this process may use.  In: /proc and the cgroup files.  Out: the smallest of all limits."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 2**60  # cgroup v1 writes "no limit" as a number of this order


@dataclass(frozen=True, slots=True)
class MemoryLimits:
    """Bytes; `total` is the machine's memory clamped by every cgroup above us, `available` what is free of that."""

    total: int
    available: int
    binding: str  # which limit gave `total`: "machine", or the cgroup's folder
    swap: int = 0

    @property
    def is_cgroup(self) -> bool:
        """Whether a cgroup, not the machine, sets the limit."""
        return self.binding != "machine"


def memory_limits(root: Path = Path("/")) -> MemoryLimits:
    """Read /proc/meminfo and this process's memory cgroups, versions 1 and 2, up to the root of each hierarchy.

    psutil and /proc/meminfo show the whole machine inside a container, so the cgroup is asked too.  Page cache that
    the kernel would give back counts as available.  `root` stands for "/" in tests.
    """
    meminfo = _table(root / "proc/meminfo", ":", unit=1024)
    total = meminfo["MemTotal"]
    available = meminfo.get("MemAvailable", meminfo["MemFree"])
    binding = "machine"
    for folder in _memory_cgroups(root):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes") or _UNLIMITED
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
        stat = _table(folder / "memory.stat", " ")
        reclaimable = stat.get("total_inactive_file", stat.get("inactive_file", 0))
        available = min(available, max(limit - used + reclaimable, 0))
        if limit < total:
            total, binding = limit, str(folder)
    return MemoryLimits(total, min(available, total), binding, meminfo.get("SwapTotal", 0))


def lock_limit() -> int | None:
    """Bytes that this process may lock (`ulimit -l`); None: no limit.  Drivers differ in whether they ask."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _memory_cgroups(root: Path) -> Iterator[Path]:
    """Folders of our memory cgroups, from our own up to the mount's root."""
    paths = {}  # controllers -> path inside the hierarchy; the empty string is version 2
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        paths[controllers] = path
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        mount_root, mount_point = before.split()[3:5]
        kind, _, options = after.split()[:3]
        if kind == "cgroup2":
            own_paths = [path for names, path in paths.items() if not names]
        elif kind == "cgroup" and "memory" in options.split(","):
            own_paths = [path for names, path in paths.items() if "memory" in names.split(",")]
        else:
            continue
        for path in own_paths:
            top = root / mount_point.lstrip("/")
            # In a container the mount shows only our own subtree, under the path it has outside.
            inner = path.removeprefix(mount_root.rstrip("/")).lstrip("/")
            own = top / inner if (top / inner).is_dir() else top
            yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(top))


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _number(path: Path) -> int | None:
    """The file's number; None when there is no such file or it says "max"."""
    text = "".join(_lines(path))
    return int(text) if text.isdigit() else None


def _table(path: Path, separator: str, unit: int = 1) -> dict[str, int]:
    rows = (line.partition(separator) for line in _lines(path))
    return {name: int(rest.split()[0]) * unit for name, _, rest in rows if rest.strip()}
