"""FlexGen with dummy weights: its own policy, its own timers, its own metric.  In: a task.  Out: a run per batch.

All weights in page-locked host memory, cache and activations on the device while they fit (the setting that its own
examples use when the model does not fit), overlap on.  Dummy weights are all ones: speed only, there is no answer.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from flexgen.compression import CompressionConfig
from flexgen.flex_opt import OptLM, Policy
from flexgen.opt_config import get_opt_config
from flexgen.timer import timers
from flexgen.utils import ExecutionEnv

PROMPT, OUTPUT = 512, 32
PLACES = ((100, 0), (50, 50), (0, 100))  # of the cache: device, host; the first that fits


def policy(batch: int, micros: int, cache: tuple[int, int]) -> Policy:
    """Weights on the host, activations on the device, no compression."""
    off = CompressionConfig(num_bits=4, group_size=64, group_dim=0, symmetric=False)
    off_cache = CompressionConfig(num_bits=4, group_size=64, group_dim=2, symmetric=False)
    return Policy(
        batch,
        micros,
        0,
        100,
        *cache,
        100,
        0,
        True,
        True,
        True,
        cache[1] > 0,
        1.0,
        False,
        off,
        False,
        off_cache,
    )


def one(shape: str, batch: int, micros: int) -> dict[str, Any]:
    """The first place of the cache that fits: warm up, then generate.  Raises torch.OutOfMemoryError if none does."""
    count = batch * micros
    inputs = [[300 + (7 * i + j) % 40000 for j in range(PROMPT)] for i in range(count)]
    for cache in PLACES:
        env = ExecutionEnv.create("/tmp/flexgen-offload")
        try:
            model = OptLM(get_opt_config(shape), env, "_DUMMY_", policy(batch, micros, cache))
            model.generate([row[:32] for row in inputs], max_new_tokens=2)
            timers("generate").reset()
            model.generate(inputs, max_new_tokens=OUTPUT)
            costs = timers("generate").costs
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        finally:
            env.close_copy_threads()
        return {
            "sequences": count,
            "batch": [batch, micros],
            "cache_percent": cache,
            "weights_percent": [0, 100],
            "tokens_per_s": count * OUTPUT / sum(costs),
            "prefill_s": costs[0],
            "pass_s": sorted(costs[1:])[len(costs) // 2],
        }
    raise torch.OutOfMemoryError(f"{count} sequences fit with no place of the cache")


def main() -> None:
    """Every batch; those that do not fit are left out."""
    task = json.loads(Path(sys.argv[1]).read_text())
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(task["cap_bytes"] / total, 1.0), 0)
    runs = []
    for batch, micros in task["batches"]:
        try:
            runs.append(one(task["shape"], batch, micros))
        except torch.OutOfMemoryError:
            continue
    Path(sys.argv[2]).write_text(json.dumps({"runs": runs, "versions": {"flexgen": version("flexgen")}}))


if __name__ == "__main__":
    main()
