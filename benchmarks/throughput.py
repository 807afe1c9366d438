"""128 ragged requests through 16 slots.  In: a checkpoint, a memory budget.  Out: one record, output tokens a second.

usage: throughput.py [--model DIR | --shape NAME] [--work DIR] [--budget 40] [--engines continuous,static,...] [--quick]

Prompts of 16 to 128 ids, outputs of 8 to 64 tokens that end in the end-of-sequence token, which none can foresee,
in arrival order.  zinfer refills a slot as soon as its request has ended; "static" is the same engine given 16 requests
at a time, each batch run to the end of its longest.  Accelerate and AirLLM run one static batch for a window of steady
passes; their whole job is extrapolated from it by the number of passes, and labelled so.  Every token is checked.

All are started at once and take turns, a few passes each, all through the run: a disk that drifts does so for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from calls import Bench, Call, fill, job_of, num_wrong, parser, start
from conditions import Asked, Seen, disk_pass_s, packs
from contest import Engine, engines, prepare
from counts import continuous_passes, static_passes
from harness import Record, summary
from known import Ragged

SLOTS, LONGEST = 16, 64
WINDOW = 14  # passes after the prompts' own, of which the first two are thrown away
TURN = 8  # passes of continuous batches; of static ones as many more as they need, so that both end together
TARGETS = {"static": 0.93, "accelerate": 5.0, "airllm": 12.0}
PEERS = ("accelerate", "airllm")


@dataclass(frozen=True, slots=True)
class Counts:
    """Passes of whole jobs, and of a peer's window."""

    continuous: int
    static: int
    window: int

    @property
    def allowed(self) -> float:
        """How many times fewer passes continuous batches need."""
        return self.static / self.continuous

    @property
    def rounds(self) -> int:
        """Turns of ours for each of a peer's, so that its window spans the job."""
        return max(self.continuous // (TURN * (self.window + 1)), 1)


def calls_of(requests: list[Ragged], at_once: int) -> list[Call]:
    """All requests, `at_once` of them per call."""
    prompts = [each.prompt for each in requests]
    return [
        Call(prompts[at : at + at_once], LONGEST, ignore_eos=False) for at in range(0, len(prompts), at_once)
    ]


def ours(bench: Bench, name: str, calls: list[Call], counts: Counts) -> Asked:
    """zinfer with sixteen slots."""
    job = job_of(bench, f"throughput-{name}", calls, {"max_batch": SLOTS})
    passes = TURN if name == "continuous" else round(TURN * counts.allowed)
    return Asked(name, "run_zinfer.py", job, passes, counts.rounds)


def row_of_ours(bench: Bench, name: str, calls: list[Call], seen: Seen) -> dict[str, Any]:
    """What came of a whole job."""
    row = row_of(name, fill(calls, seen))
    if seen.result is None:
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
        "is_packed": packs(plan),
        "predicted_pass_s": plan["forecast"]["pass_s"],
        "limit_pass_s": bound,
        "share_of_limit": bound * len(passes) / seconds if bound else None,
    }


def peer(bench: Bench, engine: Engine, requests: list[Ragged], window: int) -> Asked:
    """The first batch for `window` passes, one a turn."""
    job = {
        "kind": "window",
        "prompts": [each.prompt for each in requests[:SLOTS]],
        "steps": window,
        "options": engine.options | {"eos": bench.known.eos},
    }
    return Asked(engine.name, engine.script, job, 1, 1)


def row_of_peer(bench: Bench, name: str, requests: list[Ragged], seen: Seen) -> dict[str, Any]:
    """What came of a window, extrapolated to all requests by the number of passes."""
    row = row_of(name, seen)
    if seen.result is None:
        return row
    prefill_s, *decode_s = seen.result["pass_s"]
    outputs = seen.result["facts"]["outputs"]
    wanted = [bench.known.follow(each.prompt, LONGEST) for each in requests[:SLOTS]]
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


def measured(
    bench: Bench, wanted: list[str], requests: list[Ragged], counts: Counts
) -> dict[str, dict[str, Any]]:
    """A row of each wanted engine, all of them by turns; a peer that cannot convert the model has no figure."""
    work = bench.options.work / "known"  # what peers convert belongs to this checkpoint
    known = engines(bench.conditions.model, work, len(bench.known.next_of))
    chosen = [engine for engine in known if engine.name in PEERS and engine.name in wanted]
    broken = prepare(bench.conditions.model, work, chosen)
    calls = {
        name: calls_of(requests, at_once)
        for name, at_once in (("continuous", len(requests)), ("static", SLOTS))
        if name in wanted
    }
    asked = [ours(bench, name, calls[name], counts) for name in calls]
    asked += [peer(bench, engine, requests, counts.window) for engine in chosen if engine.name not in broken]
    seen = bench.conditions.run_by_turns(bench.options.work / "throughput", asked)
    rows = {
        name: row_of_ours(bench, name, calls[name], found)
        if name in calls
        else row_of_peer(bench, name, requests, found)
        for name, found in seen.items()
    }
    failed = {"comparable": True, "num_wrong": 0}
    return rows | {name: {"engine": name, "error": why} | failed for name, why in broken.items()}


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
    options = made.parse_args()
    bench = start(options)
    requests = bench.known.requests[: 32 if options.quick else None]
    lengths = [each.length for each in requests]
    counts = Counts(
        continuous_passes(lengths, SLOTS), static_passes(lengths, SLOTS), 4 if options.quick else WINDOW
    )
    print(
        f"static {counts.static} passes / continuous {counts.continuous} passes = {counts.allowed:.3f}",
        flush=True,
    )
    rows = measured(bench, options.engines.split(","), requests, counts)
    ratios, said = verdicts(rows, counts.allowed)
    print("\n".join([*map(line, rows.values()), *said]))
    best = rows.get("continuous", {})
    record = Record(
        bench="throughput",
        config=bench.describe()
        | {"requests": len(requests), "slots": SLOTS, "window": WINDOW, "turn_passes": TURN}
        | {"passes": {"static": counts.static, "continuous": counts.continuous}},
        repeats=1,
        median={
            f"{name}_tokens_per_s": row["tokens_per_s"] for name, row in rows.items() if not row["error"]
        },
        spread={f"{name}_pass_s": row["pass_s"]["spread"] for name, row in rows.items() if not row["error"]},
        limit={
            "static_over_continuous_passes": counts.allowed,
            "pass_s": best.get("limit_pass_s"),
            "share_of_limit": best.get("share_of_limit"),
        },
        baseline={name: {"ratio": ratio} for name, ratio in ratios.items()},
        answer_matches=bool(rows) and not any(row["error"] or row["num_wrong"] for row in rows.values()),
        comparable=all(row["comparable"] for row in rows.values()),
        rows=list(rows.values()),
        notes=[*map(line, rows.values()), *said],
    )
    print(record.write(options.results))


if __name__ == "__main__":
    main()
