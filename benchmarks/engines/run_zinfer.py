"""zinfer through its public API.  In: a job.  Out: its result.

Passes are timed where a user sees them, between the tokens that `progress` reports; the engine's own count is kept
beside it.  `options`: prediction (a file that the plan is written to before any weight is read), machine (a machine
profile).  Without a budget the host tier is large enough for everything.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import job
import torch
from turn import turn_of

from zinfer import LLM, SamplingParams

RESIDENT = "100%"


class Ticks:
    """Callable for `progress`: when each token came, and how much had been read from disk by then."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.reads: list[int] = []

    def __call__(self, done: int, total: int, what: str) -> None:
        self.times.append(job.clock())
        self.reads.append(job.disk_bytes())


def open_llm(task: job.Job) -> LLM:
    """The engine with the job's budget; not exact, unless `runtime` says so."""
    if task.threads:
        torch.set_num_threads(task.threads)
    budget = RESIDENT if task.budget_bytes is None else task.budget_bytes
    return LLM(
        task.model,
        device="cpu",
        memory={"host": budget},
        machine=task.options.get("machine"),
        **{"exact": False} | task.options.get("runtime", {}),
    )


def predict(llm: LLM, task: job.Job, params: SamplingParams) -> dict[str, Any]:
    """Plan for this job before any weight is read; written, with the time, where `options.prediction` says."""
    plan = llm.fit(task.prompts, params).to_dict()
    stamped = {"unix_s": time.time(), "read_bytes": job.disk_bytes(), "plan": plan}
    if "prediction" in task.options:
        Path(task.options["prediction"]).write_text(json.dumps(stamped))
    return plan


def decode(task: job.Job) -> job.Outcome:
    """One prompt, `task.steps` greedy tokens; then the logits of the reference's prefixes in one pass."""
    read_before, import_rss, began = job.disk_bytes(), job.rss_bytes(), job.clock()
    params = SamplingParams(max_tokens=task.steps, temperature=0.0, ignore_eos=True)
    with open_llm(task) as llm:
        predict(llm, task, params)
        ticks = Ticks()
        output = llm.generate(task.prompts, params, progress=ticks)[0].outputs[0]
        stats: dict[str, Any] = llm.stats.to_dict()
        is_packed = bool(llm.plan.placement.packed)
        read_in_all = job.disk_bytes() - read_before
        seconds, reads = gaps(ticks.times), gaps(ticks.reads)
        logits = None
        if task.forced:
            prompt = task.prompts[0]
            rows = llm.logits(prompt + task.forced[0][:-1])
            logits = rows[len(prompt) - 1 :].numpy()
    return job.Outcome(
        pass_s=seconds,
        first_token_s=ticks.times[0] - began,
        argmax=[int(token) for token in logits.argmax(-1)] if logits is not None else [],
        logits=logits,
        settings=settings(task),
        tokens=list(output.token_ids),
        read_bytes=[int(count) for count in reads],
        reported_read_bytes=stats["bytes_per_pass"].get("disk", 0.0),
        import_rss_bytes=import_rss,
        facts={"stats": stats, "read_bytes_in_all": read_in_all, "is_packed": is_packed},
    )


def prefill(task: job.Job) -> job.Outcome:
    """All prompts in one pass, `task.steps` times; each call's time is a pass and its sampling."""
    import_rss, began = job.rss_bytes(), job.clock()
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    seconds, reads, first_token_s, tokens = [], [], 0.0, []
    with open_llm(task) as llm:
        predict(llm, task, params)
        for step in range(task.steps):
            read, start = job.disk_bytes(), job.clock()
            tokens = [each.outputs[0].token_ids[0] for each in llm.generate(task.prompts, params)]
            stop = job.clock()
            if step == 0:
                first_token_s = stop - began
            seconds.append(stop - start)
            reads.append(job.disk_bytes() - read)
        stats, is_packed = llm.stats.to_dict(), bool(llm.plan.placement.packed)
        logits = torch.stack([llm.logits(prompt)[-1] for prompt in task.prompts]).numpy()
    return job.Outcome(
        pass_s=seconds,
        first_token_s=first_token_s,
        argmax=[int(token) for token in logits.argmax(-1)],
        logits=logits,
        settings=settings(task),
        tokens=tokens,
        read_bytes=reads,
        reported_read_bytes=stats["bytes_per_pass"].get("disk", 0.0),
        import_rss_bytes=import_rss,
        facts={"stats": stats, "is_packed": is_packed},
    )


def calls(task: job.Job) -> job.Outcome:
    """`options.calls`: [{"prompts", "max_tokens", "ignore_eos"}] one after another, with one plan for all of them.

    `options.runtime` are settings, e.g. {"max_batch": 16}.  facts.calls has, for each, its seconds, every request's
    tokens, and its passes as the engine counted them; the first pass of the first call loads.  With `options.turn`
    other engines take turns, whose time is nobody's here.
    """
    turn = turn_of(task.options)
    turn.wait()
    import_rss, began = job.rss_bytes(), job.clock()
    seen: list[dict[str, Any]] = []
    with open_llm(task) as llm:

        def watch_passes(done: int, total: int, what: str) -> None:
            turn.passed(len(llm.stats.passes))

        largest = max(task.options["calls"], key=num_kv_tokens)
        plan = predict(llm, replace(task, prompts=largest["prompts"]), call_params(largest))
        for call in task.options["calls"]:
            passed, waited_s, start = len(llm.stats.passes), turn.waited_s, job.clock()
            outputs = llm.generate(call["prompts"], call_params(call), progress=watch_passes)
            seconds = job.clock() - start - (turn.waited_s - waited_s)
            tokens = [list(output.outputs[0].token_ids) for output in outputs]
            passes = [pass_facts(done) for done in llm.stats.passes[passed:]]
            seen.append({"seconds": seconds, "outputs": tokens, "passes": passes})
        stats: dict[str, Any] = llm.stats.to_dict()
    return job.Outcome(
        pass_s=[done["seconds"] for call in seen for done in call["passes"] if done["is_decode"]],
        first_token_s=(stats["first_token_s"] or 0.0),
        argmax=[],
        logits=None,
        settings=settings(task) | {"runtime": task.options.get("runtime", {})},
        read_bytes=[job.disk_bytes()],
        import_rss_bytes=import_rss,
        facts={"calls": seen, "stats": stats, "plan": plan, "job_s": job.clock() - began},
    )


def num_kv_tokens(call: dict[str, Any]) -> int:
    """Tokens whose keys and values a call keeps at most: what its plan has to make room for."""
    return sum(map(len, call["prompts"])) + len(call["prompts"]) * int(call["max_tokens"])


def call_params(call: dict[str, Any]) -> SamplingParams:
    """Greedy."""
    ignore = call.get("ignore_eos", False)
    return SamplingParams(max_tokens=call["max_tokens"], temperature=0.0, ignore_eos=ignore)


def pass_facts(done: Any) -> dict[str, Any]:
    """One pass as the engine recorded it."""
    return {
        "seconds": done.seconds,
        "rows": done.rows,
        "sequences": done.sequences,
        "schedule_s": done.schedule_s,
        "is_first": done.is_first,
        "is_decode": done.is_decode,
        "bytes": dict(done.num_bytes),
    }


def gaps(values: list[Any]) -> list[Any]:
    """Differences between neighbours."""
    return [later - earlier for earlier, later in pairwise(values)]


def settings(task: job.Job) -> dict[str, Any]:
    """What was set."""
    exact = task.options.get("runtime", {}).get("exact", False)
    return {"memory.host": task.budget_bytes or RESIDENT, "exact": exact, "threads": torch.get_num_threads()}


KINDS = {"decode": decode, "prefill": prefill, "calls": calls}

if __name__ == "__main__":
    job.main(lambda task: KINDS[task.kind](task), "zinfer", "torch")
