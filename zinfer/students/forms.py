"""How a pass over students is carried out on a CPU.  In: a size.  Out: the form that was fastest for it here.

The forms give the same numbers up to rounding: batched products of all students, students in turn, a student per
thread, and compiled code that takes texts and students in turn on several cores.  Which is fastest depends on the
machine, so it is measured and remembered.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from zinfer.kernels.choice import fastest
from zinfer.kernels.native.encoder import EncoderLayers
from zinfer.kernels.remembered import remembered
from zinfer.layers.packed import Packed
from zinfer.layers.pooling import pool
from zinfer.log import logger
from zinfer.runtime.texts import pack_texts
from zinfer.spec.records import ModelSpec
from zinfer.students.lanes import Lanes
from zinfer.students.stacked import embedded, fused
from zinfer.students.student import OFFSET, PROJECTION, answer, encoder_of
from zinfer.tokenizer import Encoded

SIZES = (16, 64, 256, 1024)  # token rows for which a form is chosen; larger passes do as the largest
TYPICAL = 32  # tokens of a text in the measured passes
AGREE = 1e-4  # of the largest number: what compiled code may differ by from its twin
_OF_ONE = ("fused", "compiled")  # forms that differ for one student
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
        self._compiled: EncoderLayers | None = None
        self._cores = 1

    def compile(self, lanes: int) -> None:
        """Offer the compiled form on about `lanes` cores, where it gives what its twin gives; copies the weights.

        The caller has asked `native.encoder.serves`.
        """
        self._compiled, self._cores = EncoderLayers(self._spec, self._students), lanes
        batch, most = _typical(SIZES[1]), len(self._students)
        with torch.no_grad():
            wanted, found = self._fused(batch, most), self._compiled_pass(batch, most)
        if (wanted - found).abs().max() > AGREE * wanted.abs().max():
            logger.warning("the compiled encoder computes wrongly here: slower torch code replaces it")
            self._compiled = None
            return
        self.by_name["compiled"] = self._compiled_pass

    def run(self, batch: Packed, num_students: int) -> Tensor:
        """f_1 .. f_m by the form that was fastest for about so many rows; the first pass of a size measures."""
        size = next((size for size in SIZES if size >= batch.num_rows), SIZES[-1])
        case = size, num_students
        if num_students == 1 and self._compiled is None:  # the others then do the same in more steps
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
        shape = (spec.num_layers, spec.model_dim, spec.mlp_dim, spec.num_heads, spec.head_dim)
        batch = _typical(size)
        forms = {name: run for name, run in self.by_name.items() if num_students > 1 or name in _OF_ONE}

        def find() -> str:
            runs = {name: partial(run, batch, num_students) for name, run in forms.items()}
            with torch.no_grad():
                return fastest(runs, time.perf_counter)

        return str(
            remembered(
                f"students {shape} m {num_students} rows {size} threads {threads} of {sorted(forms)} on {self._cores}",
                lambda name: name in forms,
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

    def _compiled_pass(self, batch: Packed, num_students: int) -> Tensor:
        assert self._compiled is not None, "the form is there only when it was compiled"
        modes, bounds = encoder_of(self._spec).pooling, batch.bounds
        is_first = set(modes) == {"cls"}  # of the last layer nothing else is read
        rows_mRM = self._compiled.run(
            self._entered(batch), bounds, num_students, first_only=is_first, lanes=self._cores
        )
        if is_first:
            pooled_mSM = rows_mRM.repeat(1, 1, len(modes))
        else:
            pooled_mSM = torch.stack([pool(rows_TM, bounds, modes) for rows_TM in rows_mRM])
        own = (self._stacked[name][:num_students] for name in (OFFSET, PROJECTION))
        offset_mD, projection_mDM = own
        return torch.baddbmm(offset_mD[:, None], pooled_mSM, projection_mDM.transpose(1, 2))

    def _entered(self, batch: Packed) -> Tensor:
        return embedded(self._spec, self._shared, self._spec.program[0], batch)

    def _some(self, batch: Packed, entered_TM: Tensor, students: Sequence[int]) -> list[Tensor]:
        own = [self._students[k] for k in students]
        return [answer(self._spec, self._shared, weights, batch, entered_TM=entered_TM) for weights in own]


def _typical(size: int) -> Packed:
    """A pass of `size` rows."""
    texts = [Encoded((0,) * length, (0,) * length, is_cut=False) for length in _lengths(size)]
    return pack_texts(texts).without_segments()


def _lengths(size: int) -> list[int]:
    return [min(TYPICAL, size)] * (size // min(TYPICAL, size))
