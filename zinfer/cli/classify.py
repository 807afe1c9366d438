"""`zinfer classify`.  In: texts as arguments or a table.  Out: labels with scores, as lines, a table or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import click

from zinfer.classifier import Classifier
from zinfer.cli.options import engine_options, settings_of
from zinfer.cli.progress import Progress
from zinfer.cli.texts import (
    Window,
    answer_options,
    check_suffix,
    model_and_texts,
    size_of,
    source_options,
    windows,
)
from zinfer.runtime.labels import Label
from zinfer.students.cascade import check_threshold
from zinfer.whole import refuse_input_as_output, refuse_unwritable, written_whole

OUTPUTS = (".jsonl", ".csv")


@click.command()
@source_options
@click.option(
    "-o",
    "--output",
    "output_file",
    type=click.Path(path_type=Path),
    help="Rows with label and score: .jsonl or .csv.",
)
@click.option("--top-k", default=1, show_default=True, help="Labels per text, likeliest first (0: all).")
@answer_options
@click.option("--teacher", help="Of a group: who answers where it is not sure; may exceed its memory.")
@click.option("--defer-below", type=float, metavar="P", help="Not sure: less confident than this (0 to 1).")
@click.option(
    "--target-accuracy",
    type=float,
    metavar="A",
    help="The least P that reached it on the group's unseen texts.",
)
@click.option(
    "--defer-to",
    "deferred_file",
    type=click.Path(path_type=Path),
    help="Write rows that are not sure to this .jsonl, for a later run with the teacher.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@engine_options
def classify(
    model: str | None,
    texts: tuple[str, ...],
    input_file: Path | None,
    text_column: str,
    pair_column: str | None,
    output_file: Path | None,
    top_k: int,
    students: int | None,
    degraded: bool,
    teacher: str | None,
    defer_below: float | None,
    target_accuracy: float | None,
    deferred_file: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Say which label each text has, by MODEL: a folder of an encoder with a classification head, or its store.

    Without MODEL, or by the name `demo`, the bundled example answers: which package of the standard library a piece
    of code is from.
    """
    check_suffix(output_file, OUTPUTS)
    refuse_input_as_output(input_file, output_file)
    refuse_unwritable(output_file)
    check_suffix(deferred_file, OUTPUTS[:1])
    model, texts = model_and_texts(model, texts, input_file)
    settings = settings_of(model, **options).settings
    given = windows(texts, input_file, text_column, pair_column)
    # The bar of a file counts its bytes, that of texts on the command line the texts.
    with (
        Progress() as loading,
        Classifier(
            model,
            students=students,
            degraded=degraded,
            teacher=teacher,
            defer_below=defer_below,
            target_accuracy=target_accuracy,
            settings=settings,
            watch=loading,
        ) as classifier,
        nullcontext() if deferred_file is None else written_whole(deferred_file) as deferred,
    ):
        if deferred is not None and classifier.cascade is None:
            check_threshold(None)
        found = _noted(_classified(classifier, given, top_k or None, size_of(input_file)), deferred)
        if output_file is not None:
            count = _write(output_file, found)
            click.echo(f"wrote {count} results to {output_file}", err=True)
        elif as_json:
            results = [fields | {"labels": labels} for fields, labels in found]
            record = {"results": results} | classifier.about()
            click.echo(json.dumps(record, ensure_ascii=False))
        else:
            for fields, labels in found:
                click.echo(_line(fields, labels) if input_file is None else _json_line(fields, labels))


def _classified(
    classifier: Classifier, given: Iterator[Window], top_k: int | None, total_bytes: int
) -> Iterator[tuple[dict[str, Any], list[Label]]]:
    """(fields, labels) of every row, a window at a time."""
    with Progress(quiet=not total_bytes) as progress:
        for window in given:
            labels = classifier.classify(window.texts, top_k)
            progress(window.done_bytes, total_bytes, "classifying")
            for fields, found in zip(window.fields, labels, strict=True):
                yield fields, [found] if top_k == 1 else found


def _noted(
    found: Iterator[tuple[dict[str, Any], list[Label]]], deferred: BinaryIO | None
) -> Iterator[tuple[dict[str, Any], list[Label]]]:
    """The same rows; those that are not sure also go into the file, as they were read."""
    for fields, labels in found:
        if deferred is not None and labels[0]["unsure"]:
            deferred.write((json.dumps(fields, ensure_ascii=False) + "\n").encode())
        yield fields, labels


def _line(fields: dict[str, Any], labels: Sequence[Label]) -> str:
    scores = "  ".join(f"{label['label']} {label['score']:.4f}" for label in labels)
    return f"{scores}  {' '.join(fields['text'].split())[:80]}"


def _merged(fields: dict[str, Any], labels: Sequence[Label]) -> dict[str, Any]:
    return fields | (labels[0] if len(labels) == 1 else {"labels": list(labels)})


def _json_line(fields: dict[str, Any], labels: Sequence[Label]) -> str:
    return json.dumps(_merged(fields, labels), ensure_ascii=False)


def _write(path: Path, found: Iterator[tuple[dict[str, Any], list[Label]]]) -> int:
    encoded: Callable[[dict[str, Any], list[Label]], str] = _json_row
    if path.suffix.lower() == ".csv":
        encoded = _CsvRows()
    count = 0
    with written_whole(path) as file:
        for fields, labels in found:
            file.write(encoded(fields, labels).encode())
            count += 1
    return count


def _json_row(fields: dict[str, Any], labels: list[Label]) -> str:
    return _json_line(fields, labels) + "\n"


class _CsvRows:
    """Rows as CSV: the input's columns, then label and score, with several labels label_1, score_1, label_2, ..."""

    def __init__(self) -> None:
        self._columns: list[str] = []

    def __call__(self, fields: dict[str, Any], labels: list[Label]) -> str:
        row = dict(fields)
        for number, label in enumerate(labels, 1):
            end = f"_{number}" if len(labels) > 1 else ""
            row |= {f"label{end}": label["label"], f"score{end}": label["score"]}
        row |= {name: value for name, value in labels[0].items() if name not in ("label", "score")}
        text = io.StringIO()
        is_first = not self._columns
        self._columns = self._columns or list(row)
        writer = csv.DictWriter(text, self._columns, extrasaction="ignore", lineterminator="\n")
        if is_first:
            writer.writeheader()
        writer.writerow(row)
        return text.getvalue()
