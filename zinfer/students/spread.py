"""Students spread over devices.  In: a group, devices, a collective.  Out: the sum of what each device's students add.

Student k lives on device k mod G, so that every prefix is spread evenly.  Token ids go to all devices, and one row
per text comes back from each: [S, D] is all that is ever reduced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from zinfer.errors import UsageError
from zinfer.layers.packed import Packed
from zinfer.students.bank import StudentBank
from zinfer.students.group import Group
from zinfer.students.student import encoder_of


class Collective(Protocol):
    """What a spread group asks of whoever connects the devices."""

    def sum(self, parts: Sequence[Tensor]) -> Tensor:
        """The sum of tensors of one shape, each on its device, where the first lies; always added in this order."""
        ...


class CopyingCollective:
    """Copies every part to the first one's device and adds: right anywhere, and right for a row per text."""

    def sum(self, parts: Sequence[Tensor]) -> Tensor:
        """As the protocol says."""
        first, *rest = parts
        for part in rest:
            first = first + part.to(first.device)
        return first


class SpreadBank:
    """A bank per device; answers as one bank would.  The head and the tables the group shares are on every device.

    Raises UsageError ZI-1164 for more devices than students.
    """

    def __init__(self, group: Group, devices: Sequence[torch.device | str], collective: Collective) -> None:
        count, num_devices = len(group.students), len(devices)
        if not 1 <= num_devices <= count:
            raise UsageError(
                "ZI-1164",
                f"{count} students cannot be spread over {num_devices} devices",
                remedy=f"at most {count} devices",
            )
        self.num_students, self.collective = count, collective
        # Slices are taken before the first bank takes the group's tensors over.
        shares = [
            replace(group, students=group.students[g::num_devices], factors=group.factors[g::num_devices])
            for g in range(num_devices)
        ]
        group.students = []
        self.banks = [StudentBank(share, device) for share, device in zip(shares, devices, strict=True)]
        self.group = self.banks[0].group

    @property
    def nbytes(self) -> int:
        """Bytes on all devices."""
        return sum(bank.nbytes for bank in self.banks)

    def of_device(self, g: int, num_students: int) -> int:
        """How many of the first `num_students` device g holds."""
        return len(range(g, num_students, len(self.banks)))

    def warm_up(self, students: Sequence[int]) -> None:
        """Record passes on every device, for as many students as it has of each prefix."""
        for g, bank in enumerate(self.banks):
            bank.warm_up({count for m in students if (count := self.of_device(g, m))})

    def answer(self, batch: Packed, num_students: int) -> tuple[Tensor, Tensor | None]:
        """(representation [S, D], calibrated logits [S, C] or None) of the first `num_students`, on the host."""
        with torch.no_grad():
            held = [(bank, self.of_device(g, num_students)) for g, bank in enumerate(self.banks)]
            # All devices have their work before the first is waited for.
            parts = [bank.sums(batch, count)[0] for bank, count in held if count]
            rows_SD = self.group.origin + self.collective.sum(parts)
            if not encoder_of(self.group.teacher).labels:
                return rows_SD.cpu(), None
            logits_SC = self.group.calibrated(self.group.logits(rows_SD), num_students)
            return rows_SD.cpu(), logits_SC.cpu()

    def close(self) -> None:
        """End every bank."""
        for bank in self.banks:
            bank.close()
