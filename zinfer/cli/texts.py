"""What `classify` and `embed` share.  In: arguments or a table.  Out: windows of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import click

from zinfer.classifier import WINDOW
from zinfer.cli.options import F
from zinfer.errors import CheckpointError, UsageError
from zinfer.tables import read_table, text_of
from zinfer.tokenizer import Text

BUNDLED = "demo"
_SOURCE = (
    click.argument("model", required=False),
    click.argument("texts", nargs=-1),
    click.option(
        "-i", "--input", "input_file", type=click.Path(path_type=Path), help="CSV, TSV, JSONL or TXT file."
    ),
    click.option(
        "--text-column", default="text", show_default=True, help="Column or key that holds the text."
    ),
    click.option("--pair-column", help="Column or key of the text's pair."),
)
_ANSWER = (
    click.option(
        "--exact/--no-exact",
        default=None,
        help="A text's result depends on nothing but the text (default on).",
    ),
    click.option("--students", type=int, help="Of a group: how many answer (default: all)."),
    click.option(
        "--degraded", is_flag=True, help="Serve a damaged group with its first whole students, and say so."
    ),
)


def source_options(command: F) -> F:
    """Add the arguments and options that say which texts."""
    return _with(_SOURCE, command)


def answer_options(command: F) -> F:
    """Add the options that say who answers, and how: the students of a group, exactly or not."""
    return _with(_ANSWER, command)


def _with(options: Sequence[Callable[[F], F]], command: F) -> F:
    for option in reversed(options):
        command = option(command)
    return command


def model_and_texts(
    model: str | None, texts: tuple[str, ...], input_file: Path | None
) -> tuple[str | None, tuple[str, ...]]:
    """The model, None for the bundled one, and the texts.

    The bundled model answers where none is named, and to the name `demo` unless a folder is called so.  One argument
    alone that is nothing on disk, and no file beside it, is a text: a model without texts would be of no use.
    """
    if model is None or _is_there(model):
        return model, texts
    if not texts and input_file is None and model != BUNDLED:
        return None, (model,)
    return (None if model == BUNDLED else model), texts


def _is_there(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # longer than a name may be
        return False


@dataclass(frozen=True, slots=True)
class Window:
    """Some rows of the source in order: their fields, their texts, and how far the source has been read."""

    fields: list[dict[str, Any]]
    texts: list[Text]
    done_bytes: int


def windows(
    texts: Sequence[str], input_file: Path | None, text_column: str, pair_column: str | None
) -> Iterator[Window]:
    """The texts, at most WINDOW at a time, so that a file of any length takes a bounded memory.

    Raises UsageError ZI-1139 for no source or two, CheckpointError ZI-4935 for a file without rows.
    """
    if bool(texts) == (input_file is not None):
        raise UsageError(
            "ZI-1139", "either texts or --input is wanted", remedy="zinfer classify MODEL 'a text'"
        )
    if input_file is None:
        for begin in range(0, len(texts), WINDOW):
            part = texts[begin : begin + WINDOW]
            yield Window([{"text": text} for text in part], list(part), 0)
        return
    rows = read_table(input_file)
    is_empty = True
    while taken := list(islice(rows, WINDOW)):
        is_empty = False
        found = [text_of(row, input_file, text_column, pair_column) for row in taken]
        yield Window([row.fields for row in taken], found, taken[-1].done_bytes)
    if is_empty:
        raise CheckpointError(
            "ZI-4935", f"{input_file} has no rows", remedy=f"write a {text_column!r} per row into it"
        )


def size_of(input_file: Path | None) -> int:
    """Bytes that there are to read, for progress; 0 where texts are arguments or the file is no file."""
    return input_file.stat().st_size if input_file is not None and input_file.is_file() else 0


def check_suffix(path: Path | None, wanted: Sequence[str], flag: str = "--output") -> None:
    """Raises UsageError ZI-1138 before any work is done for a file that would not be written."""
    if path is not None and path.suffix.lower() not in wanted:
        raise UsageError(
            "ZI-1138",
            f"{path} ends in {path.suffix or 'nothing'}; {' or '.join(wanted)} was wanted",
            remedy=f"{flag} {path.with_suffix(wanted[0])}",
        )
