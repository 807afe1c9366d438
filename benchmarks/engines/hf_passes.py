"""Timed passes of a transformers model.  In: a model that is called like one, a job.  Out: seconds, tokens, logits.

The loop is barer than `generate()`, which favours the peers: one forward per pass, the cache handed along.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from job import Job, Outcome, clock, disk_bytes, rss_bytes
from turn import turn_of


def run(job: Job, load: Callable[[Job], tuple[Any, dict[str, Any]]]) -> Outcome:
    """Load with `load` (model, settings) and run the job's passes."""
    if job.threads:
        torch.set_num_threads(job.threads)
    turn_of(job.options).wait()
    import_rss = rss_bytes()
    began = clock()
    model, settings = load(job)
    passes = {"decode": decode, "prefill": prefill, "window": window}[job.kind]
    with torch.inference_mode():
        outcome = passes(model, job, began, settings | {"threads": torch.get_num_threads()})
    outcome.import_rss_bytes = import_rss
    return outcome


def decode(model: Any, job: Job, began: float, settings: dict[str, Any]) -> Outcome:
    """One prompt, `job.steps` tokens, each pass fed with the reference's token."""
    device = job.options.get("device", "cpu")
    ids, cache = torch.tensor([job.prompts[0]], device=device), None
    forced = job.forced[0] if job.forced else None
    seconds, rows, reads, first_token_s = [], [], [], 0.0
    for step in range(job.steps):
        read, start = disk_bytes(), clock()
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[0, -1].float()
        token = int(logits.argmax())
        stop = clock()
        rows.append(logits.cpu().numpy())
        ids = torch.tensor([[forced[step] if forced else token]], device=device)
        if step == 0:
            first_token_s = stop - began
        else:
            seconds.append(stop - start)
            reads.append(disk_bytes() - read)
    logits_NV = np.stack(rows)
    argmax = [int(token) for token in logits_NV.argmax(-1)]
    return Outcome(seconds, first_token_s, argmax, logits_NV, settings, tokens=argmax, read_bytes=reads)


def prefill(model: Any, job: Job, began: float, settings: dict[str, Any]) -> Outcome:
    """All prompts (of equal length) in one pass, `job.steps` times; logits of each prompt's last position.

    The head is given a matrix: of `logits_to_keep=1`, which gives it one row per sequence in three dimensions, torch
    makes a batch of products where the weight needs no gradient, with a copy of the head for each sequence.
    """
    ids = torch.tensor(job.prompts)
    seconds, reads, first_token_s, logits = [], [], 0.0, None
    for step in range(job.steps):
        read, start = disk_bytes(), clock()
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, -1].contiguous()
        logits = model.lm_head(hidden).float()
        logits.argmax(-1).tolist()
        stop = clock()
        if step == 0:
            first_token_s = stop - began
        seconds.append(stop - start)
        reads.append(disk_bytes() - read)
    argmax = [int(token) for token in logits.argmax(-1)]
    return Outcome(seconds, first_token_s, argmax, logits.numpy(), settings, tokens=argmax, read_bytes=reads)


def window(model: Any, job: Job, began: float, settings: dict[str, Any]) -> Outcome:
    """One static batch, padded on the left, for `job.steps` passes after the prompts' own.

    As `generate()` does it: all rows go on until the longest has ended, and after each pass every row is asked
    whether it has.  `options.eos` ends a row; what it says later is not counted.  facts.outputs has each row's tokens.
    """
    longest, eos = max(map(len, job.prompts)), job.options["eos"]
    ids = torch.tensor([[eos] * (longest - len(prompt)) + prompt for prompt in job.prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in job.prompts])
    outputs: list[list[int]] = [[] for _ in job.prompts]
    seconds, reads, cache, turn = [], [], None, turn_of(job.options)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for step in range(job.steps + 1):
        read, start = disk_bytes(), clock()
        hidden = model.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache = hidden.past_key_values
        logits = model.lm_head(hidden.last_hidden_state[:, -1].contiguous()).float()
        ids = logits.argmax(-1, keepdim=True)
        for output, token in zip(outputs, ids[:, 0].tolist(), strict=True):
            if not output or output[-1] != eos:
                output.append(token)
        if all(output[-1] == eos for output in outputs):
            break
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        positions = positions[:, -1:] + 1
        seconds.append(clock() - start)
        reads.append(disk_bytes() - read)
        if step == 0:
            first_token_s = clock() - began
        turn.passed(step + 1)
    facts = {"outputs": outputs}
    return Outcome(seconds, first_token_s, [], None, settings, read_bytes=reads, facts=facts)
