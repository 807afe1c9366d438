"""One student.  In: a teacher's spec, weights, packed texts.  Out: its spec, its first weights, what it answers.

A student is the teacher's own composition with fewer layers, and on demand with fewer heads and MLP neurons in each
(`narrow`): token, position and segment tables and the norm over them are shared with the teacher and frozen; behind the
pooling stands a projection of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from zinfer.layers.mlp import activate
from zinfer.layers.packed import Packed
from zinfer.models.encoder import EncoderFlow, run_op
from zinfer.spec.program import matrix_shape
from zinfer.spec.records import Encoder, ModelSpec, Op

LAYER = re.compile(r"(?<=\blayer\.)\d+(?=\.)")  # every encoder family numbers its layers so
PROJECTION, OFFSET = "projection.weight", "projection.bias"


@dataclass(frozen=True, slots=True)
class Width:
    """What each layer of a student has: heads, how wide each is, MLP neurons."""

    heads: int
    head_dim: int
    mlp: int

    def fits(self, teacher: ModelSpec) -> bool:
        """Whether a layer of this teacher has so much to take."""
        most = width_of(teacher)
        return (
            0 < self.heads <= most.heads and 0 < self.head_dim <= most.head_dim and 0 < self.mlp <= most.mlp
        )


def width_of(spec: ModelSpec) -> Width:
    """That of a teacher, or of a student."""
    return Width(spec.num_heads, spec.head_dim, spec.mlp_dim)


def student_spec(teacher: ModelSpec, num_layers: int, width: Width | None = None) -> ModelSpec:
    """The teacher's first `num_layers` layers, without its head: what it pools is what a student imitates.

    Each layer has `width`; None: the teacher's.
    """
    encoder = encoder_of(teacher)
    pooling = ("cls",) if encoder.labels else encoder.pooling
    has = width or width_of(teacher)
    shapes = replace(
        teacher, num_heads=has.heads, num_kv_heads=has.heads, head_dim=has.head_dim, mlp_dim=has.mlp
    )
    ops = [_whole(op, shapes) for op in teacher.program if op.layer < num_layers and not op.block]
    ops = [replace(op, index=index) for index, op in enumerate(ops)]
    # The norm behind the last layer stands in front of the op that follows it.
    after = next(op for op in teacher.program if op.layer == num_layers)
    norms = tuple(weight for weight in after.weights if weight.role.startswith("norm"))
    pool = next(op for op in teacher.program if op.kind == "pool")
    ops.append(replace(pool, index=len(ops), layer=num_layers, weights=norms))
    return replace(
        shapes,
        num_layers=num_layers,
        dtype="F32",
        program=tuple(ops),
        encoder=replace(encoder, head="none", labels=(), pooling=pooling),
    )


def _whole(op: Op, spec: ModelSpec) -> Op:
    """The op with the matrix that `spec` says it has, not cut into blocks of rows: a student is never streamed."""
    if op.matrix is None or op.layer < 0:
        return op
    num_out, num_in = matrix_shape(spec, op.kind)
    shapes = {"matrix": (num_out, num_in), "bias": (num_out,)}
    weights = tuple(
        replace(weight, start=0, stop=num_out, shape=shapes[weight.role]) if weight.role in shapes else weight
        for weight in op.weights
    )
    return replace(op, weights=weights, blocks=1)


def encoder_of(spec: ModelSpec) -> Encoder:
    """The part of a spec that only encoders have."""
    assert spec.encoder is not None, "the teacher was checked to be an encoder"
    return spec.encoder


def layer_shapes(student: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes by published name of a student's own weights: those of its layers, in order of use."""
    refs = [weight for op in student.program for weight in op.weights if LAYER.search(weight.name)]
    return {weight.name: weight.shape for weight in refs}


def layer_names(student: ModelSpec) -> list[str]:
    """Their names."""
    return list(layer_shapes(student))


def shared_names(teacher: ModelSpec) -> list[str]:
    """Published names of what all students share: tables, the norm over them, a projection, the head."""
    names = [weight.name for op in teacher.program for weight in op.weights if not LAYER.search(weight.name)]
    return list(dict.fromkeys([lookup.name for lookup in teacher.lookups] + names))


def source_names(student: ModelSpec, layers: Sequence[int]) -> dict[str, str]:
    """A student's weight -> the teacher's that it begins as a copy of; `layers` counts the teacher's from 1."""
    return {
        name: LAYER.sub(str(layers[int(_layer(name))] - 1), name, count=1) for name in layer_names(student)
    }


def _layer(name: str) -> str:
    found = LAYER.search(name)
    assert found is not None, "only weights of layers are renamed"
    return found[0]


def pooled(
    student: ModelSpec,
    shared: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    batch: Packed,
    layers: list[Tensor] | None = None,
    entered_TM: Tensor | None = None,
) -> Tensor:
    """What the student's layers pool, fp32 [S, D]; `layers` receives each layer's rows.  Runs under autograd.

    `entered_TM` is what the embedding op gives, where that was computed once for several students.
    """
    flow = EncoderFlow(layers=layers, stream=entered_TM)
    if entered_TM is None:
        for lookup in student.lookups:
            flow.rows[lookup.role] = shared[lookup.name][batch.ids(lookup.role) + lookup.offset]
    for op in student.program if entered_TM is None else student.program[1:]:
        views = {
            weight.role: (weights if weight.name in weights else shared)[weight.name][
                weight.start : weight.stop
            ]
            for weight in op.weights
        }
        run_op(op, student, flow, views, batch, exact=False)
    return flow.take("pooled")


def answer(
    student: ModelSpec,
    shared: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    batch: Packed,
    layers: list[Tensor] | None = None,
    entered_TM: Tensor | None = None,
) -> Tensor:
    """f_k: the student's share of the group's representation, fp32 [S, D]; arguments are those of `pooled`."""
    rows_SD = pooled(student, shared, weights, batch, layers, entered_TM)
    return F.linear(rows_SD, weights[PROJECTION], weights[OFFSET])


def head_logits(teacher: ModelSpec, head: Mapping[str, Tensor], rows_SD: Tensor) -> Tensor:
    """The teacher's head on representations [S, D]: [S, C]."""
    encoder = encoder_of(teacher)
    for op in teacher.program:
        if op.kind in ("dense", "classify"):
            views = {weight.role: head[weight.name] for weight in op.weights}
            rows_SD = F.linear(rows_SD, views["matrix"], views.get("bias"))
            if op.kind == "dense":
                rows_SD = activate(rows_SD, encoder.head_activation, exact=False)
    return rows_SD


def head_names(teacher: ModelSpec) -> list[str]:
    """Published names of the head's weights; none for a teacher of embeddings."""
    heads = [op for op in teacher.program if op.kind in ("dense", "classify")]
    return [weight.name for op in heads for weight in op.weights]


def fitted_projection(rows_ND: Tensor, targets_ND: Tensor) -> dict[str, Tensor]:
    """The projection (matrix and bias) that a student begins with: ridge regression of what it is to fit.

    The group's representation after the first round is a small difference of large ones; a student that begins
    with an identity would first have to unlearn its own mean.
    """
    rows, targets = rows_ND.double(), targets_ND.double()
    mean, aim = rows.mean(0), targets.mean(0)
    centred = rows - mean
    gram = centred.T @ centred
    ridge = 1e-2 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    matrix = torch.linalg.solve(gram + ridge, centred.T @ (targets - aim)).T
    return {PROJECTION: matrix.float().contiguous(), OFFSET: (aim - matrix @ mean).float()}
