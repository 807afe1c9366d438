"""`zinfer distill`.  In: a teacher, a table of texts.  Out: a folder with a group of students, and what it is worth."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from zinfer.cli.options import engine_options, settings_of
from zinfer.cli.progress import Progress
from zinfer.students.job import distill as run
from zinfer.students.settings import DistillSettings

DEFAULTS = DistillSettings()


@click.command()
@click.option(
    "--teacher", required=True, type=click.Path(path_type=Path), help="An encoder's folder or store."
)
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Texts: CSV, TSV, JSONL or TXT.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Where the group is written.")
@click.option("--text-column", default="text", show_default=True, help="Column or key that holds the text.")
@click.option("--pair-column", help="Column or key of the text's pair.")
@click.option("--label-column", help="Column or key of the class; without it the teacher's word is enough.")
@click.option(
    "--split-column", help="Column or key of what a text is from: held-out texts are then of others."
)
@click.option("--students", default=DEFAULTS.students, show_default=True, help="Students at most.")
@click.option("--layers", default=DEFAULTS.layers, show_default=True, help="Layers of each.")
@click.option(
    "--width",
    default=DEFAULTS.width,
    show_default=True,
    help="Share of the teacher's heads and neurons of each.",
)
@click.option("--mlp-width", type=float, help="Share of the neurons alone, where it is another.")
@click.option("--epochs", default=DEFAULTS.epochs, show_default=True, help="Epochs per student.")
@click.option(
    "--polish", default=DEFAULTS.polish, show_default=True, help="Epochs of all together (0: none)."
)
@click.option("--batch", default=DEFAULTS.batch, show_default=True, help="Texts per step.")
@click.option("--lr", default=DEFAULTS.lr, show_default=True, help="Highest learning rate.")
@click.option(
    "--seed", default=DEFAULTS.seed, show_default=True, help="Same seed, same texts: same students."
)
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@engine_options
def distill(
    teacher: Path,
    data: Path,
    out: Path,
    text_column: str,
    pair_column: str | None,
    label_column: str | None,
    split_column: str | None,
    resume: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Distil an encoder into a group of shallow students, every prefix of which is a usable model."""
    names = ("students", "layers", "width", "mlp_width", "epochs", "polish", "batch", "lr", "seed")
    settings = DistillSettings(**{name: options.pop(name) for name in names})
    with Progress("steps", quiet=as_json and not sys.stderr.isatty()) as progress:
        done = run(
            teacher,
            data,
            out,
            settings=settings,
            engine=settings_of(str(teacher), **options).settings,
            text_column=text_column,
            pair_column=pair_column,
            label_column=label_column,
            split_column=split_column,
            resume=resume,
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps(done.to_dict(), ensure_ascii=False))
    else:
        click.echo((out / "report.md").read_text(encoding="utf-8"))
