"""zinfer, one setting after another, in one process.  In: a task (JSON).  Out: a list of what each setting did.

Every entry names its memory and runtime settings and its calls.  Its plan is appended to the predictions, with the time
of day, before any of its weights is read.  One that fails keeps its error, and the next one goes on.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from zinfer import LLM, SamplingParams
from zinfer.errors import ZinferError


def run(task: dict[str, Any]) -> list[dict[str, Any]]:
    """All entries."""
    found = []
    for entry in task["series"]:
        try:
            found.append(one(task, entry))
        except (ZinferError, RuntimeError) as error:
            found.append({"name": entry["name"], "asked": entry, "error": f"{type(error).__name__}: {error}"})
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return found


def one(task: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """Open, predict, call."""
    cap(entry.get("cap_bytes"))
    memory = dict(entry["memory"])
    if "resident_share" in entry:
        memory["device"] = budget_for(task, entry, memory)
    before = status("VmRSS")
    with opened(task, entry, memory) as llm:
        largest = max(entry["calls"], key=lambda call: len(call["prompts"]) * call["max_tokens"])
        plan = llm.fit(largest["prompts"], params(largest))
        predict(task, entry, plan.to_dict())
        calls = []
        for call in entry["calls"]:
            passed, start = len(llm.stats.passes), time.perf_counter()
            outputs = llm.generate(call["prompts"], params(call))
            seconds = time.perf_counter() - start
            passes = [
                {
                    "seconds": done.seconds,
                    "rows": done.rows,
                    "sequences": done.sequences,
                    "is_first": done.is_first,
                    "is_decode": done.is_decode,
                    "bytes": dict(done.num_bytes),
                }
                for done in llm.stats.passes[passed:]
            ]
            tokens = [list(output.outputs[0].token_ids) for output in outputs]
            calls.append({"seconds": seconds, "outputs": tokens, "passes": passes})
        uses = {str(use.tier): asdict(use) | {"total": use.total} for use in llm.plan.uses}
        chunks = llm.plan.table.streamable
        weights = sum(chunk.nbytes for chunk in chunks)
        resident = sum(chunk.nbytes for chunk in chunks if llm.plan.placement.resident(chunk.id))
        stats = llm.stats.to_dict()
        pinned = max(
            status("VmPin"), stats["locked_bytes"]
        )  # not every driver tells the kernel what it has locked
        locked = sum(use.locked for use in llm.plan.uses)
    return {
        "name": entry["name"],
        "asked": entry,
        "error": "",
        "calls": calls,
        "stats": stats,
        "plan": {
            "forecast": plan.to_dict()["forecast"],
            "batch": llm.plan.workload.batch,
            "uses": uses,
            "locked": locked,
            "weight_bytes": weights,
            "resident_share": resident / weights,
        },
        "memory": memory,
        "device_peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "host": {"rss_before": before, "peak": status("VmHWM"), "pinned": pinned},
    }


def opened(task: dict[str, Any], entry: dict[str, Any], memory: dict[str, Any]) -> LLM:
    """The engine with the entry's settings."""
    return LLM(
        entry.get("model", task["model"]),
        device=task["device"],
        memory=memory,
        exact=entry.get("exact", False),
        machine=task["machine"],
        **task["runtime"] | entry.get("runtime", {}),
    )


def budget_for(task: dict[str, Any], entry: dict[str, Any], memory: dict[str, Any]) -> int:
    """Device bytes with which about `resident_share` of the weights stay, `slack_bytes` for slots beside them."""
    with opened(task, entry, memory | {"device": "100%"}) as llm:
        call = entry["calls"][0]
        plan = llm.fit(call["prompts"], params(call))
        weights = sum(chunk.nbytes for chunk in plan.table.streamable)
        return int(plan.reserve.total + entry["slack_bytes"] + entry["resident_share"] * weights)


def params(call: dict[str, Any]) -> SamplingParams:
    """Greedy."""
    ignore = call.get("ignore_eos", False)
    return SamplingParams(max_tokens=call["max_tokens"], temperature=0.0, ignore_eos=ignore)


def predict(task: dict[str, Any], entry: dict[str, Any], plan: dict[str, Any]) -> None:
    """Append the plan to the predictions; flushed before the run begins."""
    told = {
        "unix_s": time.time(),
        "name": entry["name"],
        "forecast": plan["forecast"],
        "tiers": plan["tiers"],
    }
    with Path(task["predictions"]).open("a") as file:
        file.write(json.dumps(told) + "\n")


def cap(nbytes: int | None) -> None:
    """Simulate a smaller device: torch refuses to allocate more than this.  None: all of it."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min((nbytes or total) / total, 1.0), 0)


def status(field: str) -> int:
    """Bytes that /proc/self/status gives for a field; 0 where it has none."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    done = run(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(done))
