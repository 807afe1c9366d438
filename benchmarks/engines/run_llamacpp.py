"""llama.cpp through the xllamacpp wheel.  In: a job and a GGUF of the same weights.  Out: its result.

Decode is timed on its own greedy stream, token by token.  Its interface cannot be fed tokens while it streams, so
log-probabilities of the reference's prefixes are asked for afterwards, untimed, one request per prefix with the
prompt cache on: each request then evaluates one token, as decode does.  `options`: gguf, load_mode ("auto", which
maps the file, or "none"), and batch, the largest number of tokens in one pass.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import job
import numpy as np
import xllamacpp as xc

GREEDY = {"temperature": 0.0, "ignore_eos": True}


def serve(task: job.Job) -> tuple[xc.Server, dict[str, Any]]:
    """An engine in this process.  Its thread count is the default unless the job names one; no warm-up pass."""
    params = xc.CommonParams()
    params.model.path = task.options["gguf"]
    params.load_mode = getattr(xc.llama_load_mode, f"LLAMA_LOAD_MODE_{task.options['load_mode'].upper()}")
    params.n_parallel = len(task.prompts)
    params.n_ctx = len(task.prompts) * 256
    params.n_ubatch = max(params.n_ubatch, task.options.get("batch", 0))
    params.n_batch = max(params.n_batch, params.n_ubatch)
    params.warmup = False
    params.cache_ram_mib = 0  # no second cache of prompts beside the slots' own
    params.verbosity = 0
    if task.threads:
        params.cpuparams.n_threads = task.threads
        params.cpuparams_batch.n_threads = task.threads
    server = xc.Server(params)
    settings = {
        "load_mode": task.options["load_mode"],
        "n_ctx": params.n_ctx,
        "n_batch": params.n_batch,
        "n_ubatch": params.n_ubatch,
        "threads": params.cpuparams.n_threads if params.cpuparams.n_threads > 0 else "default",
        "system": xc.get_system_info(),
    }
    return server, settings


def failed(answer: Any) -> bool:
    """Whether a response of the engine is an error."""
    return isinstance(answer, dict) and "error" in answer


def logits_of(server: xc.Server, prefix: list[int], vocab: int) -> np.ndarray:
    """Log-probabilities [vocab] of the token after `prefix`.  Raises RuntimeError if the engine refuses."""
    ask = {
        **GREEDY,
        "prompt": prefix,
        "n_predict": 1,
        "logprobs": vocab,
        "stream": False,
        "cache_prompt": True,
    }
    answer = server.handle_completions(ask)
    if failed(answer):
        raise RuntimeError(f"llama.cpp refused a request: {answer['error']}")
    row = np.full(vocab, -np.inf, np.float32)
    for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        row[entry["id"]] = entry["logprob"]
    return row


def decode(task: job.Job) -> job.Outcome:
    """One greedy stream of `task.steps` tokens, then the reference's prefixes."""
    import_rss, began = job.rss_bytes(), job.clock()
    server, settings = serve(task)
    arrivals: list[float] = []
    reads: list[int] = []

    def on_token(chunk: dict[str, Any]) -> bool:
        if failed(chunk):
            raise RuntimeError(f"llama.cpp refused the prompt: {chunk['error']}")
        if chunk["choices"][0]["finish_reason"] is None:
            arrivals.append(job.clock())
            reads.append(job.disk_bytes())
        return False

    ask = {**GREEDY, "prompt": task.prompts[0], "n_predict": task.steps, "stream": True, "cache_prompt": True}
    server.handle_completions(ask, on_token)
    if len(arrivals) != task.steps:
        raise RuntimeError(f"{task.steps} tokens were asked for, {len(arrivals)} arrived")
    seconds = [later - earlier for earlier, later in pairwise(arrivals)]
    forced, vocab = (task.forced or [[]])[0], task.options["vocab_size"]
    prefixes = [task.prompts[0] + forced[:step] for step in range(len(forced))]
    rows = np.stack([logits_of(server, prefix, vocab) for prefix in prefixes]) if prefixes else None
    return job.Outcome(
        pass_s=seconds,
        first_token_s=arrivals[0] - began,
        argmax=[int(token) for token in rows.argmax(-1)] if rows is not None else [],
        logits=rows,
        settings=settings,
        log_softmax=True,
        read_bytes=[later - earlier for earlier, later in pairwise(reads)],
        import_rss_bytes=import_rss,
    )


def prefill(task: job.Job) -> job.Outcome:
    """All prompts at once, nothing kept between the passes; then each prompt's log-probabilities, untimed."""
    import_rss, began = job.rss_bytes(), job.clock()
    server, settings = serve(task)
    ask = {**GREEDY, "prompt": task.prompts, "n_predict": 1, "stream": False, "cache_prompt": False}
    seconds, reads, first_token_s = [], [], 0.0
    for step in range(task.steps):
        read, start = job.disk_bytes(), job.clock()
        answer = server.handle_completions(ask)
        stop = job.clock()
        if failed(answer):
            raise RuntimeError(f"llama.cpp refused the prompts: {answer['error']}")
        if step == 0:
            first_token_s = stop - began
        seconds.append(stop - start)
        reads.append(job.disk_bytes() - read)
    vocab = task.options["vocab_size"]
    rows = np.stack([logits_of(server, prompt, vocab) for prompt in task.prompts])
    argmax = [int(token) for token in rows.argmax(-1)]
    return job.Outcome(
        seconds,
        first_token_s,
        argmax,
        rows,
        settings,
        log_softmax=True,
        read_bytes=reads,
        import_rss_bytes=import_rss,
    )


if __name__ == "__main__":
    job.main(lambda task: (decode if task.kind == "decode" else prefill)(task), "xllamacpp", "gguf")
