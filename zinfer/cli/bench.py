"""`zinfer bench`.  In: a model, ranges of lengths.  Out: the field's result block, a JSON record, a picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from zinfer import __version__
from zinfer.api import LLM
from zinfer.bench.drive import latency as drive_latency
from zinfer.bench.drive import throughput as drive_throughput
from zinfer.bench.load import Load, Span, random_load
from zinfer.bench.report import Run, lines
from zinfer.cli.options import engine_options, settings_of
from zinfer.cli.progress import Progress
from zinfer.cli.render import WHY
from zinfer.runtime.stats import SLOW_SHARE
from zinfer.whole import refuse_unwritable, written_whole

F = TypeVar("F", bound=Callable[..., Any])

_LOAD = (
    click.argument("model", required=False),
    click.option("--num-prompts", default=32, show_default=True, help="Requests in all."),
    click.option("--prompt-len", default="16-128", show_default=True, help="Tokens of a prompt: N or A-B."),
    click.option("--gen-len", default="8-64", show_default=True, help="Tokens to generate: N or A-B."),
    click.option("--seed", default=0, show_default=True, help="Of lengths, ids and arrivals."),
    click.option("--exact/--no-exact", default=None, help="As in `zinfer generate`."),
    click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the record."),
    click.option(
        "--svg", "svg_file", type=click.Path(path_type=Path), help="Draw the run (needs matplotlib)."
    ),
)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What both commands share."""

    model: str | None
    num_prompts: int
    prompt_len: str
    gen_len: str
    seed: int
    json_file: Path | None
    svg_file: Path | None
    engine: dict[str, Any]


def load_options(command: F) -> F:
    """Add the options that both commands share."""
    for option in reversed(_LOAD):
        command = option(command)
    return engine_options(command)


@click.group()
def bench() -> None:
    """Measure a model under a budget: requests of random ids, greedy, no end token heeded."""


@bench.command()
@load_options
def throughput(**options: Any) -> None:
    """All requests at once: how many tokens a second?"""
    _measure(_asked(options), drive_throughput)


@bench.command()
@click.option("--concurrency", type=int, help="Users who each wait for their answer (default 1).")
@click.option("--request-rate", type=float, help="Requests a second that do not wait for each other.")
@load_options
def latency(concurrency: int | None, request_rate: float | None, **options: Any) -> None:
    """Requests that arrive one by one: how long does each wait?"""
    asked = _asked(options)
    if concurrency is None and request_rate is None:
        concurrency = 1

    def drive(llm: LLM, load: Load, progress: Progress) -> Run:
        return drive_latency(
            llm, load, progress, concurrency=concurrency, request_rate=request_rate, seed=asked.seed
        )

    _measure(asked, drive)


def _asked(options: dict[str, Any]) -> _Asked:
    shared = {name: options.pop(name) for name in _Asked.__slots__ if name != "engine"}
    return _Asked(**shared, engine=options)


def _measure(asked: _Asked, drive: Callable[[LLM, Load, Progress], Run]) -> None:
    refuse_unwritable(asked.json_file)
    refuse_unwritable(asked.svg_file)
    prompt_len = Span.parse(asked.prompt_len, "--prompt-len")
    gen_len = Span.parse(asked.gen_len, "--gen-len")
    if asked.svg_file is not None:
        from zinfer.bench.draw import need_matplotlib

        need_matplotlib()
    settings = settings_of(asked.model, **asked.engine).settings
    with Progress("requests") as progress, LLM(settings=settings) as llm:
        vocab_size = llm.model.spec.vocab_size
        load = random_load(vocab_size, asked.num_prompts, prompt_len, gen_len, asked.seed)
        run = drive(llm, load, progress)
    block = run.to_dict()
    block["config"] |= {
        "num_prompts": asked.num_prompts,
        "prompt_len": asked.prompt_len,
        "gen_len": asked.gen_len,
        "seed": asked.seed,
    }
    for line in lines(block):
        click.echo(line)
    if block["pass_s"] is not None and block["pass_s"] * SLOW_SHARE > block["predicted_pass_s"]:
        click.echo(
            f"warning             {block['predicted_pass_s'] / block['pass_s']:.0%} of the predicted speed: "
            f"{WHY[block['binding']]} is what binds, and something else is using it, or it changed since it was "
            "measured (zinfer doctor)",
            err=True,
        )
    for error in dict.fromkeys(run.failed):
        click.echo(f"failed              {error}", err=True)
    _write(run, block, asked)


def _write(run: Run, block: dict[str, Any], asked: _Asked) -> None:
    if asked.json_file is not None:
        with written_whole(asked.json_file) as file:
            file.write(json.dumps({"zinfer": __version__} | block, indent=1).encode() + b"\n")
        click.echo(f"wrote {asked.json_file}", err=True)
    if asked.svg_file is not None:
        from zinfer.bench.draw import draw

        draw(run, asked.svg_file)
        click.echo(f"wrote {asked.svg_file}", err=True)
