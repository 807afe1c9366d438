"""How a distillation is carried out.  In: what a user asks for.  Out: one frozen record, checked."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import pairwise

from zinfer.errors import UsageError

MAX_STUDENTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillSettings:
    """Defaults are those of student parallelism (arXiv 2408.12526) where it states any.

    `students` and `layers`: how many, and how deep each is; `width`: which share of the teacher's heads and, unless
    `mlp_width` says otherwise, MLP neurons each layer of a student has (`narrow.width_for`).  `epochs` over the
    training texts per round, `polish` epochs of all students together at `polish_lr` of the rate, `batch` texts a step.
    `hidden` is the weight of the supervision inside the layers at the beginning (it falls to 0 over the first half of a
    round), `soft` and `hard` those of the teacher's and the labels' classes.  A round that lowers the residual energy
    on texts it has not seen by less than `least_gain` is dropped, and no further one is begun.
    """

    students: int = 3
    layers: int = 2
    width: float = 1.0
    mlp_width: float | None = None
    epochs: float = 3.0
    polish: float = 2.0
    batch: int = 32
    lr: float = 1e-4
    polish_lr: float = 0.3
    hidden: float = 1.0
    soft: float = 1.0
    hard: float = 0.1
    temperature: float = 2.0
    least_gain: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UsageError ZI-1151 for a value that cannot be meant."""
        wanted = {
            "students": 1 <= self.students <= MAX_STUDENTS,
            "layers": self.layers >= 1,
            "width": 0 < self.width <= 1,
            "mlp_width": self.mlp_width is None or 0 < self.mlp_width <= 1,
            "epochs": 0 < self.epochs < 1e6,
            "polish": 0 <= self.polish < 1e6,
            "batch": self.batch >= 1,
            "lr": 0 < self.lr < 1,
            "polish_lr": 0 < self.polish_lr <= 1,
            "temperature": 0 < self.temperature < 1e3,
            "least_gain": 0 <= self.least_gain < 1,
        }
        for name, is_meant in wanted.items():
            if not is_meant:
                raise UsageError(
                    "ZI-1151",
                    f"{name} = {getattr(self, name)} cannot be meant",
                    remedy="--students 3 --layers 2 --width 1 --epochs 3 --polish 2 --batch 32 --lr 1e-4",
                )

    def fingerprint(self) -> str:
        """What must be the same for a run to be resumed."""
        return json.dumps(asdict(self), sort_keys=True)


def segments(teacher_layers: int, students: int, layers: int) -> list[list[int]]:
    """Which teacher layer (1 .. teacher_layers) each layer of each student learns from.

    The first student spans the whole depth evenly; student k of the others the k-th of `students` segments, so that
    the group covers the teacher's depth side by side.  Raises UsageError ZI-1152 when a student would be as deep as
    the teacher or deeper.
    """
    if layers >= teacher_layers:
        raise UsageError(
            "ZI-1152",
            f"students of {layers} layers were asked for, the teacher has {teacher_layers}",
            remedy=f"--layers {max(teacher_layers // 2, 1)}",
        )
    first = [max(round(layer * teacher_layers / layers), 1) for layer in range(1, layers + 1)]
    ends = [round(k * teacher_layers / students) for k in range(students + 1)]
    later = [
        [max(round(begin + layer * (end - begin) / layers), 1) for layer in range(1, layers + 1)]
        for begin, end in pairwise(ends[1:])
    ]
    return [first, *later]
