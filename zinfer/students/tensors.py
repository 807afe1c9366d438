"""Tensors in one safetensors file, written whole or not at all.  In: named tensors, notes.  Out: the same again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from zinfer.checkpoint.header import LENGTH_BYTES, WeightEntry, parse_header
from zinfer.checkpoint.read import read_range, regular_size
from zinfer.errors import MachineError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def write_whole(path: Path, data: bytes) -> None:
    """The file appears complete or not at all.  Raises MachineError ZI-5932."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise MachineError(
            "ZI-5932", f"{path} cannot be written: {error.strerror}", remedy=f"df -h {path.parent}"
        ) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, Any] | None = None) -> None:
    """Tensors by name, and notes that JSON can hold."""
    own = {name: tensor.detach().contiguous() for name, tensor in sorted(tensors.items())}
    write_whole(path, save(own, {"notes": json.dumps(notes or {}, sort_keys=True)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote.  Raises CheckpointError ZI-41xx for a file that is damaged."""
    raw, entries = _header(path)
    tensors = {}
    for entry in entries:
        data = bytearray(read_range(path, entry.offset, entry.nbytes))
        flat = torch.frombuffer(data, dtype=DTYPES[entry.dtype]) if data else torch.empty(0)
        tensors[entry.name] = flat.view(entry.shape)
    notes: dict[str, Any] = json.loads(json.loads(raw).get("__metadata__", {}).get("notes", "{}"))
    return tensors, notes


def read_sizes(path: Path) -> dict[str, int]:
    """Bytes of each tensor by name, from the header alone.  Raises CheckpointError as `read_tensors`."""
    return {entry.name: entry.nbytes for entry in _header(path)[1]}


def _header(path: Path) -> tuple[bytes, tuple[WeightEntry, ...]]:
    size = regular_size(path)
    length = int.from_bytes(read_range(path, 0, min(LENGTH_BYTES, size)), "little")
    raw = read_range(path, LENGTH_BYTES, min(length, size))
    return raw, parse_header(raw, size, str(path))
