"""A student narrower than its teacher.  In: whole layers of the teacher.  Out: the heads and neurons one student takes.

A layer's product of heads and its MLP are sums over heads and over neurons (Michel et al. 2019, arXiv 1905.10650), so a
few of each are a layer of the same kind, and the students of a group can share a teacher's width out among themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from zinfer.spec.records import ModelSpec
from zinfer.students.student import Width

BY_HEAD, BY_NEURON = ("q", "k", "v"), ("up",)  # whose rows are those of heads, of neurons
AFTER_HEADS, AFTER_NEURONS = "o", "down"  # whose columns are


def width_for(teacher: ModelSpec, share: float, mlp_share: float | None = None) -> Width:
    """A student's width where it has `share` of the teacher's: whole heads, or less than one, and at least one row.

    `mlp_share` of the neurons; None: `share`.
    """
    heads, size = share * teacher.num_heads, teacher.head_dim
    mlp = max(round((share if mlp_share is None else mlp_share) * teacher.mlp_dim), 1)
    if heads < 1:
        return Width(1, max(round(heads * size), 1), mlp)
    return Width(round(heads), size, mlp)


def cut(student: ModelSpec, teacher: ModelSpec, whole: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """What student k (from 0) begins with: its part of `whole`, the layers it copies under its own names.

    Heads and neurons are ranked by how much they can write into the stream; the first student takes the first of
    them, the next one those that follow, and where none are left it goes on with the first.  Of a head that is cut
    its first rows are taken, and queries grow so that its logits are of the size they had.
    """
    found = {name: tensor.clone() for name, tensor in whole.items()}
    part, size = student.head_dim, teacher.head_dim
    for layer in range(student.num_layers):
        refs = {op.kind: op.weights for op in student.program if op.layer == layer}
        own = {kind: [w.name for w in refs[kind] if w.role in ("matrix", "bias")] for kind in refs}
        matrix = {kind: whole[names[0]] for kind, names in own.items() if names}
        heads = _share(_ranked(matrix["v"], matrix[AFTER_HEADS], size), student.num_heads, k)
        taken = (heads[:, None] * size + torch.arange(part)).flatten()
        neurons = _share(_ranked(matrix["up"], matrix[AFTER_NEURONS], 1), student.mlp_dim, k)
        for kinds, rows, after in ((BY_HEAD, taken, AFTER_HEADS), (BY_NEURON, neurons, AFTER_NEURONS)):
            for name in (name for kind in kinds for name in own[kind]):
                found[name] = whole[name][rows]
            found[own[after][0]] = whole[own[after][0]][:, rows].contiguous()
        if part < size:
            for name in own["q"]:
                found[name] *= math.sqrt(size / part)
    return found


def _ranked(into: Tensor, out_of: Tensor, size: int) -> Tensor:
    """Numbers of groups of `size` rows of `into` (and columns of `out_of`), those with the largest weights first."""
    read = into.pow(2).sum(1).view(-1, size).sum(1)
    written = out_of.pow(2).sum(0).view(-1, size).sum(1)
    return torch.argsort(read * written, descending=True, stable=True)


def _share(ranked: Tensor, count: int, k: int) -> Tensor:
    """The k-th `count` of them in the teacher's order: all of them are the teacher's own."""
    places = torch.arange(k * count, (k + 1) * count) % len(ranked)
    return ranked[places].sort().values
