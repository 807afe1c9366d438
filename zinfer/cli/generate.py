"""`zinfer generate`.  In: prompts as flags or JSON lines.  Out: text as it comes, or JSON lines, and what it cost."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from zinfer.api import LLM, Prompts
from zinfer.cli.options import engine_options, sampling_options, settings_of, split_sampling
from zinfer.cli.progress import Progress
from zinfer.cli.prompts import as_line, read_prompts, write_lines
from zinfer.cli.render import forecast_line, stats_lines, tip_lines
from zinfer.runtime.request import RequestOutput
from zinfer.sampling.params import SamplingParams
from zinfer.whole import refuse_input_as_output, refuse_unwritable, written_whole


@click.command()
@click.argument("model", required=False)
@click.option("-p", "--prompt", help="Text to continue.")
@click.option("--prompt-ids", metavar="1,2,3", help="Token ids to continue; needs no tokenizer.")
@click.option(
    "-i", "--input", "input_file", type=click.Path(path_type=Path), help='JSON lines: {"prompt": ...}.'
)
@click.option(
    "-o", "--output", "output_file", type=click.Path(path_type=Path), help="JSON lines, input order."
)
@sampling_options
@click.option(
    "--exact/--no-exact", default=None, help="A row's result depends on nothing but the row (default on)."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--trace", "trace_file", type=click.Path(path_type=Path), help="Write a Chrome/Perfetto trace.")
@engine_options
def generate(
    model: str | None,
    prompt: str | None,
    prompt_ids: str | None,
    input_file: Path | None,
    output_file: Path | None,
    as_json: bool,
    trace_file: Path | None,
    **options: Any,
) -> None:
    """Continue text with MODEL, a Hugging Face folder or a zinfer store (default: the bundled model)."""
    prompts = read_prompts(prompt, prompt_ids, input_file)
    refuse_input_as_output(input_file, output_file)
    refuse_unwritable(output_file)
    refuse_unwritable(trace_file)
    params, engine = split_sampling(options)
    loaded = settings_of(model, **engine)
    streams = input_file is None and output_file is None and not as_json
    with Progress() as loading, LLM(settings=loaded.settings, trace=trace_file, watch=loading) as llm:
        llm.fit(prompts, params)
        click.echo(forecast_line(llm.plan), err=True)
        if streams:
            _stream(llm, prompts, params, loading)
        else:
            _batch(llm, prompts, params, output_file, as_json)
        if not as_json:
            for line in (*stats_lines(llm.stats), *tip_lines(llm.model, llm.plan)):
                click.echo(line, err=True)
    if trace_file is not None:
        click.echo(
            f"trace      {trace_file} (open in Perfetto, or: zinfer trace {trace_file} --png t.png)", err=True
        )


def _stream(llm: LLM, prompts: Prompts, params: SamplingParams, loading: Progress) -> None:
    if isinstance(prompts, str):
        click.echo(prompts, nl=False)
    if llm.tokenizer is None:
        click.echo(" ".join(map(str, llm.generate(prompts, params)[0].outputs[0].token_ids)))
        return
    for delta in llm.stream(prompts, params):
        loading.clear()
        loading.is_quiet = True  # from here on the text is the progress
        click.echo(delta, nl=False)
        sys.stdout.flush()
    click.echo()


def _batch(
    llm: LLM, prompts: Prompts, params: SamplingParams, output_file: Path | None, as_json: bool
) -> None:
    with Progress("tokens", quiet=as_json and not sys.stderr.isatty()) as progress:
        outputs: list[RequestOutput] = llm.generate(prompts, params, progress=progress)
    if output_file is not None:
        with written_whole(output_file) as file:
            write_lines(file, (output.to_dict() for output in outputs))
        click.echo(f"wrote {len(outputs)} results to {output_file}", err=True)
    elif not as_json:
        for output in outputs:
            click.echo(as_line(output.to_dict()))
    if as_json:
        record = {"outputs": [output.to_dict() for output in outputs], "plan": llm.plan.to_dict()}
        click.echo(as_line(record | {"stats": llm.stats.to_dict()}))
