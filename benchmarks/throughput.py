"""128 ragged requests through 16 slots.  In: a checkpoint, a memory budget.  Out: one record, output tokens a second.

usage: throughput.py [--model DIR | --shape NAME] [--work DIR] [--budget 40] [--engines continuous,static,...] [--quick]

Prompts of 16 to 128 ids, outputs of 8 to 64 tokens that end in the end-of-sequence token, which none can foresee,
in arrival order.  zinfer refills a slot as soon as its request has ended; "static" is the same engine given 16 requests
at a time, each batch run to the end of its longest.  Accelerate and AirLLM run one static batch for a window of steady
passes; their whole job is extrapolated from it by the number of passes, and labelled so.  Every token is checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean, median
from typing import Any

from calls import Bench, Call, num_wrong, parser, run, start
from conditions import Seen, disk_pass_s, packs
from contest import Engine, engines, prepare
from counts import continuous_passes, static_passes
from harness import Record, summary
from known import Ragged

SLOTS, LONGEST = 16, 64
WINDOW = 14  # passes after the prompts' own, of which the first two are thrown away
TARGETS = {"static": 0.93, "accelerate": 5.0, "airllm": 12.0}
PEERS = ("accelerate", "airllm")


def ours(bench: Bench, name: str, requests: list[Ragged], at_once: int) -> dict[str, Any]:
    """All requests by zinfer, `at_once` of them per call, sixteen slots."""
    prompts = [each.prompt for each in requests]
    calls = [
        Call(prompts[at : at + at_once], LONGEST, ignore_eos=False) for at in range(0, len(prompts), at_once)
    ]
    seen = run(bench, f"throughput-{name}", calls, {"max_batch": SLOTS})
    row = row_of(name, seen)
    if row["error"]:
        return row
    passes = [done for call in calls for done in call.passes]
    seconds, tokens = sum(call.seconds for call in calls), sum(call.num_tokens for call in calls)
    plan, at = seen.result["facts"]["plan"], bench.conditions
    bound = disk_pass_s(at.model, at.budget_bytes, seen.disk_rates, is_packed=packs(plan))
    return row | {
        "num_wrong": num_wrong(bench.known, calls),
        "seconds": seconds,
        "output_tokens": tokens,
        "passes": len(passes),
        "pass_s": summary([done["seconds"] for done in passes if not done["is_first"]]),
        "tokens_per_pass": tokens / len(passes),
        "rows_per_pass": sum(done["rows"] for done in passes) / len(passes),
        "disk_bytes_per_token": sum(done["bytes"].get("disk", 0) for done in passes) / tokens,
        "tokens_per_s": tokens / seconds,
        "predicted_pass_s": plan["forecast"]["pass_s"],
        "limit_pass_s": bound,
        "share_of_limit": bound * len(passes) / seconds if bound else None,
    }


def peer(bench: Bench, engine: Engine, requests: list[Ragged], window: int) -> dict[str, Any]:
    """The first batch for `window` passes, extrapolated to all requests by the number of passes."""
    first = requests[:SLOTS]
    job = {
        "kind": "window",
        "prompts": [each.prompt for each in first],
        "steps": window,
        "options": engine.options | {"eos": bench.known.eos},
    }
    seen = bench.conditions.run(f"throughput-{engine.name}", engine.script, job, limited=True)
    row = row_of(engine.name, seen)
    if row["error"]:
        return row
    prefill_s, *decode_s = seen.result["pass_s"]
    outputs = seen.result["facts"]["outputs"]
    wanted = [bench.known.follow(each.prompt, LONGEST) for each in first]
    wrong = sum(came != want[: len(came)] for came, want in zip(outputs, wanted, strict=True))
    steady = decode_s[2:] or decode_s
    batches, passes = -(-len(requests) // SLOTS), static_passes([each.length for each in requests], SLOTS)
    seconds = batches * prefill_s + (passes - batches) * median(steady)
    tokens = sum(each.length for each in requests)
    return row | {
        "num_wrong": wrong,
        "extrapolated": f"from {len(steady)} steady passes of one batch to {passes} passes of {batches}",
        "prefill_s": prefill_s,
        "pass_s": summary(steady),
        "passes": passes,
        "seconds": seconds,
        "output_tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "settings": seen.result["settings"],
    }


def peers(bench: Bench, wanted: list[str], requests: list[Ragged], window: int) -> Iterator[dict[str, Any]]:
    """A row of each wanted peer; one that cannot convert the model has no figure."""
    work = bench.options.work / "known"  # what peers convert belongs to this checkpoint
    known = engines(bench.conditions.model, work, len(bench.known.next_of))
    chosen = [engine for engine in known if engine.name in PEERS and engine.name in wanted]
    broken = prepare(bench.conditions.model, work, chosen)
    for engine in chosen:
        if engine.name in broken:
            yield {"engine": engine.name, "error": broken[engine.name], "comparable": True, "num_wrong": 0}
        else:
            yield peer(bench, engine, requests, window)


def row_of(name: str, seen: Seen) -> dict[str, Any]:
    """What every row has."""
    return {
        "engine": name,
        "error": seen.error,
        "comparable": not seen.why,
        "why": seen.why,
        "caches": seen.caches,
        "disk_rates": seen.disk_rates,
        "peak_rss_bytes": seen.child.peak_rss_bytes,
        "group_peak_bytes": seen.child.group_peak_bytes,
        "versions": seen.result["versions"] if seen.result else {},
    }


def is_good(row: dict[str, Any] | None) -> bool:
    """Whether a ratio may be formed with this row."""
    return row is not None and not row["error"] and row["comparable"] and not row["num_wrong"]


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    if row["error"]:
        return f"{row['engine']:12} no figure: {row['error']}"
    rate = f", disk {fmean(row['disk_rates']) / 1e9:.2f} GB/s" if row["disk_rates"] else ""
    wrong = f"  {row['num_wrong']} WRONG" if row["num_wrong"] else ""
    told = f"  (extrapolated {row['extrapolated']})" if "extrapolated" in row else ""
    return (
        f"{row['engine']:12} {row['tokens_per_s']:8.2f} tok/s  {row['seconds']:7.1f} s  {row['passes']} passes of "
        f"{row['pass_s']['median']:.3f} s{rate}{wrong}{told}"
    )


def verdicts(rows: dict[str, dict[str, Any]], allowed: float) -> tuple[dict[str, float], list[str]]:
    """Ratios of zinfer's rate to each other row's, and a line for each target."""
    ratios, said = {}, []
    best = rows.get("continuous")
    for name, wanted in TARGETS.items():
        row = rows.get(name)
        if not is_good(best) or not is_good(row):
            continue
        ratios[name] = best["tokens_per_s"] / row["tokens_per_s"]
        least = wanted * allowed if name == "static" else wanted
        word = "at least" if ratios[name] >= least else "NOT"
        said.append(f"{ratios[name]:.3f} x {name}, {word} {least:.3f} x")
    return ratios, said


def main() -> None:
    """Run, print, write the record."""
    made = parser(__doc__)
    made.add_argument("--engines", default="continuous,static,accelerate,airllm")
    made.add_argument("--rounds", type=int, default=1, help="how often zinfer's two schedules run, A B B A")
    options = made.parse_args()
    bench = start(options)
    requests = bench.known.requests[: 32 if options.quick else None]
    lengths = [each.length for each in requests]
    counts = {"static": static_passes(lengths, SLOTS), "continuous": continuous_passes(lengths, SLOTS)}
    allowed = counts["static"] / counts["continuous"]
    print(f"static {counts['static']} passes / continuous {counts['continuous']} passes = {allowed:.3f}")
    wanted, rows = options.engines.split(","), {}
    order = [name for name in ("continuous", "static") if name in wanted]
    for number in range(options.rounds):
        for name in order if number % 2 == 0 else reversed(order):
            row = ours(bench, name, requests, SLOTS if name == "static" else len(requests))
            print(line(row), flush=True)
            if name not in rows or row.get("tokens_per_s", 0) > rows[name].get("tokens_per_s", 0):
                rows[name] = row
    try:
        for row in peers(bench, wanted, requests, 4 if options.quick else WINDOW):
            rows[row["engine"]] = row
            print(line(row), flush=True)
    except SystemExit as ended:  # what there is so far is worth a record
        print(ended)
    ratios, said = verdicts(rows, allowed)
    print("\n".join(said))
    best = rows.get("continuous", {})
    record = Record(
        bench="throughput",
        config=bench.describe()
        | {"requests": len(requests), "slots": SLOTS, "window": WINDOW, "passes": counts},
        repeats=options.rounds,
        median={
            f"{name}_tokens_per_s": row["tokens_per_s"] for name, row in rows.items() if not row["error"]
        },
        spread={f"{name}_pass_s": row["pass_s"]["spread"] for name, row in rows.items() if not row["error"]},
        limit={
            "static_over_continuous_passes": allowed,
            "pass_s": best.get("limit_pass_s"),
            "share_of_limit": best.get("share_of_limit"),
        },
        baseline={name: {"ratio": ratio} for name, ratio in ratios.items()},
        answer_matches=bool(rows) and not any(row["error"] or row["num_wrong"] for row in rows.values()),
        comparable=all(row["comparable"] for row in rows.values()),
        rows=list(rows.values()),
        notes=[*(line(row) for row in rows.values()), *said],
    )
    print(record.write(options.results))


if __name__ == "__main__":
    main()
