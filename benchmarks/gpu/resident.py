"""When everything fits: decode at batch 1 against the device memory's rate, and beside transformers, compiled.

The limit is one read of every matrix at the rate that the probe measured for one-row products from memory.
transformers runs with a static cache and torch.compile (reduce-overhead), its documented best, after a warm-up.
"""

from __future__ import annotations

import json
import sys
from statistics import median
from typing import Any

from decode import row_of
from setting import MIB, Bench, block, has, saved_probe


def transformers(bench: Bench, model: Any, known: Any, prompt: list[int]) -> dict[str, Any]:
    """The other engine, in a process of its own."""
    if not has("transformers"):
        return {"engine": "transformers", "error": "not installed"}
    job, out = (bench.work / f"resident.peer.{kind}.json" for kind in ("job", "result"))
    task = {"model": str(model), "prompt": prompt, "device": bench.torch_device, "compiled": not bench.is_dry}
    job.write_text(json.dumps(task | {"tokens": bench.size.tokens}))
    out.unlink(missing_ok=True)
    child = bench.child("run_static.py", job, out)
    if not out.exists():
        return {"engine": "transformers", "error": child.why}
    found = json.loads(out.read_text())
    wanted = known.follow(prompt, bench.size.tokens, ignore_eos=True)
    return {"engine": "transformers", "error": "", "num_wrong": int(found["tokens"] != wanted), **found}


def run(bench: Bench) -> None:
    """Run, judge, write."""
    model = bench.checkpoint()
    known, probe = bench.known(model), saved_probe(bench)
    prompt = known.prompts(1, bench.size.prompt, bench.size.prompt)
    call = {"prompts": prompt, "max_tokens": bench.size.tokens, "ignore_eos": True}
    memory = {"device": 64 * MIB if bench.is_dry else "90%", "host": 64 * MIB if bench.is_dry else "50%"}
    entry = bench.zinfer(model, [{"name": "resident", "memory": memory, "calls": [call]}])[0]
    row, peer = row_of(entry, known, probe), transformers(bench, model, known, prompt[0])
    rate, pass_s = probe.get("gemv_bytes_per_s"), row.get("pass_s")
    limit_s = entry["plan"]["weight_bytes"] / rate if rate and pass_s else None
    is_right = not row["error"] and not row["num_wrong"]
    ratio = None
    if is_right and not peer["error"] and not peer["num_wrong"]:
        ratio = median(peer["pass_s"]) / pass_s
    bench.record(
        {
            "pass_s": pass_s,
            "bandwidth_share": limit_s / pass_s if limit_s and pass_s else None,
            "transformers_ratio": ratio,
            "resident_share": row.get("resident_share"),
        },
        [row, peer],
        is_right=is_right and not peer.get("num_wrong"),
        limit=probe | ({"pass_s": limit_s} if limit_s else {}),
        notes=[
            f"{name}: {error}"
            for name, error in (("zinfer", row["error"]), ("transformers", peer["error"]))
            if error
        ],
    )


main = block(__doc__, "resident", run, 300)

if __name__ == "__main__":
    sys.exit(main())
