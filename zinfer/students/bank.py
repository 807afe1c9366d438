"""Students side by side.  In: a group.  Out: stacked tensors, and what the first m of them answer in one pass.

Shape legend: m students in use, T token rows, S texts, M model dim, H heads, D representation.  Student parallelism
(arXiv 2408.12526): a layer of all students is one batched product, so depth falls to a student's own, and using fewer
students is a slice of every tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from zinfer.layers.bidirectional import attend_whole
from zinfer.layers.mlp import activate
from zinfer.layers.packed import Packed
from zinfer.layers.pooling import pool
from zinfer.models.encoder import EncoderFlow, run_op
from zinfer.spec.records import Op
from zinfer.students.group import Group
from zinfer.students.student import OFFSET, PROJECTION, encoder_of


class StudentBank:
    """All students of a group, each weight stacked into one tensor [K, ...] that is never moved or changed.

    Serves any prefix; which one is an argument of every call, and costs no load.  Safe to call from several threads.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.spec = group.spec
        self.stacked: dict[str, Tensor] = {
            name: torch.stack([weights[name] for weights in group.students]).contiguous()
            for name in group.students[0]
        }
        self.factors = torch.stack(group.factors)
        group.students = []  # the stacked tensors hold them now

    @property
    def num_students(self) -> int:
        """K."""
        return len(self.factors)

    @property
    def nbytes(self) -> int:
        """Bytes that the bank keeps."""
        own = [*self.stacked.values(), *self.group.shared.values(), *self.group.head.values()]
        return sum(tensor.nbytes for tensor in own)

    def prefixes(self, batch: Packed, num_students: int) -> Tensor:
        """F_1 .. F_m of packed texts: fp32 [m, S, D]."""
        stacked = {name: tensor[:num_students] for name, tensor in self.stacked.items()}
        answers_mSD = _linear(self._pooled(batch, stacked), stacked[PROJECTION], stacked[OFFSET])
        return self.group.origin + (self.factors[:num_students, None, None] * answers_mSD).cumsum(0)

    def answer(self, batch: Packed, num_students: int) -> tuple[Tensor, Tensor | None]:
        """(representation [S, D], calibrated logits [S, C] or None) of the first `num_students`."""
        with torch.no_grad():
            rows_SD = self.prefixes(batch, num_students)[-1]
            if not encoder_of(self.group.teacher).labels:
                return rows_SD, None
            return rows_SD, self.group.calibrated(self.group.logits(rows_SD), num_students)

    def _pooled(self, batch: Packed, stacked: Mapping[str, Tensor]) -> Tensor:
        """[m, S, D] before the projections: the student's program, every op over the student axis."""
        spec, (embed, *ops) = self.spec, self.spec.program
        num_students = len(next(iter(stacked.values())))
        stream = self._embedded(embed, batch).expand(num_students, -1, -1)
        read = query = key = stream
        for op in ops:
            views = {weight.role: stacked[weight.name] for weight in op.weights if weight.name in stacked}
            if op.block:  # a matrix that was cut into blocks of rows is whole here
                continue
            if op.normed:
                stream = _norm(stream, views["norm"], views["norm_bias"], spec.norm_eps)
            if op.normed or op.kind == "q":
                read = stream
            if op.kind == "pool":
                break
            output = _linear(read, views["matrix"], views.get("bias"))
            match op.kind:
                case "q":
                    query = output
                case "k":
                    key = output
                case "v":
                    read = self._attended(query, key, output, batch)
                case "up":
                    read = activate(output, spec.activation, exact=False)
                case _:
                    stream = stream + output
        pooled = pool(stream.flatten(0, 1), _repeated(batch, num_students), encoder_of(spec).pooling)
        return pooled.unflatten(0, (num_students, -1))  # type: ignore[no-untyped-call, no-any-return]

    def _embedded(self, op: Op, batch: Packed) -> Tensor:
        """[T, M], once for all students."""
        flow, shared = EncoderFlow(), self.group.shared
        for lookup in self.spec.lookups:
            flow.rows[lookup.role] = F.embedding(batch.ids(lookup.role) + lookup.offset, shared[lookup.name])
        views = {weight.role: shared[weight.name] for weight in op.weights}
        run_op(op, self.spec, flow, views, batch, exact=False)
        return flow.take("stream")

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, batch: Packed) -> Tensor:
        """Every student's texts are texts of their own."""
        spec = self.spec
        q, k, v = (x.reshape(-1, spec.num_heads, spec.head_dim) for x in (query, key, value))
        attended = attend_whole(q, k, v, _repeated(batch, len(query)), scale=spec.head_dim**-0.5, exact=False)
        return attended.reshape(query.shape)


def _repeated(batch: Packed, num_students: int) -> list[int]:
    """Where texts begin when every student has its own copy of the rows."""
    lengths = [stop - start for start, stop in pairwise(batch.bounds)] * num_students
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return bounds


def _linear(x_mTI: Tensor, weight_mOI: Tensor, bias_mO: Tensor | None) -> Tensor:
    if bias_mO is None:
        return torch.bmm(x_mTI, weight_mOI.transpose(1, 2))
    return torch.baddbmm(bias_mO[:, None], x_mTI, weight_mOI.transpose(1, 2))


def _norm(x_mTM: Tensor, weight_mM: Tensor, bias_mM: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x_mTM, x_mTM.shape[-1:], eps=eps) * weight_mM[:, None] + bias_mM[:, None]
