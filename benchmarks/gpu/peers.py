"""Other engines on the same machine, weights, ids and device budget, each with its best documented settings.

At 8 B: batch 1 beside Accelerate (the rest of the model in host memory) and AirLLM (from disk), device memory capped at
the same bytes for all.  FlexGen runs OPT-6.7B with its dummy weights and its own metric (prompt 512, output 32), beside
zinfer at that shape; ZeRO-Inference runs the 8 B model at its best of three batches, beside zinfer at the planner's.
The cap is simulated (set_per_process_memory_fraction).  A peer that cannot be imported is missing, never guessed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from decode import row_of, steady
from setting import MIB, Bench, block, has, num_wrong, saved_probe, shape_config, weight_bytes, write

FLEXGEN_BATCHES = ((32, 4), (64, 4), (64, 8))  # sequences of a micro-batch, micro-batches
ZERO_BATCHES = (32, 128, 256)


def ask(bench: Bench, model: Path, name: str, task: dict[str, Any]) -> dict[str, Any]:
    """One peer in a process of its own; its result, or why there is none."""
    stem = bench.work / f"peers.{name}"
    job, out = stem.with_suffix(".job.json"), stem.with_suffix(".result.json")
    job.write_text(json.dumps({"model": str(model), "logits": f"{stem}.npy"} | task))
    out.unlink(missing_ok=True)
    child = bench.child(f"run_{name}.py", job, out)
    return json.loads(out.read_text()) if out.exists() else {"error": child.why}


def at_batch_one(bench: Bench, model: Path, known: Any, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Accelerate or AirLLM: one prompt, greedy; every token is compared with what must come."""
    if not has(name):
        return {"engine": name, "error": "not installed"}
    prompt = known.prompts(1, bench.size.prompt, bench.size.prompt)[0]
    steps = bench.size.tokens if name == "accelerate" else max(bench.size.tokens // 3, 3)
    common = {"device": bench.torch_device, "cap_bytes": None if bench.is_dry else bench.cap(model)}
    task = {"kind": "decode", "prompts": [prompt], "steps": steps, "options": common | options}
    found = ask(bench, model, name, task)
    if "error" in found:
        return {"engine": name, "error": found["error"]}
    wanted = known.follow(prompt, steps, ignore_eos=True)
    return {
        "engine": name,
        "error": "",
        "num_wrong": int(found["tokens"] != wanted),
        "pass_s": median(found["pass_s"][2:] or found["pass_s"]),
        "settings": found["settings"],
        "versions": found["versions"],
        "device_peak_bytes": found["facts"].get("device_peak_bytes"),
    }


def flexgen(bench: Bench) -> dict[str, Any]:
    """FlexGen's best of some batches at OPT-6.7B, dummy weights (speed only), and zinfer on the same shape."""
    if bench.is_dry or not has("flexgen"):
        return {"engine": "flexgen", "error": "a dry run" if bench.is_dry else "not installed"}
    task = {"batches": FLEXGEN_BATCHES, "shape": "facebook/opt-6.7b", "cap_bytes": bench.size.budget}
    found = ask(bench, Path("_DUMMY_"), "flexgen", task)
    if "error" in found:
        return {"engine": "flexgen", "error": found["error"]}
    folder = bench.work / "opt-6.7b"
    if not (folder / "config.json").exists():
        config = shape_config("opt-6.7b")
        bench.need_disk(folder, weight_bytes(config))
        write(config, folder)
    best = max(found["runs"], key=lambda run: run["tokens_per_s"])
    sequences = best["sequences"]
    prompts = [[300 + (7 * i + j) % 40000 for j in range(512)] for i in range(sequences)]
    call = {"prompts": prompts, "max_tokens": 32, "ignore_eos": True}
    entry = bench.zinfer(folder, [ours("FlexGen's metric", bench, bench.size.budget, call)])[0]
    row = {"engine": "flexgen", "error": entry["error"], "runs": found["runs"], "versions": found["versions"]}
    if not entry["error"]:
        seconds = sum(done["seconds"] for done in entry["calls"][0]["passes"])
        mine = 32 * sequences / seconds
        row |= {"zinfer_tokens_per_s": mine, "tokens_per_s": best["tokens_per_s"]}
        row["ratio"] = mine / best["tokens_per_s"]
    return row


def zero(bench: Bench, model: Path, known: Any) -> dict[str, Any]:
    """ZeRO-Inference at its best batch: decode tokens a second."""
    if bench.is_dry or not has("deepspeed"):
        return {"engine": "zero", "error": "a dry run" if bench.is_dry else "not installed"}
    prompts = known.prompts(max(ZERO_BATCHES), bench.size.prompt, bench.size.prompt)
    task = {"kind": "window", "prompts": prompts, "steps": 8, "cap_bytes": bench.cap(model)}
    found = ask(bench, model, "zero", task | {"batches": ZERO_BATCHES, "eos": known.eos})
    if "error" in found:
        return {"engine": "zero", "error": found["error"]}
    wrong = 0
    for run in found["runs"]:
        for prompt, came in zip(prompts, run.pop("outputs"), strict=False):
            wrong += came != known.follow(prompt, len(came), ignore_eos=True)
    return {"engine": "zero", "error": "", "num_wrong": wrong, **found}


def ours(name: str, bench: Bench, cap: int, call: dict[str, Any]) -> dict[str, Any]:
    """zinfer within the peers' cap; a tenth of it is left to the driver's own needs and the allocator's edges."""
    host = {"host": 64 * MIB if bench.is_dry else "90%", "device": int(cap * 0.9)}
    return {"name": name, "memory": host, "calls": [call], "cap_bytes": cap}


def run(bench: Bench) -> None:
    """Everyone in turn; ratios only where both answers are right."""
    model = bench.checkpoint()
    known, probe, cap = bench.known(model), saved_probe(bench), bench.cap(model)
    one = known.prompts(1, bench.size.prompt, bench.size.prompt)
    many = known.prompts(8 if bench.is_dry else 256, bench.size.prompt, bench.size.prompt)
    mine = bench.zinfer(
        model,
        [
            ours(
                "batch 1", bench, cap, {"prompts": one, "max_tokens": bench.size.tokens, "ignore_eos": True}
            ),
            ours("many", bench, cap, {"prompts": many, "max_tokens": 8, "ignore_eos": True}),
        ],
    )
    (bench.work / "offload").mkdir(exist_ok=True)
    accelerate = at_batch_one(bench, model, known, "accelerate", placed(bench, cap))
    rows = [accelerate, flexgen(bench), zero(bench, model, known)]
    # AirLLM last: it splits the checkpoint, and what disk and time are left decides.
    rows.insert(1, airllm(bench, model, known))
    alone = row_of(mine[0], known, probe)
    figures: dict[str, float | None] = {"zinfer_pass_s": alone.get("pass_s")}
    for row in rows[:2]:
        ratio = None
        if not row["error"] and not row["num_wrong"] and alone.get("pass_s") and not alone["num_wrong"]:
            ratio = row["pass_s"] / alone["pass_s"]
        figures[f"{row['engine']}_ratio"] = ratio
    figures["flexgen_ratio"] = rows[2].get("ratio")
    if not mine[1]["error"] and not num_wrong(known, mine[1]):
        passes = steady(mine[1])
        rate = median(done["sequences"] / done["seconds"] for done in passes)
        figures["zinfer_decode_tokens_per_s"] = rate
        is_right = rows[3].get("tokens_per_s") and not rows[3]["num_wrong"]
        figures["zero_ratio"] = rate / rows[3]["tokens_per_s"] if is_right else None
    for row in rows:
        print(
            f"  {row['engine']:12} {row['error'] or row.get('settings') or row.get('runs') or row}"[:400],
            flush=True,
        )
    bench.record(
        figures,
        [alone, *rows],
        is_right=not alone.get("num_wrong", 1) and not any(row.get("num_wrong") for row in rows),
        limit=probe,
        config={"cap_bytes": cap, "cap": "simulated: set_per_process_memory_fraction"},
        notes=[f"{row['engine']}: {row['error']}" for row in rows if row["error"]],
    )


def placed(bench: Bench, cap: int) -> dict[str, Any]:
    """Accelerate's memory: as much of the device as leaves room for a layer and the cache; the rest in host memory."""
    if bench.is_dry:
        return {"folder": str(bench.work / "offload"), "max_memory": {"cpu": cap}}
    return {
        "folder": str(bench.work / "offload"),
        "max_memory": {"0": int(cap * 0.75), "cpu": 90 * 2**30},
    }


def airllm(bench: Bench, model: Path, known: Any) -> dict[str, Any]:
    """AirLLM splits the checkpoint once, outside the measurement, if there is room."""
    if not has("airllm"):
        return {"engine": "airllm", "error": "not installed"}
    split = bench.work / "airllm"
    if not (split / "ready").exists():
        split.mkdir(exist_ok=True)
        try:
            bench.need_disk(split / "model", sum(file.stat().st_size for file in model.glob("*.safetensors")))
        except RuntimeError as error:
            return {"engine": "airllm", "error": str(error)}
        child = bench.child("run_airllm.py", "--split", model, split, bench.torch_device)
        if child.returncode:
            return {"engine": "airllm", "error": f"could not split: {child.why}"}
        (split / "ready").touch()
    return at_batch_one(bench, model, known, "airllm", {"folder": str(split)})


main = block(__doc__, "peers", run, 480)

if __name__ == "__main__":
    sys.exit(main())
