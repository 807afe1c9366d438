"""`zinfer embed`.  In: texts as arguments or a table.  Out: vectors, as a NumPy file or JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

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
from zinfer.whole import refuse_input_as_output, refuse_unwritable, written_whole

OUTPUTS = (".npy", ".jsonl")
HEADER_BYTES = 128  # of a .npy file, written when the number of rows is known


@click.command()
@source_options
@click.option(
    "-o",
    "--output",
    "output_file",
    type=click.Path(path_type=Path),
    help="float32 [N, D] as .npy, or rows with their embedding as .jsonl.",
)
@answer_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@engine_options
def embed(
    model: str | None,
    texts: tuple[str, ...],
    input_file: Path | None,
    text_column: str,
    pair_column: str | None,
    output_file: Path | None,
    students: int | None,
    degraded: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Turn each text into a vector, by MODEL: a folder of an encoder, or its store (default: the bundled example)."""
    check_suffix(output_file, OUTPUTS)
    refuse_input_as_output(input_file, output_file)
    refuse_unwritable(output_file)
    model, texts = model_and_texts(model, texts, input_file)
    settings = settings_of(model, **options).settings
    given = windows(texts, input_file, text_column, pair_column)
    with (
        Progress() as loading,
        Classifier(
            model, students=students, degraded=degraded, settings=settings, watch=loading
        ) as classifier,
    ):
        found = _embedded(classifier, given, size_of(input_file))
        if output_file is not None:
            write = _write_npy if output_file.suffix.lower() == ".npy" else _write_jsonl
            count = write(output_file, found)
            click.echo(f"wrote {count} embeddings to {output_file}", err=True)
        elif as_json:
            rows = [
                fields | {"embedding": row.tolist()}
                for fields_N, rows in found
                for fields, row in zip(fields_N, rows, strict=True)
            ]
            record = {"results": rows} | classifier.about()
            click.echo(json.dumps(record, ensure_ascii=False))
        else:
            for line in _json_lines(found):
                click.echo(line)


Found = Iterator[tuple[list[dict[str, Any]], npt.NDArray[np.float32]]]


def _embedded(classifier: Classifier, given: Iterator[Window], total_bytes: int) -> Found:
    """(fields, float32 [n, D]) of each window."""
    with Progress(quiet=not total_bytes) as progress:
        for window in given:
            yield window.fields, classifier.embed(window.texts)
            progress(window.done_bytes, total_bytes, "embedding")


def _json_lines(found: Found) -> Iterator[str]:
    for fields_N, rows_ND in found:
        for fields, row_D in zip(fields_N, rows_ND, strict=True):
            yield json.dumps(fields | {"embedding": row_D.tolist()}, ensure_ascii=False)


def _write_jsonl(path: Path, found: Found) -> int:
    count = 0
    with written_whole(path) as file:
        for line in _json_lines(found):
            file.write(f"{line}\n".encode())
            count += 1
    return count


def _write_npy(path: Path, found: Found) -> int:
    """Rows are written as they come, the header at last: no more than a window is in memory."""
    count = width = 0
    with written_whole(path) as file:
        file.write(bytes(HEADER_BYTES))
        for _, rows_ND in found:
            file.write(np.ascontiguousarray(rows_ND, dtype="<f4").tobytes())
            count, width = count + rows_ND.shape[0], rows_ND.shape[1]
        file.seek(0)
        file.write(_npy_header(count, width))
    return count


def _npy_header(rows: int, width: int) -> bytes:
    """Version 1.0 of NumPy's format (numpy.lib.format), filled up with spaces."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {width}), }}"
    body = text.encode().ljust(HEADER_BYTES - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little") + body
