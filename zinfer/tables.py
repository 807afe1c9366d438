"""Texts in files.  In: CSV, TSV, JSON lines or plain lines.  Out: rows, one at a time, each with where it stands."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from zinfer.errors import CheckpointError, UsageError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
LINES = ".txt"
MAX_LINE_BYTES = 2**26
csv.field_size_limit(MAX_LINE_BYTES)


@dataclass(frozen=True, slots=True)
class Row:
    """One record: its fields as they stand in the file, the line it begins on, and bytes of the file read so far."""

    fields: dict[str, Any]
    line: int
    done_bytes: int


def read_table(path: Path) -> Iterator[Row]:
    """Rows of a file, by its ending: .csv and .tsv (with a header), .jsonl and .ndjson, .txt (a "text" per line).

    Read as they are asked for; empty lines are passed over.  Raises UsageError ZI-1138 for another ending,
    CheckpointError ZI-4931 where the file cannot be read, ZI-4932 (a line that is not UTF-8), ZI-4933 (not a record).
    """
    kind = path.suffix.lower()
    if kind not in (*DELIMITERS, *JSON_LINES, LINES):
        raise UsageError(
            "ZI-1138",
            f"{path} ends in {kind or 'nothing'}; .csv, .tsv, .jsonl, .ndjson or .txt was wanted",
            remedy="name the file by what it holds",
        )
    try:
        with path.open("rb") as file:
            yield from _csv(path, file, DELIMITERS[kind]) if kind in DELIMITERS else _lines(path, file, kind)
    except OSError as error:
        raise CheckpointError(
            "ZI-4931", f"{path} cannot be read: {error.strerror}", remedy="name an existing file"
        ) from error


def text_of(row: Row, path: Path, column: str, pair_column: str | None = None) -> str | tuple[str, str]:
    """The row's text, or pair of texts.  Raises CheckpointError ZI-4934: no such column, or no text in it."""
    parts = [_string(row, path, name) for name in (column, pair_column) if name is not None]
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])


def _string(row: Row, path: Path, column: str) -> str:
    value = row.fields.get(column)
    if isinstance(value, str):
        return value
    held = ", ".join(map(repr, row.fields)) or "nothing"
    what = "no text" if column in row.fields else f"no {column!r}, it has {held:.200}"
    raise CheckpointError(
        "ZI-4934",
        f"{path} line {row.line} has {what}" + (f" in {column!r}" if column in row.fields else ""),
        remedy=f"--text-column {next(iter(row.fields), 'text')}",
    )


def _csv(path: Path, file: BinaryIO, delimiter: str) -> Iterator[Row]:
    reader = csv.reader(_decoded(path, file), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for values in reader:
            begin, line = line, reader.line_num + 1
            if not values:
                continue
            if header is None:
                header = values
                if len(set(header)) != len(header):
                    raise _bad(path, begin, "the header names a column twice")
            elif len(values) != len(header):
                raise _bad(path, begin, f"{len(values)} fields stand where the header has {len(header)}")
            else:
                yield Row(dict(zip(header, values, strict=True)), begin, file.tell())
    except csv.Error as error:
        raise _bad(path, reader.line_num, str(error)) from None


def _lines(path: Path, file: BinaryIO, kind: str) -> Iterator[Row]:
    for number, line in enumerate(_decoded(path, file), 1):
        text = line.rstrip("\r\n")
        if kind == LINES:
            if text:
                yield Row({"text": text}, number, file.tell())
            continue
        if not text.strip():
            continue
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _bad(path, number, f"no JSON: {str(error)[:100]}") from None
        if not isinstance(fields, dict):
            raise _bad(path, number, f"a JSON {type(fields).__name__} where an object was wanted")
        yield Row(fields, number, file.tell())


def _decoded(path: Path, file: BinaryIO) -> Iterator[str]:
    """Lines as text; a byte order mark at the beginning is dropped."""
    number = 0
    while raw := file.readline(MAX_LINE_BYTES):
        number += 1
        if len(raw) == MAX_LINE_BYTES:
            raise _bad(path, number, f"the line has {MAX_LINE_BYTES} bytes or more")
        try:
            yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                "ZI-4932",
                f"{path} line {number} is not UTF-8: {error.reason} at its byte {error.start}",
                remedy=f"iconv -f LATIN1 -t UTF-8 {path} > utf8{path.suffix}   # if it is Latin-1",
            ) from None


def _bad(path: Path, line: int, what: str) -> CheckpointError:
    return CheckpointError(
        "ZI-4933", f"{path} line {line} is no record: {what}", remedy="mend the line or leave it out"
    )
