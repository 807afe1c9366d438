"""What fewer bytes buy.  In: a checkpoint.  Out: one record: tokens per second of bf16, lossless, int8 and int4 chunks.

usage: quantised.py [--model DIR | --shape NAME] [--work DIR] [--formats bf16,lossless,...] [--rounds 2] [--quick]

All formats run from stores made by `zinfer shard`, with the same checks of what is read, and take turns: a disk that
drifts does so for all of them.  Each gets the budget under which its plan streams 60 % of its own bytes
per pass; eight sequences decode.  If moving bytes is what a pass costs, tokens per second grow as bytes shrink.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean, median
from typing import Any

from calls import Bench, Call, num_wrong, parser, run, start
from conditions import PROFILE, Conditions, checkpoint_bytes, embedding_bytes
from harness import ENVIRONMENT, MIB, Record, made_store, summary

ROWS, PROMPT, OUTPUT = 8, 16, 24
STREAMED_SHARE, AT_LEAST = 0.6, 0.92


def store(bench: Bench, weights: str) -> Path:
    """The store of one format, made if it is not there.  Raises RuntimeError if it fails."""
    model = bench.conditions.model
    log = bench.conditions.work / f"shard-{weights}.log"
    return made_store(model, bench.conditions.work / f"{model.name}-{weights}", weights, log, 1200)


def pass_bytes(model: Path) -> int:
    """Bytes of a pass that finds nothing in memory: all but the input embedding."""
    return checkpoint_bytes(model) - embedding_bytes(model)


def planned_share(bench: Bench, model: Path, budget_bytes: int) -> float:
    """Share of its bytes that a pass streams under this budget; 1 where the budget is refused."""
    words = ["plan", str(model), "--json", "--host-mem", str(budget_bytes), "--device", "cpu"]
    words += ["--batch", str(ROWS), "--prompt-len", str(PROMPT), "--gen-len", str(OUTPUT)]
    words += ["--machine", str(bench.conditions.work / PROFILE), "--set", f"runtime.max_batch={ROWS}"]
    words += ["--set", "exact=false"]
    told = subprocess.run(
        [sys.executable, "-m", "zinfer", *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | ENVIRONMENT,
    )
    if told.returncode == 4:
        return 1.0
    if told.returncode:
        raise RuntimeError(told.stderr.strip())
    return json.loads(told.stdout)["forecast"]["bytes_per_pass"].get("disk", 0) / pass_bytes(model)


def budget_for(bench: Bench, model: Path, share: float, steps: int = 9) -> int:
    """The budget under which the plan streams `share`, by bisection."""
    low, high = 0, pass_bytes(model) + 256 * MIB
    for _ in range(steps):
        middle = (low + high) // 2
        low, high = (middle, high) if planned_share(bench, model, middle) > share else (low, middle)
    return high


def measure(bench: Bench, weights: str, budget: int) -> dict[str, Any]:
    """One format, once: eight sequences decode with its own 60 % streamed."""
    model = store(bench, weights)
    own = Bench(
        Conditions(model, bench.conditions.work, budget, bench.conditions.timeout_s),
        bench.known,
        bench.options,
    )
    call = Call(bench.known.prompts(ROWS, PROMPT, PROMPT), 4 if bench.options.quick else OUTPUT)
    seen = run(own, f"quantised-{weights}", [call], {"max_batch": ROWS})
    if seen.result is None:
        return {"weights": weights, "error": seen.error}
    passes = call.decode(settled=2)
    moved = fmean(done["bytes"].get("disk", 0) for done in passes)
    return {
        "weights": weights,
        "error": "",
        "caches": seen.caches,
        "pass_bytes": pass_bytes(model),
        "budget_bytes": budget,
        "streamed_bytes": moved,
        "streamed_share": moved / pass_bytes(model),
        "each_pass_s": [done["seconds"] for done in passes],
        "disk_rates": seen.disk_rates or [],
        "num_wrong": num_wrong(bench.known, [call]),
    }


def of_all_rounds(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """One format's rounds as one: every pass counts alike."""
    failed = [row for row in rounds if row["error"]]
    if failed:
        return failed[0]
    seconds = [each for row in rounds for each in row["each_pass_s"]]
    rates = [rate for row in rounds for rate in row["disk_rates"]]
    return rounds[0] | {
        "each_pass_s": seconds,
        "pass_s": summary(seconds),
        "tokens_per_s": ROWS / median(seconds),
        "disk_rates": rates,
        "disk_s": rounds[0]["streamed_bytes"] / fmean(rates) if rates else None,
        "num_wrong": sum(row["num_wrong"] for row in rounds),
    }


def line(row: dict[str, Any]) -> str:
    """One format for people."""
    if row["error"]:
        return f"{row['weights']:5} no figure: {row['error']}"
    return (
        f"{row['weights']:5} {row['tokens_per_s']:7.2f} tok/s  {row['pass_s']['median']:.3f} s a pass, "
        f"{row['streamed_bytes'] / 1e9:.3f} GB of {row['pass_bytes'] / 1e9:.3f} ({row['streamed_share']:.0%}) streamed"
        + (f"  {row['num_wrong']} WRONG" if row["num_wrong"] else "")
    )


def verdicts(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each format but the first, which is the yardstick: how much faster, and how many times fewer bytes."""
    first, *others = rows
    found = {}
    for row in others if not first["error"] else ():
        if not row["error"]:
            speed = row["tokens_per_s"] / first["tokens_per_s"]
            byte_ratio = first["pass_bytes"] / row["pass_bytes"]
            found[row["weights"]] = {"speed": speed, "bytes": byte_ratio, "share": speed / byte_ratio}
    return found


def main() -> None:
    """Run, print, write the record."""
    made = parser(__doc__)
    made.add_argument("--formats", default="bf16,lossless,int8,int4")
    made.add_argument("--rounds", type=int, default=2, help="turns of each format, there and back")
    options = made.parse_args()
    bench = start(options)
    formats = options.formats.split(",")
    taken: dict[str, list[dict[str, Any]]] = {weights: [] for weights in formats}
    budgets: dict[str, int] = {}
    for turn in range(options.rounds):
        for weights in formats if turn % 2 == 0 else reversed(formats):
            try:
                if weights not in budgets:
                    budgets[weights] = budget_for(bench, store(bench, weights), STREAMED_SHARE)
                taken[weights].append(measure(bench, weights, budgets[weights]))
            except RuntimeError as error:
                taken[weights].append({"weights": weights, "error": str(error)})
    rows = [of_all_rounds(taken[weights]) for weights in formats]
    for row in rows:
        print(line(row), flush=True)
    ratios = verdicts(rows)
    said = [
        f"{name}: {found['speed']:.2f} x the tokens of {found['bytes']:.2f} x fewer bytes = {found['share']:.2f}, "
        f"{'at least' if found['share'] >= AT_LEAST else 'NOT'} {AT_LEAST}"
        for name, found in ratios.items()
    ]
    print("\n".join(said))
    good = [row for row in rows if not row["error"]]
    record = Record(
        bench="quantised",
        config=bench.describe()
        | {"sequences": ROWS, "prompt": PROMPT, "output": OUTPUT, "streamed": STREAMED_SHARE},
        repeats=min((row["pass_s"]["repeats"] for row in good), default=0),
        median={f"{row['weights']}_tokens_per_s": row["tokens_per_s"] for row in good},
        spread={f"{row['weights']}_pass_s": row["pass_s"]["spread"] for row in good},
        limit={f"{row['weights']}_disk_s": row["disk_s"] for row in good},
        baseline=ratios,
        answer_matches=len(good) == len(rows) and not any(row["num_wrong"] for row in good),
        rows=rows,
        notes=[*said, *(line(row) for row in rows)],
    )
    print(record.write(options.results))


if __name__ == "__main__":
    main()
