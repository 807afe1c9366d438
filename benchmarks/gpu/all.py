"""Every block on one GPU machine, the most telling first, in at most 25 minutes.

usage: all.py [--only probe,decode] [--minutes 25] [--dry-run] [--work DIR] [--results DIR] [--shape NAME] [--layers N]

Each block is a program of its own and writes its record as it ends, so that what is cut off loses the last block and
nothing else.  A block is given its own limit or what is left, whichever is less, and is not begun with less than it
needs.  A dry run carries all of them out, tiny, in one process, on the simulated device.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from harness import ENVIRONMENT

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Block:
    """A script, the seconds it may take (at most 480), and the least that is worth beginning.

    One that `stands_alone` has options and a rehearsal of its own.
    """

    name: str
    limit_s: int
    least_s: int
    stands_alone: bool = False


BLOCKS = (
    Block("probe", 240, 60),  # also makes the checkpoint and the machine profile
    Block("streamer", 90, 30),
    Block("decode", 300, 60),
    Block("prefill", 150, 40),
    Block("kernels", 60, 20, stands_alone=True),
    Block("resident", 180, 60),
    Block("throughput", 180, 60),
    Block("peers", 420, 120),
    Block("int4", 300, 90),
    Block("larger", 480, 200),
)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="some blocks, separated by commas, in the given order")
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--dry-run", action="store_true")
    for name in ("--work", "--results", "--shape", "--layers"):
        parser.add_argument(name)
    return parser.parse_args()


def chosen(only: str) -> list[Block]:
    """The blocks to run.  Raises KeyError for a name that none has."""
    by_name = {block.name: block for block in BLOCKS}
    return [by_name[name] for name in only.split(",")] if only else list(BLOCKS)


def run(block: Block, words: list[str], limit_s: float) -> str:
    """One block in a process of its own; "ok", or how it failed."""
    if block.stands_alone:
        words = words[words.index("--results") :][:2] if "--results" in words else []
    else:
        words = [*words, "--seconds", str(round(limit_s))]
    command = [sys.executable, str(HERE / f"{block.name}.py"), *words]
    process = subprocess.Popen(command, env=os.environ | ENVIRONMENT)
    try:
        status = process.wait(limit_s + 20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"ENDED after {limit_s:.0f} s"
    return "ok" if status == 0 else f"FAILED ({status})"


def run_here(block: Block, words: list[str]) -> str:
    """The same in this process: a dry run would spend most of its time importing."""
    try:
        status = import_module(block.name).main([*words, "--seconds", "300"])
    except Exception as error:  # a typo is what a dry run is there to find: the other blocks go on
        traceback.print_exc()
        return f"FAILED ({type(error).__name__})"
    return "ok" if status == 0 else f"FAILED ({status})"


def main() -> int:
    """Run them; print how each ended."""
    options = arguments()
    words = ["--dry-run"] if options.dry_run else []
    for name in ("work", "results", "shape", "layers"):
        if getattr(options, name):
            words += [f"--{name}", getattr(options, name)]
    end_s, ended = time.perf_counter() + 60 * options.minutes, []
    for block in chosen(options.only):
        if options.dry_run and block.stands_alone:
            continue
        left_s = end_s - time.perf_counter()
        if left_s < block.least_s:
            ended.append((block.name, f"not begun: {left_s:.0f} s were left", 0.0))
            continue
        print(f"\n== {block.name}", flush=True)
        start = time.perf_counter()
        limit_s = min(block.limit_s, left_s - 20)
        how = run_here(block, words) if options.dry_run else run(block, words, limit_s)
        ended.append((block.name, how, time.perf_counter() - start))
    print()
    for name, how, seconds in ended:
        print(f"{name:12} {how:32} {seconds:6.0f} s")
    return int(any(how != "ok" for _, how, _ in ended))


if __name__ == "__main__":
    sys.exit(main())
