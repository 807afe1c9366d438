"""Put a load on an engine.  In: an LLM, a load, how it arrives.  Out: a Run: when each token of each request came."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from zinfer.api import LLM
from zinfer.bench.load import Load, poisson_arrivals
from zinfer.bench.report import Run, Timeline
from zinfer.errors import UsageError, ZinferError
from zinfer.runtime.request import RequestOutput
from zinfer.sampling.params import SamplingParams

Progress = Callable[[int, int, str], None]
_MOST_AT_ONCE = 256  # requests that an open loop keeps in the engine; later ones wait, and their wait counts


def throughput(llm: LLM, load: Load, progress: Progress) -> Run:
    """All requests at once; the clock runs from the first one's arrival to the last token, the load included."""
    items = [(prompt, _params(count)) for prompt, count in zip(load.prompts, load.gen_lens, strict=True)]
    begin_s = time.perf_counter()
    outputs = list(_counted(llm.generate_iter(items), len(load), progress))
    done = [output for output in outputs if output.metrics is not None]
    times = [(begin_s, output) for output in done]
    return _run("throughput", llm, times, outputs, begin_s, 0, {})


def latency(
    llm: LLM,
    load: Load,
    progress: Progress,
    *,
    concurrency: int | None = None,
    request_rate: float | None = None,
    seed: int = 0,
) -> Run:
    """Requests that arrive one by one, weights loaded before: `concurrency` users who each wait for their answer
    before they ask again, or independent users at `request_rate` a second (Poisson) who do not wait.

    An open loop's requests count from when they were due.  Raises UsageError ZI-1123 unless exactly one is given.
    """
    asked = concurrency or request_rate or 0
    if (concurrency is None) == (request_rate is None) or not 0 < asked < float("inf"):
        raise UsageError(
            "ZI-1123",
            f"requests arrive either by concurrency ({concurrency}) or by request rate ({request_rate}), above 0",
            remedy="--concurrency 4",
        )
    at_once = min(concurrency or _MOST_AT_ONCE, len(load))
    longest = sorted(load.prompts, key=len, reverse=True)[:at_once]
    llm.fit(longest, _params(load.longest_gen))
    llm.generate([load.prompts[0]], _params(1))  # loads what stays
    passes_before = len(llm.stats.passes)
    begin_s = time.perf_counter()
    due = [begin_s] * len(load)
    if request_rate is not None:
        due = [begin_s + at_s for at_s in poisson_arrivals(len(load), request_rate, seed)]

    def ask(number: int) -> tuple[float, RequestOutput]:
        arrival_s = due[number] if request_rate is not None else time.perf_counter()
        time.sleep(max(arrival_s - time.perf_counter(), 0.0))
        return arrival_s, llm.generate([load.prompts[number]], _params(load.gen_lens[number]))[0]

    with ThreadPoolExecutor(at_once, thread_name_prefix="bench") as pool:
        waiting = [pool.submit(ask, number) for number in range(len(load))]
        times = list(_counted((_result(future, waiting) for future in waiting), len(load), progress))
    how = {"concurrency": concurrency, "request_rate": request_rate}
    return _run("latency", llm, times, [output for _, output in times], begin_s, passes_before, how)


def _params(count: int) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)


def _result(future: Future[Any], others: Iterable[Future[Any]]) -> Any:
    """Wait for one; when it has failed, or the user wants no more, those that have not begun never will."""
    try:
        return future.result()
    except BaseException:
        for other in others:
            other.cancel()
        raise


def _counted(items: Iterator[Any], total: int, progress: Progress) -> Iterator[Any]:
    for done, item in enumerate(items, 1):
        progress(done, total, "requests")
        yield item


def _run(
    kind: str,
    llm: LLM,
    times: list[tuple[float, RequestOutput]],
    outputs: list[RequestOutput],
    begin_s: float,
    passes_before: int,
    how: dict[str, Any],
) -> Run:
    """Raises the first request's own error where none had a result."""
    timelines = [
        Timeline(arrival_s, output.metrics.token_s, len(output.prompt_token_ids))
        for arrival_s, output in times
        if output.metrics is not None
    ]
    errors: list[ZinferError] = [output.error for output in outputs if output.error is not None]
    if not timelines:
        raise errors[0]
    end_s = max(line.token_s[-1] for line in timelines)
    workload = llm.plan.workload
    config = how | {
        "model": llm.settings.model or "bundled",
        "exact": llm.plan.exact,
        "device": llm.plan.device,
        "budget_bytes": {use.tier: use.budget for use in llm.plan.uses},
        "sequences_at_once": workload.batch,
        "rows_at_most": workload.prefill_rows,
    }
    passes = llm.stats.passes[passes_before:]
    failed = [str(error) for error in errors]
    return Run(kind, timelines, end_s - begin_s, passes, llm.plan.forecast, config, failed)
