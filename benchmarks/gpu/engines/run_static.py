"""transformers, all on the device: static cache, compiled.  In: a task.  Out: seconds per decode pass, tokens."""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StaticCache


def passes(
    model: Any, step: Any, prompt: list[int], tokens: int, device: str
) -> tuple[list[int], list[float]]:
    """Greedy tokens and the seconds of every decode pass."""
    length = len(prompt) + tokens
    cache = StaticCache(config=model.config, max_cache_len=length)
    ids, at = torch.tensor([prompt], device=device), torch.arange(len(prompt), device=device)
    out = model(input_ids=ids, cache_position=at, past_key_values=cache, use_cache=True)
    token = out.logits[:, -1].argmax(-1, keepdim=True)
    found, seconds = [int(token)], []
    for number in range(tokens - 1):
        start = time.perf_counter()
        where = torch.tensor([len(prompt) + number], device=device)
        out = step(input_ids=token, cache_position=where, past_key_values=cache, use_cache=True)
        token = out.logits[:, -1].argmax(-1, keepdim=True).clone()
        found.append(int(token))
        seconds.append(time.perf_counter() - start)
    return found, seconds


def main() -> None:
    """Load, warm up, measure."""
    task = json.loads(Path(sys.argv[1]).read_text())
    device = task["device"]
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.bfloat16).to(device).eval()
    step = torch.compile(model, mode="reduce-overhead", fullgraph=False) if task["compiled"] else model
    with torch.inference_mode():
        for _ in range(2 if task["compiled"] else 0):
            passes(model, step, task["prompt"], 8, device)
        found, seconds = passes(model, step, task["prompt"], task["tokens"], device)
    told = {"tokens": found, "pass_s": seconds[2:] or seconds, "compiled": task["compiled"]}
    Path(sys.argv[2]).write_text(json.dumps(told | {"versions": {"transformers": version("transformers")}}))


if __name__ == "__main__":
    main()
