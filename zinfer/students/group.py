"""A group of students.  In: their weights.  Out: what every prefix of it answers; the folder that holds it.

Shape legend: S texts, D representation, C classes, K students.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zinfer.checkpoint.read import sha256_file
from zinfer.errors import IntegrityError
from zinfer.layers.packed import Packed
from zinfer.log import logger
from zinfer.spec.records import ModelSpec
from zinfer.students.members import digests, num_whole
from zinfer.students.student import (
    OFFSET,
    PROJECTION,
    Width,
    answer,
    head_logits,
    head_names,
    layer_shapes,
    shared_names,
    student_spec,
    width_of,
)
from zinfer.students.tensors import read_tensors, write_tensors, write_whole

MANIFEST, WEIGHTS = "students.json", "students.safetensors"
FORMAT = 1


@dataclass
class Group:
    """F_m(x) = origin + sum over k < m of factors[k] * f_k(x); `head` makes logits of it, calibrated per prefix.

    `shared` are the tables all students read, `students[k]` the weights of one, `factors` [K] the line search's.
    `temperatures` [K] and `biases` [K, C] are those of prefix m at m - 1.  Each student has `layers` layers of a
    `width`; None: the teacher's.
    """

    teacher: ModelSpec
    shared: dict[str, Tensor]
    origin: Tensor
    head: dict[str, Tensor] = field(default_factory=dict)
    students: list[dict[str, Tensor]] = field(default_factory=list)
    factors: list[Tensor] = field(default_factory=list)
    temperatures: Tensor = field(default_factory=lambda: torch.ones(0))
    biases: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    layers: int = 2
    width: Width | None = None

    @property
    def spec(self) -> ModelSpec:
        """Of one student."""
        return student_spec(self.teacher, self.layers, self.width)

    def represent(self, batch: Packed, num_students: int) -> Tensor:
        """F_m of packed texts, fp32 [S, D]: one student after the other, the slow twin of the bank."""
        spec, rows_SD = self.spec, self.origin.expand(batch.num_sequences, -1)
        for factor, weights in list(zip(self.factors, self.students, strict=True))[:num_students]:
            rows_SD = rows_SD + factor * answer(spec, self.shared, weights, batch)
        return rows_SD

    def logits(self, rows_SD: Tensor) -> Tensor:
        """The head on F_m, as trained."""
        return head_logits(self.teacher, self.head, rows_SD)

    def calibrated(self, logits_SC: Tensor, num_students: int) -> Tensor:
        """Logits divided by the prefix's temperature, plus its bias."""
        at = num_students - 1
        return logits_SC / self.temperatures[at] + self.biases[at]

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        found = {f"shared/{name}": tensor for name, tensor in self.shared.items()}
        found |= {f"head/{name}": tensor for name, tensor in self.head.items()}
        for k, weights in enumerate(self.students):
            found |= {f"students/{k}/{name}": tensor for name, tensor in weights.items()}
        return found | {
            "origin": self.origin,
            "factors": torch.stack(self.factors) if self.factors else torch.zeros(0),
            "temperatures": self.temperatures,
            "biases": self.biases,
        }


def write_group(group: Group, folder: Path, notes: Mapping[str, Any]) -> None:
    """Weights first, the manifest last: a folder that was interrupted has none and is not taken for a group."""
    write_tensors(folder / WEIGHTS, group.tensors())
    manifest = {
        **notes,
        "format": FORMAT,
        "students": len(group.students),
        "layers": group.layers,
        "width": asdict(width_of(group.spec)),
        "sha256": sha256_file(folder / WEIGHTS),
        "members": digests(group.tensors()),
    }
    write_whole(folder / MANIFEST, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())


def read_group(
    folder: Path, teacher: ModelSpec, *, is_degraded: bool = False
) -> tuple[Group, dict[str, Any]]:
    """What `write_group` wrote; `teacher` is the spec of the folder's config.json.

    With `is_degraded` a group with damaged or missing students is cut to the first whole ones, and the log says so.
    Raises IntegrityError ZI-6091 for a manifest of another form, ZI-6092 where members are missing or misshapen,
    ZI-6093 where the weights are not those that were written.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        is_known = manifest["format"] == FORMAT
        count, layers = int(manifest["students"]), int(manifest["layers"])
        # A group that was written before students could be narrow does not say how wide they are.
        written = manifest.get("width", asdict(width_of(teacher)))
        width = Width(**{name: int(value) for name, value in written.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        is_known, count, layers, width, manifest = False, 0, 0, width_of(teacher), {}
    if not is_known or not 0 < layers < teacher.num_layers or not width.fits(teacher) or count < 1:
        raise IntegrityError(
            "ZI-6091",
            f"{folder / MANIFEST} is no manifest of a group of students",
            remedy=f"zinfer distill --teacher T --data train.jsonl --out {folder} --resume",
        )
    is_whole = sha256_file(folder / WEIGHTS) == manifest.get("sha256")
    if not is_whole and not is_degraded:
        raise _damaged(folder, "--degraded, which serves the first whole students, or copy the folder again")
    try:
        tensors, _ = read_tensors(folder / WEIGHTS)
    except (ValueError, KeyError) as error:  # a header whose bytes changed: only met where the digest was not
        raise _damaged(folder, f"copy {folder} again, or distill it again") from error
    if not is_whole:
        kept = min(num_whole(tensors, manifest), count)
        if not kept:
            raise _damaged(folder, f"copy {folder} again, or distill it again: no first student is whole")
        logger.warning(
            "%s is damaged: the first %d of its %d students are whole and answer", folder, kept, count
        )
        count = kept
    group = Group(teacher, {}, torch.zeros(0), layers=layers, width=width)
    group.students = [{} for _ in range(count)]
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        if part == "students" and rest.partition("/")[0].isdecimal() and int(rest.partition("/")[0]) < count:
            number, _, own = rest.partition("/")
            group.students[int(number)][own] = tensor
        elif part in ("shared", "head"):
            getattr(group, part)[rest] = tensor
    group.origin = tensors.get("origin", torch.zeros(0))
    group.temperatures, group.biases = (
        tensors.get(name, torch.zeros(0)) for name in ("temperatures", "biases")
    )
    group.factors = list(tensors.get("factors", torch.zeros(0)))
    if not is_whole:
        group.temperatures, group.biases = group.temperatures[:count], group.biases[:count]
        group.factors = group.factors[:count]
    _check(group, folder)
    return group, manifest


def _damaged(folder: Path, remedy: str) -> IntegrityError:
    return IntegrityError(
        "ZI-6093", f"{folder / WEIGHTS} is not what {MANIFEST} says was written", remedy=remedy
    )


def _check(group: Group, folder: Path) -> None:
    """Every member is there, and all are alike."""
    count = len(group.students)
    shapes = [{name: tuple(tensor.shape) for name, tensor in weights.items()} for weights in group.students]
    square = (len(group.origin), len(group.origin))
    own = layer_shapes(group.spec) | {PROJECTION: square, OFFSET: square[:1]}
    common = {*shared_names(group.teacher)} - {*head_names(group.teacher)}
    lacking = [k for k in range(count) if shapes[k] != own]
    if not common <= set(group.shared) or not {*head_names(group.teacher)} <= set(group.head):
        lacking = [0]
    num_factors, num_temperatures = len(group.factors), len(group.temperatures)
    if lacking or num_factors != count or num_temperatures != count or len(group.biases) != count:
        raise IntegrityError(
            "ZI-6092",
            f"{folder / WEIGHTS} lacks parts of student {lacking[0] if lacking else count}",
            remedy=f"copy {folder} again, or distill it again",
        )
