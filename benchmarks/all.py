"""Every benchmark, one after another.  In: where to work.  Out: their records, and what could not be run.

usage: all.py [--only throughput.py,...] [--quick] [other options, given to every benchmark]

Each has a time limit, and those of queues half an hour together: what one does not need, the next may.  One that fails
or is ended does not keep the next from running; the exit status is 1 if any did.
Engines that fail inside a benchmark are rows without a figure there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from harness import ENVIRONMENT

ALONE = {
    "overlap.py": 60,
    "several_devices.py": 90,
    "roofs.py": 120,
    "offload_decode.py": 420,
    "offload_prefill.py": 420,
    "prediction.py": 300,
    "exact_mode.py": 200,
    "students_latency.py": 400,
}
QUEUES_S = 1800  # all of these together
QUEUES = {
    "throughput.py": 1000,
    "roofline.py": 420,
    "packed.py": 240,
    "quantised.py": 240,
    "prediction_grid.py": 420,
}
SERVED = {"students_burst.py": 360, "serve_soak.py": 150}  # a teacher and its students, the bundled ones
BENCHMARKS = ALONE | QUEUES | SERVED
TAKES_NO_OPTIONS = ("overlap.py",)
TAKES_ONLY_RESULTS = ("several_devices.py",)
QUICK_IS_UNKNOWN = ("roofs.py",)
TAKES_ONLY_QUICK = ("students_latency.py", *SERVED)


def chosen(words: list[str]) -> tuple[list[str], list[str]]:
    """The scripts to run, and the options that are left for them.  Raises KeyError for a script that is not there."""
    if "--only" not in words:
        return list(BENCHMARKS), words
    at = words.index("--only")
    names = words[at + 1].split(",")
    return [name for name in names if BENCHMARKS[name]], words[:at] + words[at + 2 :]


def options_of(script: str, words: list[str]) -> list[str]:
    """Those of the given options that a script understands."""
    if script in TAKES_NO_OPTIONS:
        return []
    if script in TAKES_ONLY_RESULTS:
        return words[words.index("--results") :][:2] if "--results" in words else []
    if script in TAKES_ONLY_QUICK:
        return [word for word in words if word == "--quick"]
    return [word for word in words if not (word == "--quick" and script in QUICK_IS_UNKNOWN)]


def limit_of(script: str, queued_s: float) -> float:
    """Seconds that a script may take after those of queues took `queued_s`."""
    return min(QUEUES[script], QUEUES_S - queued_s) if script in QUEUES else BENCHMARKS[script]


def run(script: str, words: list[str], limit_s: float) -> str:
    """Run one; "ok", or how it failed."""
    command = [sys.executable, str(Path(__file__).resolve().parent / script), *words]
    process = subprocess.Popen(command, env=os.environ | ENVIRONMENT)
    try:
        status = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.terminate()  # benchmarks end their engines and remove their memory groups
        process.wait()
        return f"ENDED after {limit_s:.0f} s"
    return "ok" if status == 0 else f"FAILED ({status})"


def main() -> int:
    """Run them; print how each ended."""
    scripts, words = chosen(sys.argv[1:])
    ended = []
    for script in scripts:
        options = options_of(script, words)
        print(f"\n== {script} {' '.join(options)}", flush=True)
        start = time.perf_counter()
        queued_s = sum(seconds for done, _, seconds in ended if done in QUEUES)
        ended.append((script, run(script, options, limit_of(script, queued_s)), time.perf_counter() - start))
    print()
    for script, how, seconds in ended:
        print(f"{script:20} {how:20} {seconds:6.0f} s")
    return int(any(how != "ok" for _, how, _ in ended))


if __name__ == "__main__":
    sys.exit(main())
