"""How near a fully streamed prefill pass comes to the rate of the products alone.

32 prompts of 512 tokens, 16384 rows, or as many in a pass as are free; nothing resident: the arithmetic takes longer
than the link, so that streaming should cost nothing.  The share is that of the rate that the probe measured at these
shapes and rows; attention is not in it.  Every first token is checked.
"""

from __future__ import annotations

import json
import sys
from statistics import median

from clock import layer_shapes
from setting import MIB, Bench, block, num_wrong, saved_probe


def run(bench: Bench) -> None:
    """Run, judge, write."""
    model = bench.checkpoint()
    known, probe = bench.known(model), saved_probe(bench)
    count, length = bench.size.prefill
    rows = count * length
    call = {"prompts": known.prompts(count, length, length), "max_tokens": 1, "ignore_eos": True}
    entry = bench.zinfer(
        model,
        [
            {
                "name": "prefill",
                "memory": {"host": 64 * MIB if bench.is_dry else "90%"},
                "resident_share": 0.0,
                "slack_bytes": bench.size.slack if bench.is_dry else 3 * bench.size.slack,
                "runtime": {"max_rows": rows, "max_batch": count},
                "calls": [call] * (2 if bench.is_dry else 4),
            }
        ],
    )[0]
    if entry["error"]:
        raise RuntimeError(entry["error"])
    passes = [done for call in entry["calls"] for done in call["passes"] if not done["is_first"]]
    if not passes:
        raise RuntimeError("every pass also loaded: there is none to measure")
    wanted, rows = rows, max(done["rows"] for done in passes)
    full = [done for done in passes if done["rows"] == rows]
    notes = (
        [f"passes carried {rows} rows, {wanted} were asked for: more are not free"] if rows < wanted else []
    )
    pass_s = median(done["seconds"] for done in full)
    config = json.loads((model / "config.json").read_text())
    layer = sum(out * width for out, width in layer_shapes(bench))
    flops = 2 * rows * layer * config["num_hidden_layers"]
    gemm = probe.get("gemm_flops_per_s")
    wrong = num_wrong(known, entry)
    bench.record(
        {
            "pass_s": pass_s,
            "tokens_per_s": rows / pass_s,
            "flops_per_s": flops / pass_s,
            "gemm_share": flops / pass_s / gemm if gemm else None,
            "prediction_error": abs(pass_s / entry["plan"]["forecast"]["prefill_s"] - 1),
            "resident_share": entry["plan"]["resident_share"],
        },
        [{"passes": passes, "num_wrong": wrong, "plan": entry["plan"]}],
        is_right=not wrong,
        limit=probe,
        config={"rows": rows, "wanted_rows": wanted},
        notes=notes,
    )


main = block(__doc__, "prefill", run, 240)

if __name__ == "__main__":
    sys.exit(main())
