"""One record format, one way to run a child, one way to measure a disk.  In: what was seen.  Out: one JSON file.

The fields are those of docs/benchmarking.md.  Seconds are `time.perf_counter`, bytes are whole numbers, and the
machine is described by what it is, never by its name on a network.
"""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from mmap import MADV_HUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path
from typing import Any

from cgroup import MemoryGroup

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PIECE = 16 * 2**20  # of a direct read; four in flight reach a drive's own rate
MIB, GIB = 2**20, 2**30
RSS_FIELDS = ("VmHWM", "RssAnon")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    # The tree that is measured is the one that lies beside this file; what else was carried here stays visible.
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
}


def now() -> str:
    """The time of day in UTC, for records only: durations are never taken from it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def finite(value: Any) -> Any:
    """`value` as strict JSON can hold it: what is not a number (nan, infinity) becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): finite(entry) for key, entry in value.items()}
    return [finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def command() -> str:
    """The command line that writes this record, its paths shortened to their last part."""
    shown = [Path(part).name if part.startswith("/") else part for part in sys.argv]
    return " ".join(["python", f"benchmarks/{Path(shown[0]).name}", *shown[1:]])


def commit() -> str:
    """The tree's short hash, "+dirty" if it has changes.

    $BENCH_COMMIT is believed before anything else: for a tree that was carried elsewhere.  "none" outside a repository.
    """
    if told := os.environ.get("BENCH_COMMIT"):
        return told
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    if found.returncode:
        return "none"
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return found.stdout.strip() + ("+dirty" if changed.stdout.strip() else "")


def package_versions(*packages: str) -> dict[str, str]:
    """Versions of Python, zinfer and `packages`, without importing them."""
    found = {"python": platform.python_version()}
    for package in ("zinfer", "torch", "numpy", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine_facts() -> dict[str, Any]:
    """CPU, cores, memory, kernel, load: enough to tell machines apart, nothing that names one."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    return {
        "name": f"{cores}c{round(memory / GIB)}g",
        "cpu": models[0] if models else platform.machine(),
        "cores": cores,
        "memory_bytes": memory,
        "devices": [],
        "kernel": platform.release(),
        "load_at_start": round(os.getloadavg()[0], 2),
        "simulated": False,
    }


@dataclass(slots=True)
class Record:
    """One run of one benchmark; a record is never edited after it is written.

    `median`, `spread` (smallest, largest), `limit` and `baseline` are by metric, the unit in the metric's name;
    `answer_matches` is True, False, or the largest difference where bits may differ.  `rows` are the engines or
    cases in full.  `comparable` False means that the conditions were not held and no ratio may be formed.
    """

    bench: str
    config: dict[str, Any]
    repeats: int
    median: dict[str, float]
    spread: dict[str, tuple[float, float]]
    limit: dict[str, Any]
    baseline: dict[str, Any]
    answer_matches: bool | float
    comparable: bool = True
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    written: str = field(default_factory=now)
    machine: dict[str, Any] = field(default_factory=machine_facts)
    versions: dict[str, str] = field(default_factory=package_versions)
    commit: str = field(default_factory=commit)
    command: str = field(default_factory=command)

    def write(self, folder: Path = RESULTS) -> Path:
        """Write `<bench>_<machine>_<date>_<commit>.json` by way of a .tmp file; an existing record is kept."""
        folder.mkdir(parents=True, exist_ok=True)
        stamp = "".join(character for character in self.written[:19] if character not in "-:")
        path = folder / f"{self.bench}_{self.machine['name']}_{stamp}_{self.commit}.json"
        partial = path.with_suffix(".json.tmp")
        partial.write_text(json.dumps(finite(asdict(self)), indent=1) + "\n")
        partial.replace(path)
        return path


def made_store(model: Path, folder: Path, weights: str, log: Path, timeout_s: float) -> Path:
    """`folder` as a store of the model in this format (bf16: as published), made by `zinfer shard` if it is not there.

    Raises RuntimeError where it cannot be made.
    """
    if not (folder / "config.json").exists():
        words = ["shard", str(model), "--out", str(folder)] + (
            ["--weights", weights] if weights != "bf16" else []
        )
        child = run_child([sys.executable, "-m", "zinfer", *words], log, timeout_s=timeout_s)
        if child.returncode:
            raise RuntimeError(f"the {weights} store cannot be made: {child.why}")
    return folder


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, smallest and largest of some durations, and how many they are; an empty list gives none."""
    if not seconds:
        return {"median": None, "spread": None, "repeats": 0}
    return {
        "median": statistics.median(seconds),
        "spread": (min(seconds), max(seconds)),
        "repeats": len(seconds),
    }


def direct_read_rate(files: Sequence[Path], at_most: int = 4 * GIB, in_flight: int = 4) -> float | None:
    """Bytes per second at which the very files come from disk: O_DIRECT, 16 MiB pieces, four in flight.

    None where the file system refuses direct reads.  The page cache is neither used nor filled.
    """
    handles, pieces = [], []
    try:
        for file in files:
            handles.append(os.open(file, os.O_RDONLY | os.O_DIRECT))
            pieces += [(handles[-1], start) for start in range(0, os.fstat(handles[-1]).st_size, PIECE)]
        buffers = [mmap(-1, PIECE, flags=MAP_PRIVATE | MAP_ANONYMOUS) for _ in range(in_flight)]
        for buffer in buffers:
            buffer.madvise(MADV_HUGEPAGE)  # as the engine reads: on 4 KiB pages the disk shows half its rate
        pieces = pieces[: max(at_most // PIECE, 1)]

        def read(lane: int) -> int:
            return sum(os.preadv(handle, [buffers[lane]], at) for handle, at in pieces[lane::in_flight])

        with ThreadPoolExecutor(in_flight) as pool:
            list(
                pool.map(lambda buffer: buffer.write(bytes(PIECE)), buffers)
            )  # memory is there before the clock runs
            start = time.perf_counter()
            total = sum(pool.map(read, range(in_flight)))
            return total / (time.perf_counter() - start)
    except OSError:
        return None
    finally:
        for handle in handles:
            os.close(handle)


def end_on_signals() -> None:
    """Let SIGTERM end a benchmark as Ctrl-C does, so that children are ended and memory groups removed."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(f"ended by signal {number}"))


@dataclass(slots=True)
class Child:
    """How a child process ended and what was seen of it from outside.  `log` is the end of what it printed."""

    returncode: int
    seconds: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int
    group_peak_bytes: int | None
    log: str
    timed_out: bool = False

    @property
    def why(self) -> str:
        """Why it failed, in one line."""
        if self.timed_out:
            return f"ended after {self.seconds:.0f} s"
        if self.returncode == -9:
            return "killed by the kernel: it needs more memory than the group's limit"
        lines = [line for line in self.log.splitlines() if line.strip()]
        return f"exit {self.returncode}: {lines[-1][:300] if lines else 'it said nothing'}"


def watch_memory(pid: int, stop: threading.Event, peak: dict[str, int], every_s: float = 0.02) -> None:
    """Keep in `peak` the largest VmHWM and RssAnon of a process, in bytes, as the kernel reports them."""
    while not stop.wait(every_s):
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return
        for line in lines:
            name, _, rest = line.partition(":")
            if name in RSS_FIELDS:
                peak[name] = max(peak[name], int(rest.split()[0]) * 1024)


def run_child(
    arguments: Sequence[str], log: Path, group: MemoryGroup | None = None, timeout_s: float = 300.0
) -> Child:
    """Run a command from the repository's root, its output in `log`; at `timeout_s` it is killed."""
    environment = os.environ | ENVIRONMENT
    command_line = group.enter(list(arguments)) if group else list(arguments)
    peak, stop = dict.fromkeys(RSS_FIELDS, 0), threading.Event()
    start, timed_out = time.perf_counter(), False
    with open(log, "wb") as out:
        process = subprocess.Popen(command_line, stdout=out, stderr=out, cwd=ROOT, env=environment)
        watcher = threading.Thread(target=watch_memory, args=(process.pid, stop, peak))
        watcher.start()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            process.kill()  # of use after a time-out or an interrupt only; does nothing to what has ended
            process.wait()
            stop.set()
            watcher.join()
    seconds = time.perf_counter() - start
    tail = log.read_text(errors="replace")[-4000:]
    group_peak = group.peak_bytes() if group else None
    return Child(process.returncode, seconds, peak["VmHWM"], peak["RssAnon"], group_peak, tail, timed_out)
