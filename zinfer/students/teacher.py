"""The teacher, run once.  In: its engine and a corpus.  Out: its states on disk, read back as they are needed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zinfer.checkpoint.read import read_range
from zinfer.chunks.source import Source
from zinfer.errors import MachineError, UsageError
from zinfer.runtime.executor import Executor
from zinfer.runtime.texts import encode
from zinfer.students.corpus import Corpus
from zinfer.students.tensors import DTYPES, write_whole

WINDOW = 256  # texts between two records of how far the cache has come
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class TeacherStates:
    """Memory-mapped: `pooled` fp32 [N, D], `logits` fp32 [N, C] or None, `layers` l -> fp16 [T, M] of token rows.

    Text n owns rows bounds[n]:bounds[n+1] of a layer.
    """

    pooled: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32] | None
    layers: dict[int, npt.NDArray[np.float16]]
    bounds: npt.NDArray[np.int64]

    def layer_rows(self, layer: int, texts: Sequence[int]) -> Tensor:
        """fp32 [rows, M] of these texts, back to back."""
        states = self.layers[layer]
        rows = [states[self.bounds[text] : self.bounds[text + 1]] for text in texts]
        return torch.from_numpy(np.concatenate(rows)).float()


def teacher_states(
    executor: Executor,
    corpus: Corpus,
    layers: Sequence[int],
    folder: Path,
    *,
    max_rows: int,
    max_batch: int,
    progress: Progress,
) -> TeacherStates:
    """Run every text through the teacher once, or go on where an interrupted run left off.

    What a window of texts gave is appended to the files and then recorded, so that a record never promises what is
    not there; only a window is in memory.  Raises MachineError ZI-5933 when the disk is too small, UsageError ZI-1191
    for a teacher that says what is no number.
    """
    encoder = executor.spec.encoder
    assert encoder is not None, "the teacher was checked to be an encoder"
    bounds = np.cumsum([0, *(len(one.ids) for one in corpus.encoded)])
    widths = {"pooled": executor.spec.model_dim * (1 if encoder.labels else len(encoder.pooling))}
    widths |= {"logits": len(encoder.labels)} if encoder.labels else {}
    widths |= {f"layer-{layer}": executor.spec.model_dim for layer in sorted(set(layers))}
    cache = _Cache(folder, widths, bounds)
    cache.open(json.dumps([corpus.digest, executor.spec.architecture, sorted(widths)]))
    while cache.num_done < len(corpus):
        texts = range(cache.num_done, min(cache.num_done + WINDOW, len(corpus)))
        found: dict[int, dict[str, Tensor]] = {}
        given = [corpus.encoded[text] for text in texts]
        for numbers, batch, flow in encode(
            executor, given, max_rows=max_rows, max_batch=max_batch, keep_layers=True
        ):
            pooled = flow.first if encoder.labels else flow.pooled
            assert pooled is not None and flow.layers is not None, "the pass has pooled and kept its layers"
            for at, number in enumerate(numbers):
                rows = slice(batch.bounds[at], batch.bounds[at + 1])
                found[number] = {"pooled": pooled[at : at + 1]}
                found[number] |= {f"layer-{layer}": flow.layers[layer - 1][rows] for layer in set(layers)}
                if flow.logits is not None:
                    found[number]["logits"] = flow.logits[at : at + 1]
        cache.append([found[number] for number in range(len(texts))])
        progress(cache.num_done, len(corpus), "teacher")
    arrays = {name: cache.mapped(name) for name in widths}
    kept = {int(name.removeprefix("layer-")): array for name, array in arrays.items() if "layer-" in name}
    return TeacherStates(arrays["pooled"], arrays.get("logits"), kept, bounds)


class _Cache:
    """Files of rows, all of them as long as `record.json` says or longer; what is behind is cut off on opening."""

    def __init__(self, folder: Path, widths: dict[str, int], bounds: npt.NDArray[np.int64]) -> None:
        self.folder = folder
        self.widths = widths
        self.bounds = bounds
        self.num_done = 0
        self.key = ""

    def open(self, key: str) -> None:
        self.key = key
        self.folder.mkdir(parents=True, exist_ok=True)
        needed = sum(self._nbytes(name, len(self.bounds) - 1) for name in self.widths)
        free = os.statvfs(self.folder).f_bavail * os.statvfs(self.folder).f_frsize
        record = self.folder / "record.json"
        held: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
        self.num_done = held.get("done", 0) if held.get("key") == key else 0
        if needed > free + sum(path.stat().st_size for path in self.folder.glob("*.rows")):
            raise MachineError(
                "ZI-5933",
                f"the teacher's states take {needed} bytes, {self.folder} has {free} left",
                remedy="give fewer texts, fewer students, or another --out",
            )
        for name in self.widths:
            path = self.folder / f"{name}.rows"
            path.touch()
            os.truncate(path, self._nbytes(name, self.num_done))

    def append(self, rows: Sequence[dict[str, Tensor]]) -> None:
        for name in self.widths:
            dtype = torch.float16 if name.startswith("layer-") else torch.float32
            joined = torch.cat([row[name] for row in rows]).cpu().to(dtype).contiguous()
            if not torch.isfinite(joined).all():
                raise UsageError(
                    "ZI-1191",
                    f"what the teacher says of texts {self.num_done + 1} to {self.num_done + len(rows)} ({name}) "
                    "is not finite, or too large for fp16: nothing can be learnt from it",
                    remedy="--teacher another folder; or copy this one again",
                )
            with (self.folder / f"{name}.rows").open("ab") as file:
                file.write(joined.numpy().tobytes())
                file.flush()
                os.fsync(file.fileno())
        self.num_done += len(rows)
        record = {"key": self.key, "done": self.num_done}
        write_whole(self.folder / "record.json", json.dumps(record).encode())

    def mapped(self, name: str) -> npt.NDArray[Any]:
        dtype = np.float16 if name.startswith("layer-") else np.float32
        shape = (-1, self.widths[name])
        return np.memmap(self.folder / f"{name}.rows", dtype=dtype, mode="r").reshape(shape)

    def _nbytes(self, name: str, num_texts: int) -> int:
        if name.startswith("layer-"):
            return int(self.bounds[num_texts]) * self.widths[name] * 2
        return num_texts * self.widths[name] * 4


def read_weights(source: Source, names: Collection[str]) -> dict[str, Tensor]:
    """These published tensors, whole, in fp32: what students share and begin from."""
    pieces: dict[str, dict[int, Tensor]] = {}
    for place in (place for unit in source.units for place in unit.places if place.name in names):
        data = bytearray(read_range(source.files[place.file], place.offset, place.nbytes))
        piece = torch.frombuffer(data, dtype=DTYPES[place.dtype]).view(place.shape).float()
        pieces.setdefault(place.name, {})[place.start] = piece
    return {name: torch.cat([parts[at] for at in sorted(parts)]) for name, parts in pieces.items()}
