"""The input of a job.  In: a file of lines.  Out: its Survey, and the lines again, one at a time.

However long the file, memory holds one line and less than a hundred bytes for each.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from xxhash import xxh3_128, xxh3_128_digest

from zinfer.checkpoint.strict_json import MAX_JSON_BYTES
from zinfer.errors import CheckpointError, UsageError
from zinfer.jobs.line import Fault, JobRequest, custom_id_of, read_line
from zinfer.sampling.params import SamplingParams


@dataclass(slots=True)
class Survey:
    """What a first reading of the input says; lines are counted from 1, blank ones count and are no requests."""

    num_lines: int
    num_requests: int
    digest: str  # of all bytes
    repeated: frozenset[int] = field(repr=False)  # lines whose custom_id an earlier line has


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, bytes without the line's end) of every line that is not blank.

    Of a line that is too long to be parsed only the beginning is kept.  Raises CheckpointError ZI-4921 where the
    file cannot be read.
    """
    try:
        with path.open("rb") as file:
            yield from _lines(file)
    except OSError as error:
        raise CheckpointError(
            "ZI-4921", f"{path} cannot be read: {error.strerror}", remedy=f"ls -l {path.parent}"
        ) from error


def survey(path: Path) -> Survey:
    """Read the whole input once and keep no more than hashes.  Raises CheckpointError ZI-4921."""
    whole = xxh3_128()
    hashes, lines = bytearray(), array("Q")
    num_lines = num_requests = 0
    for number, raw in read_lines(path):
        num_lines, num_requests = number, num_requests + 1
        whole.update(b"%d:%d:" % (number, len(raw)))
        whole.update(raw)
        custom_id = custom_id_of(raw)
        if custom_id is not None:
            hashes += xxh3_128_digest(custom_id.encode("utf-8", "surrogatepass"))
            lines.append(number)
    return Survey(num_lines, num_requests, whole.hexdigest(), _repeated(hashes, lines))


def request_of(
    number: int, raw: bytes, defaults: SamplingParams, repeated: frozenset[int]
) -> JobRequest | Fault:
    """`read_line`, and ZI-1708 for a custom_id that an earlier line has."""
    request = read_line(number, raw, defaults)
    if number not in repeated:
        return request
    error = UsageError(
        "ZI-1708",
        f"custom_id {request.custom_id!r} stands on an earlier line too",
        remedy="give every request its own custom_id",
    )
    return Fault(number, request.digest, request.form, request.custom_id, error)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    number = 0
    while part := file.readline(MAX_JSON_BYTES + 2):
        number += 1
        raw = part
        while not part.endswith(b"\n") and (part := file.readline(MAX_JSON_BYTES)):
            pass
        raw = raw.rstrip(b"\r\n")
        if raw.strip():
            yield number, raw


def _repeated(hashes: bytearray, lines: array[int]) -> frozenset[int]:
    """Lines whose hash an earlier line has; both are in the order of the lines."""
    if not lines:
        return frozenset()
    halves = np.frombuffer(bytes(hashes), dtype="<u8").reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: the first of equals stays first
    same = (halves[order[1:]] == halves[order[:-1]]).all(1)
    return frozenset(lines[i] for i in order[1:][same])
