"""What every engine runner shares.  In: `job.json result.json` as arguments.  Out: a JSON result, logits as .npy.

A runner is a program of its own, so that an engine's imports, threads and memory are its own and the harness can
watch them from outside.  It reads a job, times passes with one clock, and writes what it saw.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

clock = time.perf_counter  # the one clock of all benchmarks: monotonic


@dataclass(frozen=True, slots=True)
class Job:
    """One run of one engine.

    `budget_bytes` None means resident.  `forced` [sequences][steps] are the reference's tokens, fed instead of the
    engine's own where its interface allows; None: the engine's own greedy tokens.  kind "decode" runs one prompt
    for `steps` tokens, "prefill" runs all prompts in one pass `steps` times, "window" the prompts as one static batch
    for `steps` passes, "calls" what `options` says (zinfer only).  `threads` None leaves the engine's default.
    `options` are the engine's own, e.g. the GGUF file.
    """

    kind: str
    model: str
    prompts: list[list[int]]
    steps: int
    logits: str
    dtype: str = "bfloat16"
    budget_bytes: int | None = None
    threads: int | None = None
    forced: list[list[int]] | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Outcome:
    """What a runner saw.  Seconds by `clock`; `pass_s` holds one entry per decode pass (or per prefill pass).

    `first_token_s` counts from the start of loading, imports done.  `argmax` [n] and `logits` [n, vocab] belong to
    the reference's prefixes if `teacher_forced`, else to the engine's own; `log_softmax` says that the interface
    gives log-probabilities only.  `read_bytes` per pass are from /proc/self/io, `reported_read_bytes` the engine's.
    """

    pass_s: list[float]
    first_token_s: float
    argmax: list[int]
    logits: np.ndarray | None
    settings: dict[str, Any]
    teacher_forced: bool = True
    log_softmax: bool = False
    tokens: list[int] = field(default_factory=list)
    read_bytes: list[int] = field(default_factory=list)
    reported_read_bytes: float | None = None
    import_rss_bytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


def rss_bytes() -> int:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def disk_bytes() -> int:
    """Bytes this process has fetched from storage since it began; 0 where the kernel does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of `packages`; one that is absent is left out."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def top_gaps(logits: np.ndarray) -> list[float]:
    """Distance between the two largest logits of each row of [n, vocab]."""
    two = np.partition(logits, -2, axis=-1)[:, -2:]
    return [float(gap) for gap in two[:, 1] - two[:, 0]]


def main(run: Callable[[Job], Outcome], *packages: str) -> None:
    """Run the job named on the command line and write its result; an exception ends the process, unwritten."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    outcome = run(job)
    result = {**asdict(outcome), "logits": None, "versions": versions(*packages)}
    if outcome.logits is not None:
        np.save(job.logits, outcome.logits.astype(np.float32))
        result |= {"logits": job.logits, "gaps": top_gaps(outcome.logits)}
    Path(sys.argv[2]).write_text(json.dumps(result))
