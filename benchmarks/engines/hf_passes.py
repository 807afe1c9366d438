"""Timed passes of a transformers model.  In: a model that is called like one, a job.  Out: seconds, tokens, logits.

The loop is barer than `generate()`, which favours the peers: one forward per pass, the cache handed along.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from job import Job, Outcome, clock, disk_bytes, rss_bytes


def run(job: Job, load: Callable[[Job], tuple[Any, dict[str, Any]]]) -> Outcome:
    """Load with `load` (model, settings) and run the job's passes."""
    if job.threads:
        torch.set_num_threads(job.threads)
    import_rss = rss_bytes()
    began = clock()
    model, settings = load(job)
    passes = decode if job.kind == "decode" else prefill
    with torch.inference_mode():
        outcome = passes(model, job, began, settings | {"threads": torch.get_num_threads()})
    outcome.import_rss_bytes = import_rss
    return outcome


def decode(model: Any, job: Job, began: float, settings: dict[str, Any]) -> Outcome:
    """One prompt, `job.steps` tokens, each pass fed with the reference's token."""
    ids, cache = torch.tensor([job.prompts[0]]), None
    forced = job.forced[0] if job.forced else None
    seconds, rows, reads, first_token_s = [], [], [], 0.0
    for step in range(job.steps):
        read, start = disk_bytes(), clock()
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[0, -1].float()
        token = int(logits.argmax())
        stop = clock()
        rows.append(logits.numpy())
        ids = torch.tensor([[forced[step] if forced else token]])
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
