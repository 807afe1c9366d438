"""DeepSpeed ZeRO-Inference with its weights in page-locked host memory.  In: a task.  Out: its best batch.

Stage 3 parameters on the CPU, the prefetch bucket made large enough for two layers (the default is smaller than one),
no persistent parameters.  One process, no launcher.  `task.batches` are tried, the fastest that fits counts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import deepspeed
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig


def settings_of(folder: str, batch: int) -> dict[str, Any]:
    """The configuration, with buckets from the model's own layer."""
    config = AutoConfig.from_pretrained(folder)
    layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    return {
        "bf16": {"enabled": True},
        "train_micro_batch_size_per_gpu": batch,
        "steps_per_print": 10**9,
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "cpu", "pin_memory": True},
            "stage3_prefetch_bucket_size": 2 * layer,
            "stage3_max_live_parameters": 4 * layer,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": 0,
        },
    }


def decode(model: Any, prompts: list[list[int]], steps: int) -> tuple[list[float], list[list[int]]]:
    """Seconds of decode passes of one static batch, and every sequence's tokens."""
    ids, cache, seconds = torch.tensor(prompts, device="cuda:0"), None, []
    outputs: list[list[int]] = [[] for _ in prompts]
    with torch.inference_mode():
        for step in range(steps + 1):
            start = time.perf_counter()
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            for output, (token,) in zip(outputs, ids.tolist(), strict=True):
                output.append(token)
            if step:
                seconds.append(time.perf_counter() - start)
    return seconds, outputs


def main() -> None:
    """Load once, try every batch."""
    task = json.loads(Path(sys.argv[1]).read_text())
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
    }
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(task["cap_bytes"] / total, 1.0), 0)
    deepspeed.init_distributed()
    settings = settings_of(task["model"], 1)
    keep = HfDeepSpeedConfig(settings)  # transformers looks for it while it loads
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.bfloat16)
    engine = deepspeed.initialize(model=model, config_params=settings)[0]
    engine.module.eval()
    runs = []
    for batch in task["batches"]:
        try:
            seconds, outputs = decode(engine.module, task["prompts"][:batch], task["steps"])
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        pass_s = median(seconds[2:] or seconds)
        runs.append({"batch": batch, "pass_s": pass_s, "tokens_per_s": batch / pass_s, "outputs": outputs})
    del keep
    best = max(runs, key=lambda run: run["tokens_per_s"])
    told = {"runs": runs, "tokens_per_s": best["tokens_per_s"], "settings": settings}
    Path(sys.argv[2]).write_text(json.dumps(told | {"versions": {"deepspeed": version("deepspeed")}}))


if __name__ == "__main__":
    main()
