"""How a pass over students is carried out on a CPU.  In: a size.  Out: the form that was fastest for it here.

The forms give the same numbers up to rounding: batched products of all students, students in turn, a student per
thread.  Which is fastest depends on the machine, so it is measured and remembered.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from zinfer.kernels.choice import fastest
from zinfer.kernels.remembered import remembered
from zinfer.layers.packed import Packed
from zinfer.runtime.texts import pack_texts
from zinfer.spec.records import ModelSpec
from zinfer.students.lanes import Lanes
from zinfer.students.stacked import embedded, fused
from zinfer.students.student import PROJECTION, answer
from zinfer.tokenizer import Encoded

SIZES = (16, 64, 256, 1024)  # token rows for which a form is chosen; larger passes do as the largest
TYPICAL = 32  # tokens of a text in the measured passes
Form = Callable[[Packed, int], Tensor]  # packed texts, m -> f_1 .. f_m, fp32 [m, S, D]


class Forms:
    """The forms of one bank, whose weights they only view.  Safe to call from several threads."""

    def __init__(self, spec: ModelSpec, shared: Mapping[str, Tensor], stacked: Mapping[str, Tensor]) -> None:
        self._spec, self._shared, self._stacked = spec, shared, stacked
        self._students = [
            {name: tensor[k] for name, tensor in stacked.items()} for k in range(len(stacked[PROJECTION]))
        ]
        lanes = min(torch.get_num_threads(), len(self._students))
        self._lanes = Lanes(lanes) if lanes > 1 else None
        self.by_name: dict[str, Form] = {"fused": self._fused, "in turn": self._in_turn}
        if self._lanes is not None:
            self.by_name["threaded"] = self._threaded
        self.chosen: dict[tuple[int, int], str] = {}  # (size, m) -> name

    def run(self, batch: Packed, num_students: int) -> Tensor:
        """f_1 .. f_m by the form that was fastest for about so many rows; the first pass of a size measures."""
        size = next((size for size in SIZES if size >= batch.num_rows), SIZES[-1])
        case = size, num_students
        if num_students == 1:  # the forms then do the same, this one with the fewest steps
            return self._fused(batch, 1)
        if case not in self.chosen:
            self.chosen[case] = self._choose(*case)
        return self.by_name[self.chosen[case]](batch, num_students)

    def close(self) -> None:
        """End the threads."""
        if self._lanes is not None:
            self._lanes.close()

    def _choose(self, size: int, num_students: int) -> str:
        spec, threads = self._spec, torch.get_num_threads()
        shape = (spec.num_layers, spec.model_dim, spec.mlp_dim, spec.num_heads)
        texts = [Encoded((0,) * length, (0,) * length, is_cut=False) for length in _lengths(size)]
        batch = pack_texts(texts).without_segments()

        def find() -> str:
            runs = {name: partial(run, batch, num_students) for name, run in self.by_name.items()}
            with torch.no_grad():
                return fastest(runs, time.perf_counter)

        return str(
            remembered(
                f"students {shape} m {num_students} rows {size} threads {threads}",
                lambda name: name in self.by_name,
                find,
            )
        )

    def _fused(self, batch: Packed, num_students: int) -> Tensor:
        stacked = {name: tensor[:num_students] for name, tensor in self._stacked.items()}
        return fused(self._spec, self._shared, stacked, batch)

    def _in_turn(self, batch: Packed, num_students: int) -> Tensor:
        return torch.stack(self._some(batch, self._entered(batch), range(num_students)))

    def _threaded(self, batch: Packed, num_students: int) -> Tensor:
        assert self._lanes is not None, "the form is there only with threads"
        entered_TM = self._entered(batch)
        parts = [partial(self._some, batch, entered_TM, [k]) for k in range(num_students)]
        return torch.stack([rows for part in self._lanes.run(parts) for rows in part])

    def _entered(self, batch: Packed) -> Tensor:
        return embedded(self._spec, self._shared, self._spec.program[0], batch)

    def _some(self, batch: Packed, entered_TM: Tensor, students: Sequence[int]) -> list[Tensor]:
        own = [self._students[k] for k in students]
        return [answer(self._spec, self._shared, weights, batch, entered_TM=entered_TM) for weights in own]


def _lengths(size: int) -> list[int]:
    return [min(TYPICAL, size)] * (size // min(TYPICAL, size))
