"""Larger shapes, as disk and memory allow, each checked first: one random checkpoint at a time, removed afterwards.

Llama's shape with more layers (24 B) is known, so that its tokens are checked; OPT-30B is plain random, and its check
is that two placements give the same tokens.  Decode at batch 1 from host memory, and where that is too small from disk.
"""

from __future__ import annotations

import shutil
import sys
from typing import Any

from decode import row_of
from known import FACTS, rewrite
from setting import MIB, TINY, Bench, block, saved_probe, shape_config, write

SHAPES = {"24b": ("llama-3-8b", {"num_hidden_layers": 104}), "opt-30b": ("opt-30b", {})}


def config_of(bench: Bench, name: str) -> dict[str, Any]:
    """The shape's config, or a tiny one."""
    shape, changes = SHAPES[name]
    if bench.is_dry:
        return TINY | {"num_hidden_layers": 4}
    return shape_config(shape) | changes


def one(bench: Bench, name: str, probe: dict[str, float]) -> dict[str, Any]:
    """Make, run, remove."""
    from zinfer.spec.read import read_spec

    config = config_of(bench, name)
    folder = bench.work / f"larger-{name}"
    is_known = config["architectures"] == ["LlamaForCausalLM"]
    try:
        bench.need_disk(folder, 2 * read_spec(config).num_parameters)
        write(config, folder)
        if is_known:
            rewrite(folder, 4, (4, 8), (2, 4))
        known = bench.known(folder) if (folder / FACTS).exists() else None
        length = bench.size.prompt
        prompt = known.prompts(1, length, length) if known else [[300 + 7 * i for i in range(length)]]
        call = {"prompts": prompt, "max_tokens": min(bench.size.tokens, 8), "ignore_eos": True}
        host = {"host": 64 * MIB if bench.is_dry else "90%"}
        common = {"calls": [call], "slack_bytes": 2 * bench.size.slack, "memory": host}
        entries = [{"name": f"{name}, host", "resident_share": 0.0} | common]
        if not known:
            entries.append({"name": f"{name}, half", "resident_share": 0.3} | common)
        found = bench.zinfer(folder, entries)
        row = row_of(found[0], known, probe) if known else _unknown_row(found)
        return row | {"name": name}
    except RuntimeError as error:
        return {"name": name, "error": str(error)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unknown_row(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a checkpoint whose tokens are not known: right is what both placements say."""
    for entry in found:
        if entry["error"]:
            return {"error": entry["error"]}
    same = found[0]["calls"][0]["outputs"] == found[1]["calls"][0]["outputs"]
    passes = [done for done in found[0]["calls"][0]["passes"] if done["is_decode"] and not done["is_first"]]
    seconds = sorted(done["seconds"] for done in passes)
    return {
        "error": "",
        "num_wrong": int(not same),
        "pass_s": seconds[len(seconds) // 2] if seconds else None,
    }


def run(bench: Bench) -> None:
    """Every shape there is room and time for."""
    probe, rows = saved_probe(bench), []
    for name in ("24b",) if bench.is_dry else SHAPES:
        if bench.left_s < (0 if bench.is_dry else 150):
            rows.append({"name": name, "error": "no time was left"})
            continue
        rows.append(one(bench, name, probe))
    right = [row for row in rows if not row["error"]]
    bench.record(
        {f"pass_s, {row['name']}": row["pass_s"] for row in right},
        rows,
        is_right=bool(right) and not any(row["num_wrong"] for row in right),
        limit=probe,
        notes=[f"{row['name']}: {row['error']}" for row in rows if row["error"]],
    )


main = block(__doc__, "larger", run, 480)

if __name__ == "__main__":
    sys.exit(main())
