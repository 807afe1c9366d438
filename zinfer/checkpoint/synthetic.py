"""Random checkpoints at real shapes.  In: a spec, its config, a seed.  Out: a folder in Hugging Face layout.

For measuring and testing: the same (names, shapes, seed, dtype) always give the same bytes.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from io import RawIOBase
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zinfer.checkpoint.check import Needs, published_shapes
from zinfer.checkpoint.folder import quoted
from zinfer.checkpoint.header import DTYPE_BITS
from zinfer.checkpoint.index import CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from zinfer.errors import UsageError

POOL_NUMEL = 2**20  # normals drawn per tensor; a larger tensor repeats them, rotated anew each time
BIAS_SCALE = 0.02
NORM_SPREAD = 0.05


def write_checkpoint(
    spec: Needs,
    config: Mapping[str, Any],
    folder: str | Path,
    seed: int = 0,
    dtype: str = "BF16",
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Write config.json and seeded random weights to `folder`, one tensor at a time in a few MiB of memory.

    Matrices are normal with variance 1 / fan_in, norms near 1, biases small, so that logits come out of order 1.
    Files, headers and order are as the upstream library writes them (by name, header padded to 8 bytes).  Raises
    UsageError ZI-1051 where the folder holds weights already.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.safetensors")):
        raise UsageError("ZI-1051", f"{folder} holds weights already", remedy=f"rm -r {quoted(folder)}")
    shapes = dict(sorted(published_shapes(spec).items()))
    recipes = _recipes(spec, shapes)
    shards = _shards(shapes, dtype, shard_bytes)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE_FILE]
    for name, tensors in zip(names, shards, strict=True):
        with (folder / name).open("wb", buffering=0) as file:
            file.write(_header({tensor: shapes[tensor] for tensor in tensors}, dtype))
            for tensor in tensors:
                _write_tensor(
                    file, shapes[tensor], recipes[tensor], [seed, zlib.crc32(tensor.encode())], dtype
                )
    if len(shards) > 1:
        where = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
        total = sum(_nbytes(shape, dtype) for shape in shapes.values())
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": where})
    # Last: a folder whose writing was interrupted is not taken for a model.
    _write_json(folder / CONFIG_FILE, config)


def _recipes(spec: Needs, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of every tensor's elements."""
    recipes = {table.name: (0.0, float(table.width**-0.5)) for table in spec.lookups}
    for op in spec.program:
        for weight in op.weights:
            if weight.role in {"norm", "q_norm", "k_norm"}:
                recipes[weight.name] = (1.0, NORM_SPREAD)
            elif len(weight.shape) == 1:
                recipes[weight.name] = (0.0, BIAS_SCALE)
            else:
                fan_in = shapes[weight.name][0 if spec.transposed and op.kind != "head" else 1]
                recipes[weight.name] = (0.0, float(fan_in**-0.5))
    return recipes


def _shards(shapes: Mapping[str, tuple[int, ...]], dtype: str, shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        nbytes = _nbytes(shape, dtype)
        if shards[-1] and used + nbytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += nbytes
    return shards


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> bytes:
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        end = at + _nbytes(shape, dtype)
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(
    file: RawIOBase, shape: tuple[int, ...], recipe: tuple[float, float], seed: list[int], dtype: str
) -> None:
    rng = np.random.default_rng(seed)
    numel = math.prod(shape)
    values = rng.standard_normal(min(numel, POOL_NUMEL), dtype=np.float32) * np.float32(recipe[1])
    pool = _encoded(values + np.float32(recipe[0]), dtype).data.cast("B")
    left = _nbytes(shape, dtype)
    width = DTYPE_BITS[dtype] // 8
    _write_all(file, pool)
    left -= len(pool)
    while left:
        turn = int(rng.integers(POOL_NUMEL)) * width
        for part in (pool[turn:], pool[:turn]):
            _write_all(file, part[: min(left, len(part))])
            left -= min(left, len(part))


def _encoded(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    if dtype == "F32":
        return values
    if dtype == "F16":
        return values.astype(np.float16)
    # BF16 is the upper half of a float32, rounded to nearest, ties to even; normals have no NaN to spare.
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _write_all(file: RawIOBase, view: memoryview) -> None:
    while len(view):
        view = view[file.write(view) :]


def _nbytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
