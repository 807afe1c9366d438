"""Many requests.  FlexGen's metric at the planner's batch, and a ragged queue; both against their roofline.

512 ids in and 32 tokens out per request, generated tokens over prefill and decode together; then 128 requests of 16 to
128 ids and 8 to 64 tokens that end in the end-of-sequence token, which none can foresee.  Half of the weights' bytes is
what the device may hold.  The roofline is what the busiest link or engine takes by the rates measured in this run.
"""

from __future__ import annotations

import sys
from statistics import median
from typing import Any

from setting import MIB, Bench, block, checkpoint_bytes, num_wrong, saved_probe


def figures_of(entry: dict[str, Any], known: Any) -> dict[str, Any]:
    """One entry's row."""
    if entry["error"]:
        return {"name": entry["name"], "error": entry["error"]}
    passes = [done for call in entry["calls"] for done in call["passes"]]
    steady = [done for done in passes if done["is_decode"] and not done["is_first"]]
    tokens = sum(len(output) for call in entry["calls"] for output in call["outputs"])
    forecast, seconds = entry["plan"]["forecast"], sum(done["seconds"] for done in passes)
    pass_s = median(done["seconds"] for done in steady) if steady else None
    limit_s = max(forecast["busy_s"].values())
    return {
        "name": entry["name"],
        "error": "",
        "num_wrong": num_wrong(known, entry),
        "output_tokens_per_s": tokens / seconds,
        "whole_tokens_per_s": tokens / sum(call["seconds"] for call in entry["calls"]),
        "passes": len(passes),
        "pass_s": pass_s,
        "limit_s": limit_s,
        "binding": forecast["binding"],
        "roofline_share": limit_s / pass_s if pass_s else None,
        "prediction_error": abs(pass_s / forecast["pass_s"] - 1) if pass_s else None,
        "batch": entry["plan"]["batch"],
        "resident_share": entry["plan"]["resident_share"],
    }


def run(bench: Bench) -> None:
    """Run, judge, write."""
    model = bench.checkpoint()
    known = bench.known(model)
    memory = {
        "host": 64 * MIB if bench.is_dry else "90%",
        "device": 4 * MIB if bench.is_dry else checkpoint_bytes(model) // 2,
    }
    count, length, tokens = (8, 16, 3) if bench.is_dry else (256, 512, 32)
    uniform = {"prompts": known.prompts(count, length, length), "max_tokens": tokens, "ignore_eos": True}
    longest = bench.size.outputs[1]
    ragged = {"prompts": [each.prompt for each in known.requests], "max_tokens": longest, "ignore_eos": False}
    found = bench.zinfer(
        model,
        [
            {"name": "FlexGen's metric", "memory": memory, "calls": [uniform]},
            {"name": "ragged", "memory": memory, "calls": [ragged]},
        ],
    )
    rows = [figures_of(entry, known) for entry in found]
    first, second = rows
    bench.record(
        {
            "roofline_share": first.get("roofline_share"),
            "output_tokens_per_s": first.get("output_tokens_per_s"),
            "ragged_output_tokens_per_s": second.get("output_tokens_per_s"),
            "prediction_error": first.get("prediction_error"),
        },
        rows,
        is_right=all(not row["error"] and not row["num_wrong"] for row in rows),
        limit=saved_probe(bench),
        config={"memory": memory, "requests": [count, length, tokens]},
        notes=[f"{row['name']}: {row['error']}" for row in rows if row["error"]],
    )


main = block(__doc__, "throughput", run, 300)

if __name__ == "__main__":
    sys.exit(main())
