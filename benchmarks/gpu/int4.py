"""What 4.5 bits per weight buy when the link binds: the pass time's ratio over that of the bytes.

The same known checkpoint, stored anew as int4 by `zinfer shard`, nothing resident, batch 1; beside it the published
words.  Known continuations have margins that no format crosses, so that every token is checked.
"""

from __future__ import annotations

import sys
from statistics import median
from typing import Any

from decode import row_of, steady
from harness import made_store
from setting import MIB, Bench, block, saved_probe


def run(bench: Bench) -> None:
    """Shard, run both, write."""
    model = bench.checkpoint()
    known, probe = bench.known(model), saved_probe(bench)
    work, most_s = bench.work, max(bench.left_s - 60, 60)
    store = made_store(model, work / f"{model.name}-int4", "int4", work / "shard.log", most_s)
    prompt = known.prompts(1, bench.size.prompt, bench.size.prompt)
    common: dict[str, Any] = {
        "memory": {"host": 64 * MIB if bench.is_dry else "90%"},
        "resident_share": 0.0,
        "slack_bytes": bench.size.slack,
        "calls": [{"prompts": prompt, "max_tokens": bench.size.tokens, "ignore_eos": True}],
    }
    found = bench.zinfer(model, [{"name": "bf16"} | common, {"name": "int4", "model": str(store)} | common])
    rows = [row_of(entry, known, probe) for entry in found]
    figures: dict[str, float | None] = {}
    if not any(row["error"] for row in rows):
        moved = [median(done["bytes"].get("h2d", 0) for done in steady(entry)) for entry in found]
        speedup = rows[0]["pass_s"] / rows[1]["pass_s"]
        figures = {
            "speedup": speedup,
            "byte_ratio": moved[0] / moved[1] if moved[1] else None,
            "share_of_byte_ratio": speedup * moved[1] / moved[0] if moved[0] and moved[1] else None,
        }
    bench.record(
        figures,
        rows,
        is_right=all(not row["error"] and not row["num_wrong"] for row in rows),
        limit=probe,
        notes=[f"{row['name']}: {row['error']}" for row in rows if row["error"]],
    )


main = block(__doc__, "int4", run, 420)

if __name__ == "__main__":
    sys.exit(main())
