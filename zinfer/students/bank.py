"""Students side by side.  In: a group.  Out: stacked tensors, and what the first m of them answer in one pass.

Shape legend: m students in use, S texts, D representation, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from zinfer.layers.packed import Packed
from zinfer.runtime.captured import Outputs
from zinfer.students.fixed import BUCKETS, Bucket, Replays
from zinfer.students.forms import Forms
from zinfer.students.group import Group
from zinfer.students.stacked import filled, fused
from zinfer.students.student import encoder_of


class StudentBank:
    """All students of a group, each weight stacked into one tensor [K, ...] that is never moved or changed.

    Serves any prefix; which one is an argument of every call, and costs no load.  On the CPU a pass takes the form
    that was measured to be fastest, on a device it replays a recorded one after `warm_up`, else its eager twin runs.
    Safe to call from several threads.  Takes the group's tensors over, `group.students` is then empty.  Owns the
    threads of its forms and its recorded passes until `close`.
    """

    def __init__(self, group: Group, device: torch.device | str = "cpu") -> None:
        self.group, self.device = group, torch.device(device)
        self.spec = group.spec
        self.stacked: dict[str, Tensor] = {
            name: torch.stack([weights[name] for weights in group.students]).contiguous().to(self.device)
            for name in group.students[0]
        }
        self.factors = torch.stack(group.factors).to(self.device)
        group.students = []  # the stacked tensors hold them now
        group.shared = {name: tensor.to(self.device) for name, tensor in group.shared.items()}
        group.head = {name: tensor.to(self.device) for name, tensor in group.head.items()}
        for name in ("origin", "temperatures", "biases"):
            setattr(group, name, getattr(group, name).to(self.device))
        self.forms = Forms(self.spec, group.shared, self.stacked) if self.device.type == "cpu" else None
        self.replays = Replays(self._filled, self.device)

    @property
    def num_students(self) -> int:
        """K."""
        return len(self.factors)

    @property
    def nbytes(self) -> int:
        """Bytes that the bank keeps."""
        own = [*self.stacked.values(), *self.group.shared.values(), *self.group.head.values()]
        return sum(tensor.nbytes for tensor in own)

    def warm_up(self, students: Iterable[int], buckets: Iterable[Bucket] = BUCKETS) -> None:
        """Record a pass of every size; passes of other sizes, and other numbers of students, run eagerly."""
        self.replays.warm_up(students, buckets)

    def shares(self, batch: Packed, num_students: int) -> Tensor:
        """What each of the first m adds to the representation: fp32 [m, S, D], on the bank's device."""
        if self.forms is not None:
            return self._weighed(self.forms.run(batch, num_students))
        first = {name: tensor[:num_students] for name, tensor in self.stacked.items()}
        return self._weighed(fused(self.spec, self.group.shared, first, self._brought(batch)))

    def prefixes(self, batch: Packed, num_students: int) -> Tensor:
        """F_1 .. F_m of packed texts: fp32 [m, S, D]."""
        return self.group.origin + self.shares(batch, num_students).cumsum(0)

    def sums(self, batch: Packed, num_students: int) -> Outputs:
        """(sum of the shares [S, D], representation [S, D], and calibrated logits [S, C] where there are classes).

        On the bank's device, where they may still be being computed.
        """
        with torch.no_grad():
            replayed = self.replays.run(batch, num_students)
            if replayed is not None:
                return replayed
            return self._summed(self.shares(batch, num_students), num_students)

    def answer(self, batch: Packed, num_students: int) -> tuple[Tensor, Tensor | None]:
        """(representation [S, D], calibrated logits [S, C] or None) of the first `num_students`, on the host."""
        _, rows_SD, *logits = self.sums(batch, num_students)
        return rows_SD.cpu(), logits[0].cpu() if logits else None

    def close(self) -> None:
        """End the threads, drop recorded passes; the weights stay until nobody refers to them."""
        self.replays.recorded.clear()
        if self.forms is not None:
            self.forms.close()

    def _summed(self, shares_mSD: Tensor, num_students: int) -> Outputs:
        sum_SD = shares_mSD.sum(0)
        rows_SD = self.group.origin + sum_SD
        if not encoder_of(self.group.teacher).labels:
            return sum_SD, rows_SD
        return sum_SD, rows_SD, self.group.calibrated(self.group.logits(rows_SD), num_students)

    def _filled(self, num_students: int, batch: Packed, text_T: Tensor, starts_S: Tensor) -> Outputs:
        """A pass of a fixed size, as it is recorded."""
        first = {name: tensor[:num_students] for name, tensor in self.stacked.items()}
        answers_mSD = filled(self.spec, self.group.shared, first, batch, text_T, starts_S)
        return self._summed(self._weighed(answers_mSD), num_students)

    def _weighed(self, answers_mSD: Tensor) -> Tensor:
        return self.factors[: len(answers_mSD), None, None] * answers_mSD

    def _brought(self, batch: Packed) -> Packed:
        segments_T = batch.segments_T
        return replace(
            batch,
            tokens_T=batch.tokens_T.to(self.device),
            positions_T=batch.positions_T.to(self.device),
            segments_T=None if segments_T is None else segments_T.to(self.device),
        )
