"""The one training loop.  In: tensors and a loss per step.  Out: the tensors trained; a run that is killed goes on.

What a step draws follows from (seed, stage, step) alone, and every so often all state is written to one file: so an
interrupted run ends in the same bits as one that was left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from zinfer.errors import UsageError
from zinfer.students.tensors import read_tensors, write_tensors

WARM_UP = 0.1  # of the steps
WEIGHT_DECAY = 0.01
MAX_NORM = 1.0
SAVE_EVERY = 100
SORTED_BATCHES = 16  # batches whose texts are sorted by length together: fewer lengths per step
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Course:
    """One stage of training: its name, how many steps, the batch, the highest learning rate, the seed."""

    stage: str
    num_steps: int
    batch: int
    lr: float
    seed: int

    def draw(self, step: int, what: str = "") -> torch.Generator:
        """A generator that belongs to a step of this stage."""
        seed = xxhash.xxh3_64_intdigest(f"{self.seed}/{self.stage}/{what}/{step}".encode())
        return torch.Generator().manual_seed(seed % 2**63)

    def texts(self, step: int, numbers: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """The texts of a step: every epoch is a new order of all of them."""
        per_epoch = max(math.ceil(len(numbers) / self.batch), 1)
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(numbers), generator=self.draw(epoch, "order")).tolist()
        block = place // SORTED_BATCHES * SORTED_BATCHES * self.batch
        part = sorted(order[block : block + SORTED_BATCHES * self.batch], key=lambda at: lengths[numbers[at]])
        begin = place * self.batch - block
        return [numbers[at] for at in part[begin : begin + self.batch]]

    def rate(self, step: int) -> float:
        """Learning rate: a linear warm-up, then half a cosine."""
        warm = max(int(WARM_UP * self.num_steps), 1)
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(self.num_steps - warm, 1)))


def num_steps(texts: int, batch: int, epochs: float) -> int:
    """Steps of so many epochs."""
    return round(epochs * max(math.ceil(texts / batch), 1))


def train(
    course: Course,
    tensors: Mapping[str, Tensor],
    loss_of: Callable[[int], Tensor],
    *,
    save_file: Path,
    progress: Progress,
    save_every: int = SAVE_EVERY,
) -> None:
    """Train leaf tensors in place with AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101).

    `loss_of(step)` is the step's loss.  Goes on from `save_file` where it holds this stage.  Raises UsageError
    ZI-1154 for a loss that is no number.
    """
    optimiser = torch.optim.AdamW(list(tensors.values()), course.lr, weight_decay=WEIGHT_DECAY, foreach=False)
    begin = _load(save_file, course, tensors, optimiser)
    for step in range(begin, course.num_steps):
        for group in optimiser.param_groups:
            group["lr"] = course.rate(step)
        loss = loss_of(step)
        if not torch.isfinite(loss):
            raise UsageError(
                "ZI-1154",
                f"{course.stage}: the loss of step {step + 1} is {loss.item()}",
                remedy=f"--lr {course.lr / 4:g}   # a new --out begins anew",
            )
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(list(tensors.values()), MAX_NORM, foreach=False)
        optimiser.step()
        if (step + 1) % save_every == 0:
            _save(save_file, course, step + 1, tensors, optimiser)
        progress(step + 1, course.num_steps, course.stage)


def _save(
    path: Path, course: Course, step: int, tensors: Mapping[str, Tensor], optimiser: torch.optim.AdamW
) -> None:
    """A tensor that some steps leave out (the polish's longer prefixes) has counted fewer steps than others."""
    held, counts = dict(tensors), {}
    for name, tensor in tensors.items():
        if state := optimiser.state.get(tensor):
            held |= {f"mean/{name}": state["exp_avg"], f"square/{name}": state["exp_avg_sq"]}
            counts[name] = int(state["step"])
    write_tensors(path, held, {"stage": course.stage, "step": step, "counts": counts})


def _load(path: Path, course: Course, tensors: Mapping[str, Tensor], optimiser: torch.optim.AdamW) -> int:
    """The step to begin with."""
    if not path.exists():
        return 0
    held, notes = read_tensors(path)
    if notes.get("stage") != course.stage:
        return 0
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(held[name])
            if name in notes["counts"]:
                optimiser.state[tensor] = {
                    "step": torch.tensor(float(notes["counts"][name])),
                    "exp_avg": held[f"mean/{name}"].clone(),
                    "exp_avg_sq": held[f"square/{name}"].clone(),
                }
    return int(notes["step"])
