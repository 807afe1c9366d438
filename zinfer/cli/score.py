"""`zinfer score`.  In: prompts and continuations as flags or JSON lines.  Out: log probabilities as JSON lines."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import click

from zinfer.api import LLM
from zinfer.checkpoint.strict_json import parse_object
from zinfer.cli.options import engine_options, settings_of
from zinfer.cli.progress import Progress
from zinfer.cli.prompts import as_line, write_lines
from zinfer.cli.render import forecast_line, stats_lines
from zinfer.errors import CheckpointError, UsageError
from zinfer.jobs.requests import read_lines
from zinfer.whole import refuse_input_as_output, refuse_unwritable, written_whole

WINDOW = 1024  # pairs that are planned for and scored together


@click.command()
@click.argument("model", required=False)
@click.option("-p", "--prompt", help="The text before.")
@click.option("-c", "--continuation", "continuations", multiple=True, help="Text to score (may be repeated).")
@click.option(
    "-i",
    "--input",
    "input_file",
    type=click.Path(path_type=Path),
    help='JSON lines: {"prompt": ..., "continuation": ...}, both text or both token ids.',
)
@click.option(
    "-o", "--output", "output_file", type=click.Path(path_type=Path), help="JSON lines, input order."
)
@click.option(
    "--exact/--no-exact", default=None, help="A row's result depends on nothing but the row (default on)."
)
@engine_options
def score(
    model: str | None,
    prompt: str | None,
    continuations: tuple[str, ...],
    input_file: Path | None,
    output_file: Path | None,
    **engine: Any,
) -> None:
    """Say how likely text is after a prompt, by MODEL (default: the bundled one).

    Each line has the natural log of the continuation's probability, that of each of its tokens, and whether greedy
    decoding would have written it.
    """
    has_flags = prompt is not None and bool(continuations)
    if has_flags is (input_file is not None) or (not has_flags and (prompt is not None or continuations)):
        raise UsageError(
            "ZI-1117",
            "either --prompt and --continuation or --input is wanted",
            remedy='zinfer score -p "import" -c " os" -c " sys"',
        )
    refuse_input_as_output(input_file, output_file)
    refuse_unwritable(output_file)
    flags = [(prompt or "", text) for text in continuations]
    pairs = iter(flags) if input_file is None else _read_pairs(input_file)
    settings = settings_of(model, **engine).settings
    with Progress() as loading, LLM(settings=settings, watch=loading) as llm:
        records = _records(llm, pairs)
        if output_file is not None:
            with written_whole(output_file) as file:
                write_lines(file, records)
        else:
            for record in records:
                click.echo(as_line(record))
        click.echo(forecast_line(llm.plan), err=True)
        for line in stats_lines(llm.stats):
            click.echo(line, err=True)


def _records(llm: LLM, pairs: Iterator[tuple[Any, Any]]) -> Iterator[dict[str, Any]]:
    while window := list(islice(pairs, WINDOW)):
        prompts, continuations = zip(*window, strict=True)
        yield from (asdict(found) for found in llm.score(prompts, continuations))


def _read_pairs(path: Path) -> Iterator[tuple[Any, Any]]:
    for number, raw in read_lines(path):
        try:
            fields = parse_object(raw)
            pair = (fields["prompt"], fields["continuation"])
        except (ValueError, KeyError):
            pair = (None, None)
        if not all(_is_text(part) for part in pair):
            raise CheckpointError(
                "ZI-4922",
                f"{path} line {number} is not "
                f'{{"prompt": ..., "continuation": ...}} of text or token ids: {raw[:60]!r}',
                remedy=f"sed -n {number}p {shlex.quote(str(path))}   # then correct the line",
            )
        yield pair


def _is_text(part: object) -> bool:
    return isinstance(part, str) or (isinstance(part, list) and all(type(token) is int for token in part))
