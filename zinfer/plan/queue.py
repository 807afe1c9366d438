"""What a queue of requests asks of the passes.  In: how many, how long, how many at once.  Out: rows of every pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from zinfer.plan.records import Workload

_MAX_PASSES = 4096  # of a longer queue the first passes are simulated and the rest follows in proportion


@dataclass(frozen=True, slots=True)
class QueuePass:
    """One pass of a continuous batch: `decoding` sequences gave a token each, `prompt_rows` rows were fed beside."""

    decoding: int
    prompt_rows: int

    @property
    def rows(self) -> int:
        """All rows."""
        return self.decoding + self.prompt_rows


@dataclass(frozen=True, slots=True)
class QueueRun:
    """A whole queue: seconds until the last request has ended, and until one has on average; output tokens."""

    seconds: float
    mean_finish_s: float
    num_passes: float
    num_tokens: int

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second over the whole run."""
        return self.num_tokens / self.seconds


def run_queue(workload: Workload, rows: int, pass_s: Callable[[int], float]) -> QueueRun:
    """Carry `num_requests` equal requests out, `batch` at once, about `rows` rows a pass; `pass_s(rows)` takes seconds.

    Mirrors runtime.scheduler for requests that neither stop early nor lack pages; the parity test ties them.
    """
    total = workload.num_requests or workload.batch
    at_s = finished_s = 0.0
    count = done = 0
    for done_before, step in _passes(workload, rows, total):
        at_s += pass_s(step.rows)
        count += 1
        finished_s += at_s * (done_before - done)
        done = done_before
        if count == _MAX_PASSES:
            break
    share = total / done if done else 1.0
    return QueueRun(at_s * share, finished_s / max(done, 1) * share, count * share, total * workload.gen_len)


def queue_passes(workload: Workload, rows: int) -> list[QueuePass]:
    """Every pass of the queue, from the first prompt to the last token."""
    total = workload.num_requests or workload.batch
    return [step for _, step in _passes(workload, rows, total)]


def _passes(workload: Workload, rows: int, total: int) -> Iterator[tuple[int, QueuePass]]:
    """(requests that have ended after the pass, the pass)."""
    prompt, gen = workload.prompt_len, workload.gen_len
    waiting, running, done = total, 0, 0
    fed = 0  # rows of admitted prompts that are fed but do not complete one yet
    prefilling = 0  # admitted sequences whose prompt is not complete
    ends: Counter[int] = Counter()  # pass -> sequences whose last token it gives
    number = 0
    while done < total:
        decoding = running - prefilling
        free = max(min(max(rows, 1), workload.prefill_rows) - decoding, 0)
        joining = min(
            workload.batch - running, waiting, -(-max(free + fed - prefilling * prompt, 0) // prompt)
        )
        waiting, running, prefilling = waiting - joining, running + joining, prefilling + joining
        prompt_rows = min(free, prefilling * prompt - fed)
        complete, fed = divmod(fed + prompt_rows, prompt)
        prefilling -= complete
        ends[number + gen - 1] += complete
        ended = ends.pop(number, 0)
        done, running = done + ended, running - ended
        yield done, QueuePass(decoding, prompt_rows)
        number += 1
