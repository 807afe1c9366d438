"""`zinfer run-batch`.  In: a file of requests.  Out: a file of results, whatever interrupts, and exit code 0 or 7."""

from __future__ import annotations

import asyncio
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

import click

from zinfer.api import LLM
from zinfer.cli.options import engine_options, sampling_options, settings_of, split_sampling
from zinfer.cli.progress import Progress
from zinfer.cli.render import forecast_line, stats_lines, tip_lines
from zinfer.errors import UsageError
from zinfer.jobs.run import Brake, Job, Outcome
from zinfer.jobs.run import Progress as JobProgress
from zinfer.runtime.stats import Stats
from zinfer.units import Bytes

PARTIAL = 7
INTERRUPTED = 130


@click.command("run-batch")
@click.argument("model", required=False)
@click.option(
    "-i", "--input", "source", type=click.Path(path_type=Path), required=True, help="Request lines."
)
@click.option(
    "-o", "--output", "results", type=click.Path(path_type=Path), required=True, help="Result lines."
)
@click.option("--model", "model_option", metavar="MODEL", help="The same as the argument.")
@sampling_options
@click.option(
    "--exact/--no-exact", default=None, help="A row's result depends on nothing but the row (default on)."
)
@engine_options
def run_batch(
    model: str | None, model_option: str | None, source: Path, results: Path, **options: Any
) -> int:
    """Answer every request of a file with MODEL (default: the bundled one); run it again to go on.

    Lines are OpenAI's batch requests, or {"prompt": text or ids} beside sampling parameters; the sampling options
    here fill in what a line leaves out.
    """
    if model is not None and model_option is not None and model != model_option:
        raise UsageError(
            "ZI-1710",
            f"two models are given: {model} and --model {model_option}",
            remedy=f"zinfer run-batch {shlex.quote(model)} -i {shlex.quote(str(source))} "
            f"-o {shlex.quote(str(results))}",
        )
    defaults, engine = split_sampling(options)
    settings = settings_of(model or model_option, **engine).settings
    with Progress("requests") as bar:
        brake = Brake()
        with LLM(settings=settings, watch=brake) as llm:
            for line in (forecast_line(llm.plan), *tip_lines(llm.model, llm.plan)):
                click.echo(line, err=True)
            reporter = Reporter(bar, llm)
            job = Job(
                llm,
                source,
                results,
                defaults=defaults,
                brake=brake,
                model_name=Path(settings.model).name if settings.model else "zinfer-demo",
                report=reporter,
            )
            outcome = asyncio.run(_run(job, brake))
            stats = llm.stats
    return _close(outcome, stats, results)


async def _run(job: Job, brake: Brake) -> Outcome:
    """The first SIGINT or SIGTERM lets what is finished be written; the second is no longer caught."""
    loop = asyncio.get_running_loop()

    def stop(number: int) -> None:
        brake.pull()
        loop.remove_signal_handler(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    return await job.run()


class Reporter:
    """Draws how far a job is: requests, pass number, tokens/s, bytes per link and pass, share of the limit, ETA."""

    def __init__(self, bar: Progress, llm: LLM) -> None:
        self._bar = bar
        self._llm = llm
        self._begin_s = time.perf_counter()

    def __call__(self, progress: JobProgress) -> None:
        """Show it."""
        spent_s = time.perf_counter() - self._begin_s
        note = pass_note(self._llm.stats, self._llm.stats.num_tokens / spent_s)
        failed = f", {progress.faults} failed" if progress.faults else ""
        self._bar(progress.done, progress.total, "run-batch", note + failed)


def pass_note(stats: Stats, tokens_per_s: float) -> str:
    """The last pass in a few words."""
    parts = [f"pass {len(stats.passes)}", f"{tokens_per_s:.1f} tokens/s"]
    if stats.passes:
        last = stats.passes[-1]
        parts += [f"{link} {Bytes(count)}/pass" for link, count in sorted(last.num_bytes.items()) if count]
        if not last.is_first and last.seconds > 0:
            parts.append(f"{min(stats.limit_s / last.seconds, 1):.0%} of the limit")
    return ", ".join(parts)


def _close(outcome: Outcome, stats: Stats, results: Path) -> int:
    if outcome.earlier:
        click.echo(f"resumed    {outcome.earlier} results were on disk already", err=True)
    if outcome.damaged:
        click.echo(f"repaired   {outcome.damaged} damaged results were made again", err=True)
    for line in stats_lines(stats):
        click.echo(line, err=True)
    left = f", {outcome.total - outcome.done} left" if outcome.is_interrupted else ""
    click.echo(f"results    {outcome.done} in {results}, {outcome.faults} of them errors{left}", err=True)
    if outcome.is_interrupted:
        again = " ".join(shlex.quote(part) for part in sys.argv[1:])
        click.echo(f"interrupted: run the same command to go on: zinfer {again}", err=True)
        return INTERRUPTED
    return PARTIAL if outcome.faults else 0
