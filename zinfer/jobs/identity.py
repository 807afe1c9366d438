"""What a job's results depend on.  In: a model, settings, the input.  Out: a flat record that a later run compares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from zinfer.checkpoint.index import SIDE_FILES, STORE_FILE
from zinfer.checkpoint.read import read_blocks, read_range, regular_size
from zinfer.jobs.requests import Survey
from zinfer.runtime.model import Model
from zinfer.sampling.params import SamplingParams

_SAMPLES = 64  # of a weight file, evenly spaced, its beginning (the header) and its end among them
_SAMPLE_BYTES = 4096


def identity_of(
    model: Model, device: str, exact: bool, defaults: SamplingParams, found: Survey
) -> dict[str, Any]:
    """All that results depend on beside the lines themselves: input, model, device kind, exactness, defaults.

    Budgets, schedules and batch sizes are left out: in exact mode they change no bit.
    """
    sampling = {field.name: getattr(defaults, field.name) for field in fields(defaults)}
    return {
        "input": found.digest,
        "requests": found.num_requests,
        "model": fingerprint(model),
        "device": "cuda" if device.startswith("cuda") else "cpu",  # a simulated device computes on the CPU
        "exact": exact,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in sampling.items()},
    }


def fingerprint(model: Model) -> str:
    """A hash of config, tokenizer and a sample of every weight file; seconds for a checkpoint of any size."""
    digest = xxh3_128()
    for path in _side_files(model.folder):
        digest.update(b"%d:" % regular_size(path))
        for block in read_blocks(path, 0, regular_size(path)):
            digest.update(block)
    for path in model.source.files:
        nbytes = regular_size(path)
        digest.update(b"%d:" % nbytes)
        step = max(nbytes - _SAMPLE_BYTES, 0) / (_SAMPLES - 1)
        for start in sorted({int(i * step) for i in range(_SAMPLES)}):
            digest.update(read_range(path, start, min(_SAMPLE_BYTES, nbytes - start)))
    return digest.hexdigest()


def _side_files(folder: Path) -> Iterator[Path]:
    """A store's manifest, which has the hash of every block, goes with them."""
    for name in (*SIDE_FILES, STORE_FILE):
        if (folder / name).is_file():
            yield (folder / name).resolve()  # the hub's cache links its files
