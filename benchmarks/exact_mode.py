"""What exact mode, the default, costs.  In: a checkpoint.  Out: one record: passes with and without, by their rows.

usage: exact_mode.py [--model DIR | --shape NAME] [--work DIR] [--budget 40] [--repeats 2] [--quick]

In memory: 32 prompts of 32 ids, a token each, then decode at 1, 8 and 32 rows.  At the budget: decode at one row.
Processes with and without take turns (A B B A ...), so that drift falls on both.  Every token is checked.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from statistics import median
from typing import Any

from calls import Bench, Call, num_wrong, parser, run, start, turns
from conditions import checkpoint_bytes
from harness import Record, summary

PROMPT, OUTPUT = 16, 12
LONG = 32  # ids; of as many prompts as the widest pass has rows: one plan serves all calls
ROWS = (1, 8, 32)
LOADING = 3  # tokens of the first call: its passes load
RESIDENT = 1.25  # of the checkpoint, where nothing streams
EXACT, FAST = "exact", "not exact"


def resident_calls(bench: Bench, output: int) -> dict[str, Call]:
    """By what is measured; the first one loads and is not counted."""
    known = bench.known
    return {
        "loading": Call(known.prompts(1, PROMPT, PROMPT), LOADING),
        "prompts": Call(known.prompts(max(ROWS), LONG, LONG), 1),
        **{f"{rows} rows": Call(known.prompts(rows, PROMPT, PROMPT), output) for rows in ROWS},
    }


def seconds_of(name: str, call: Call) -> list[float]:
    """Of prompts the whole call, however it was cut into passes; of decode the passes that carry all its rows."""
    if name == "prompts":
        return [call.seconds]
    return [done["seconds"] for done in call.decode(settled=3) if done["rows"] == len(call.prompts)]


def measure(bench: Bench, mode: str, what: str, calls: dict[str, Call]) -> dict[str, list[float]]:
    """One process.  Raises SystemExit where it fails or a token is wrong."""
    seen = run(
        bench, f"exact-{what}-{mode.replace(' ', '-')}", list(calls.values()), {"exact": mode == EXACT}
    )
    if seen.result is None:
        raise SystemExit(f"no figure: {seen.error}")
    if wrong := num_wrong(bench.known, calls.values()):
        raise SystemExit(f"{mode}, {what}: {wrong} requests have wrong tokens")
    return {name: seconds_of(name, call) for name, call in calls.items() if name != "loading"}


def contest(bench: Bench, repeats: int, output: int) -> dict[str, dict[str, list[float]]]:
    """{what: {mode: seconds of passes}}."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    whole = round(RESIDENT * checkpoint_bytes(bench.conditions.model))
    resident = replace(bench, conditions=replace(bench.conditions, budget_bytes=whole))
    for mode in turns((EXACT, FAST), repeats):
        measured = measure(resident, mode, "resident", resident_calls(bench, output))
        prompts = bench.known.prompts(1, PROMPT, PROMPT)
        streamed = {"streamed": Call(prompts, LOADING + output)}
        measured |= measure(bench, mode, "streamed", streamed)
        for name, seconds in measured.items():
            found[name][mode] += seconds
    return found


def line(name: str, row: dict[str, Any]) -> str:
    """One comparison for people."""
    return f"{name:>9}  exact {row[EXACT] * 1e3:7.1f} ms  without {row[FAST] * 1e3:7.1f} ms  {row['ratio']:.2f} x"


def main() -> None:
    """Run, print, write the record."""
    made = parser(__doc__)
    made.add_argument("--repeats", type=int, default=2)
    options = made.parse_args()
    bench = start(options)
    repeats, output = (1, 6) if options.quick else (options.repeats, OUTPUT)
    found = contest(bench, repeats, output)
    rows = {
        name: {mode: median(seconds) for mode, seconds in by_mode.items()} for name, by_mode in found.items()
    }
    for row in rows.values():
        row["ratio"] = row[EXACT] / row[FAST]
    said = [line(name, row) for name, row in rows.items()]
    print("\n".join(said))
    record = Record(
        bench="exact_mode",
        config=bench.describe() | {"exact": "both", "prompt": PROMPT, "long_prompt": LONG, "output": output},
        repeats=repeats,
        median={f"{name}, {mode}, s": row[mode] for name, row in rows.items() for mode in (EXACT, FAST)},
        spread={
            f"{name}, {mode}, s": summary(seconds)["spread"]
            for name, by_mode in found.items()
            for mode, seconds in by_mode.items()
        },
        limit={f"{name}, ratio": 1.0 for name in rows},
        baseline={f"{name}, {FAST}, s": row[FAST] for name, row in rows.items()},
        answer_matches=True,  # or it would have ended
        rows=[{"what": name} | row for name, row in rows.items()],
        notes=said,
    )
    print(record.write(options.results))


if __name__ == "__main__":
    main()
