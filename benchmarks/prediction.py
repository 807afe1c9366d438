"""Predicted against measured.  In: a checkpoint, five host budgets.  Out: one record: seconds, memory and bytes read.

usage: prediction.py [--model DIR | --shape NAME] [--work DIR] [--budgets 25,40,60,80,100] [--quick]

The plan is written to a file before any weight is read (its time and the bytes read so far are in it), then the same
process decodes 16 tokens.  Beside the seconds stand the peak resident memory, seen from outside, with what it may be
(after the imports, plus the budget, plus 64 MiB), and the bytes that the kernel says were read per pass with those
that zinfer reports.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from conditions import PROFILE, checkpoint_bytes, planned_memory
from contest import STREAMED, Contest, Engine, Row, checkpoint, doctor, random_prompts
from harness import MIB, Record, end_on_signals, summary
from roofs import add_model_options

SLACK = 64 * MIB
SECONDS_WITHIN, BYTES_WITHIN = 0.15, 0.02


def case(contest: Contest, percent: float, total: int) -> dict[str, Any]:
    """One budget: run it and set the prediction beside what was seen; a failed run says why instead."""
    contest.budget_bytes = int(total * percent / 100)
    foretold = contest.work / f"prediction-{percent:g}.json"
    foretold.unlink(missing_ok=True)
    options = {"prediction": str(foretold), "machine": str(contest.work / PROFILE)}
    engine = Engine(f"zinfer {percent:g} %", "run_zinfer.py", (STREAMED,), options)
    row = contest.enter(engine, STREAMED)
    found: dict[str, Any] = {"budget_percent": percent, "budget_bytes": contest.budget_bytes} | row.to_dict()
    if row.median is None:
        return found
    plan = json.loads(foretold.read_text())
    predicted = plan["plan"]["forecast"]
    return found | {
        "predicted_unix_s": plan["unix_s"],
        "read_bytes_when_predicted": plan["read_bytes"],
        "predicted_pass_s": predicted["pass_s"],
        "predicted_first_token_s": predicted["first_token_s"],
        "binding": predicted["binding"],
        "planned_read_bytes_per_s": plan["plan"]["machine"]["disk_read"]["bytes_per_s"],
        "planned_overlap": plan["plan"]["machine"]["overlap"],
        "planned_memory": planned_memory(plan["plan"]["machine"]),
        "measured_over_predicted": row.median / predicted["pass_s"],
        "allowed_rss_bytes": row.import_rss_bytes + contest.budget_bytes + SLACK,
        "read_over_reported": bytes_ratio(row),
        "read_over_reported_in_all": row.facts["read_bytes_in_all"] / row.facts["stats"]["bytes"]["disk"],
    }


def bytes_ratio(row: Row) -> float | None:
    """Bytes per pass by /proc/self/io over those that zinfer reports; 1 where neither read any."""
    read = statistics.mean(row.read_bytes) if row.read_bytes else 0.0
    if not row.reported_read_bytes:
        return 1.0 if read < MIB else None
    return read / row.reported_read_bytes


def line(found: dict[str, Any]) -> str:
    """One case for people, with a word for what is outside its bound."""
    head = f"budget {found['budget_percent']:4g} %"
    if "predicted_pass_s" not in found:
        return f"{head}  no figure: {found['error'] or found['answer']}"
    over, read = found["measured_over_predicted"], found["read_over_reported"]
    used, allowed = found["peak_rss_bytes"], found["allowed_rss_bytes"]
    told = [
        f"{head}  predicted {found['predicted_pass_s']:.3f} s",
        f"measured {found['median']:.3f} s ({over:.2f}{'' if abs(over - 1) <= SECONDS_WITHIN else ' OUTSIDE'})",
        f"peak {used / MIB:.0f} of {allowed / MIB:.0f} MiB{'' if used <= allowed else ' OVER'}",
        f"read/reported {'none' if read is None else f'{read:.3f}'} per pass",
        f"{found['read_over_reported_in_all']:.3f} in all",
    ]
    return "  ".join(told)


def main() -> None:
    """Run, print, write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    parser.add_argument("--budgets", default="25,40,60,80,100", help="percent of the checkpoint")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="two budgets, fewer tokens")
    options = parser.parse_args()
    end_on_signals()
    options.work.mkdir(parents=True, exist_ok=True)
    model = checkpoint(options)
    budgets = [float(percent) for percent in options.budgets.split(",")]
    budgets, tokens = (budgets[1:3], 5) if options.quick else (budgets, options.tokens)
    total = checkpoint_bytes(model)
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    contest = Contest(model, options.work, total, prompts=random_prompts(vocab, 1, 32), steps=tokens)
    contest.set_reference()
    doctor(
        model, options.work, 5.0 if options.quick else 20.0
    )  # the engine takes the disk's rate again as it opens
    cases = []
    for percent in budgets:
        cases.append(case(contest, percent, total))
        print(line(cases[-1]), flush=True)
    print(write(options.results, model, tokens, cases))


def write(results: Path, model: Path, tokens: int, cases: list[dict[str, Any]]) -> Path:
    """The record of all cases."""
    done = [found for found in cases if "predicted_pass_s" in found]
    name = "{budget_percent:g}%_pass_s"
    record = Record(
        bench="prediction",
        config={"model": model.name, "dtype": "bfloat16", "prompt": 32, "tokens": tokens, "exact": False},
        repeats=min((found["repeats"] for found in done), default=0),
        median={name.format(**found): found["median"] for found in done},
        spread={name.format(**found): found["spread"] for found in done},
        limit={
            "read_bytes_per_s": summary([found["disk_rate"] for found in cases if found["disk_rate"]]),
            "seconds_within": SECONDS_WITHIN,
            "bytes_within": BYTES_WITHIN,
        },
        baseline={name.format(**found): {"predicted_pass_s": found["predicted_pass_s"]} for found in done},
        answer_matches=len(done) == len(cases) and all(found["is_right"] for found in done),
        comparable=all(found["comparable"] for found in cases),
        rows=cases,
        notes=[line(found) for found in cases],
    )
    return record.write(results)


if __name__ == "__main__":
    main()
