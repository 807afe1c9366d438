"""Is the plan right, twice over?  In: a checkpoint.  Out: one record: predicted beside measured, chosen beside best.

usage: prediction_grid.py [--model DIR | --shape NAME] [--work DIR] [--parts points,grid] [--rounds N] [--quick]

Ten points of (budget, sequences, prompt length): each prediction is written to a file before any weight is read, then
the point is run.  Of several rounds, all points in turn in each, every run has a prediction of its own, and a point is
the median of its runs over their predictions: a disk that others use is not the same from one minute to the next.
Every run is in the record.  A run may begin in memory that the one before it gave back; it is told nothing of that, and
what its plan took for still there is in the record (`planned_memory`).  Then one job with everything left to the
planner, and the same job with every batch and row count of a small grid, all really run: the chosen one should be
within 5 % of the best.
"""

from __future__ import annotations

import json
from statistics import median
from typing import Any

from calls import Bench, Call, median_s, num_wrong, parser, run, start
from conditions import checkpoint_bytes, planned_memory
from harness import Record, summary

POINTS = (  # percent of the checkpoint, sequences, prompt length
    (25, 1, 32),
    (25, 16, 16),
    (40, 1, 128),
    (40, 8, 64),
    (40, 32, 16),
    (40, 64, 32),
    (60, 4, 64),
    (60, 32, 32),
    (80, 16, 32),
    (100, 8, 16),
)
OVERS = ("pass_over_predicted", "job_over_predicted")
OUTPUT = 14
WITHIN, CHOSEN_WITHIN = 0.10, 0.05
GRID_BUDGET, GRID_REQUESTS, GRID_PROMPT, GRID_OUTPUT = 40, 32, 32, 12
GRID = tuple((batch, rows) for batch in (16, 32) for rows in (64, 1024))


def point(bench: Bench, percent: int, sequences: int, prompt: int) -> dict[str, Any]:
    """One point: predict, write, run."""
    conditions = bench.conditions
    conditions.budget_bytes = round(checkpoint_bytes(conditions.model) * percent / 100)
    name = f"grid-{percent}-{sequences}-{prompt}"
    call = Call(bench.known.prompts(sequences, prompt, prompt), OUTPUT)
    seen = run(bench, name, [call], {"max_batch": sequences})
    row: dict[str, Any] = {"percent": percent, "sequences": sequences, "prompt": prompt, "error": seen.error}
    if seen.result is None:
        return row
    # A forecast's pass has every sequence in it; where prompts are fed in pieces some runs have none like that.
    passes = [done for done in call.decode(settled=2) if done["sequences"] == sequences]
    foretold = json.loads((conditions.work / f"{name}.prediction.json").read_text())
    forecast = foretold["plan"]["forecast"]
    return row | {
        "predicted_unix_s": foretold["unix_s"],
        "read_bytes_when_predicted": foretold["read_bytes"],
        "predicted_pass_s": forecast["pass_s"],
        "pass_s": summary([done["seconds"] for done in passes]),
        "pass_over_predicted": median_s(passes) / forecast["pass_s"] if passes else None,
        "predicted_job_s": forecast["job_s"],
        "job_s": call.seconds,
        "job_over_predicted": call.seconds / forecast["job_s"],
        "binding": forecast["binding"],
        "planned_read_bytes_per_s": foretold["plan"]["machine"]["disk_read"]["bytes_per_s"],
        "planned_overlap": foretold["plan"]["machine"]["overlap"],
        "planned_memory": planned_memory(foretold["plan"]["machine"]),
        "disk_rates": seen.disk_rates,
        "num_wrong": num_wrong(bench.known, [call]),
    }


def job(bench: Bench, name: str, runtime: dict[str, Any], output: int) -> dict[str, Any]:
    """The grid's job under these settings: seconds from the first request to the last token, the load included."""
    call = Call(bench.known.prompts(GRID_REQUESTS, GRID_PROMPT, GRID_PROMPT), output)
    seen = run(bench, f"grid-{name}", [call], runtime)
    row: dict[str, Any] = {"name": name, "runtime": runtime, "error": seen.error}
    if seen.result is None:
        return row
    plan = seen.result["facts"]["plan"]
    return row | {
        "job_s": call.seconds,
        "predicted_job_s": plan["forecast"]["job_s"],
        "batch": plan["workload"]["batch"],
        "rows": plan["workload"]["prefill_rows"],
        "passes": len(call.passes),
        "disk_rates": seen.disk_rates,
        "num_wrong": num_wrong(bench.known, [call]),
    }


def medians(rows: list[dict[str, Any]], key: str) -> dict[str, float]:
    """Of every point, the median over its rounds."""
    seen: dict[str, list[float]] = {}
    for row in rows:
        if row[key] is not None:
            seen.setdefault(point_name(row), []).append(row[key])
    return {name: median(values) for name, values in seen.items()}


def point_name(row: dict[str, Any]) -> str:
    """Budget, sequences and prompt of a point."""
    return f"{row['percent']:3} %, {row['sequences']:2} sequences, prompt {row['prompt']:3}"


def line(row: dict[str, Any]) -> str:
    """One point or one job for people."""
    head = (
        row.get("name") or f"{row['percent']:3} %, {row['sequences']:2} sequences, prompt {row['prompt']:3}"
    )
    if row["error"]:
        return f"{head}  no figure: {row['error']}"
    wrong = f"  {row['num_wrong']} WRONG" if row["num_wrong"] else ""
    if "name" in row:
        told = f"{row['job_s']:7.2f} s, predicted {row['predicted_job_s']:7.2f} s"
        return f"{head:12} {told}, {row['passes']} passes of at most {row['batch']} sequences{wrong}"
    told = [
        f"job {row['job_s']:.2f} s of {row['predicted_job_s']:.2f} s ({judged(row['job_over_predicted'])})"
    ]
    if row["pass_over_predicted"]:
        pass_s = row["pass_s"]["median"]
        over = judged(row["pass_over_predicted"])
        told.insert(0, f"pass {pass_s:.3f} s of {row['predicted_pass_s']:.3f} s ({over})")
    return f"{head}  {', '.join(told)}, {row['binding']} binds{wrong}"


def judged(over: float) -> str:
    """Measured over predicted, with a word where it is outside."""
    return f"{over:.2f}{'' if abs(over - 1) <= WITHIN else ' OUTSIDE'}"


def main() -> None:
    """Run, print, write the record."""
    made = parser(__doc__)
    made.add_argument("--parts", default="points,grid")
    made.add_argument("--rounds", type=int, default=1, help="of all points, in turn")
    options = made.parse_args()
    bench = start(options)
    points, jobs, said = [], [], []
    wanted = (POINTS[:2] if options.quick else POINTS) if "points" in options.parts else ()
    for number in range(options.rounds):
        for where in wanted:
            points.append(point(bench, *where) | {"round": number})
            print(line(points[-1]), flush=True)
    good = [row for row in points if not row["error"]]
    if points:
        for key in OVERS:
            known = medians(good, key)
            inside = sum(abs(over - 1) <= WITHIN for over in known.values())
            told = ", ".join(f"{over:.2f}" for over in known.values())
            said.append(
                f"{key}: {inside} of {len(known)} points within {WITHIN:.0%} ({told}), {len(points)} runs"
            )
    if "grid" in options.parts:
        bench.conditions.budget_bytes = round(checkpoint_bytes(bench.conditions.model) * GRID_BUDGET / 100)
        output = 4 if options.quick else GRID_OUTPUT
        settings = {f"{batch} x {rows}": {"max_batch": batch, "max_rows": rows} for batch, rows in GRID}
        names = ["chosen", *(list(settings)[-2:] if options.quick else settings), "chosen"]
        for name in names:
            jobs.append(job(bench, name, settings.get(name, {}), output))
            print(line(jobs[-1]), flush=True)
        ran = [row for row in jobs if not row["error"]]
        chosen_s = [row["job_s"] for row in ran if row["name"] == "chosen"]
        others = [row for row in ran if row["name"] != "chosen"]
        if chosen_s and others:
            best = min(others, key=lambda row: row["job_s"])
            over = min(chosen_s) / best["job_s"]
            met = "within" if over <= 1 + CHOSEN_WITHIN else "NOT within"
            said.append(f"chosen {over:.3f} x the best ({best['name']}), {met} {CHOSEN_WITHIN:.0%}")
    print("\n".join(said))
    rows = [*points, *jobs]
    record = Record(
        bench="prediction_grid",
        config=bench.describe()
        | {"output": OUTPUT, "grid": [GRID_BUDGET, GRID_REQUESTS, GRID_PROMPT, GRID_OUTPUT]},
        repeats=options.rounds,
        median={f"{name} {key}": over for key in OVERS for name, over in medians(good, key).items()}
        | {f"{name} job_s": seconds for name, seconds in medians(good, "job_s").items()},
        spread={f"{point_name(row)} pass_s": row["pass_s"]["spread"] for row in good},
        limit={"within": WITHIN, "chosen_within": CHOSEN_WITHIN},
        baseline={f"{point_name(row)} job_s": {"predicted": row["predicted_job_s"]} for row in good},
        answer_matches=not any(row["error"] or row["num_wrong"] for row in rows),
        rows=rows,
        notes=[*(line(row) for row in rows), *said],
    )
    print(record.write(options.results))


if __name__ == "__main__":
    main()
