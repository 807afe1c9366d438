"""The two forms of a chunk's weights.  In: an op, views of what is there.  Out: its weights by role; packed copies.

A chunk lies as it is published in a slot, and perhaps packed without loss in its home (`zinfer.chunks.at_home`): an op
computes the same bits with either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from zinfer.kernels.exponents import lossless_weight
from zinfer.kernels.lossless import pack_into
from zinfer.spec.lossless import ROLES, packed_op
from zinfer.spec.records import Op, WeightRef

Views = Mapping[Any, Tensor]


def weights_of(op: Op, views: Views) -> dict[str, Tensor]:
    """An op's weights by role, in the form that is there."""
    return {part.role: views[part.key] for part in _reads(op, views)}


def pack_weights(ops: Iterable[Op], published: Views, packed: Views) -> None:
    """Fill the views of a chunk's packed form.  Raises TooManyExponentsError where a matrix cannot be packed."""
    for op in ops:
        by_role = {part.role: packed[part.key] for part in _reads(op, packed)}
        parts = {role: by_role.pop(role) for role in ROLES if role in by_role}
        of_op = weights_of(op, published)
        if parts:
            matrix_OI = of_op["matrix"]
            pack_into(lossless_weight(parts, matrix_OI.shape[0]), matrix_OI)
        for role, part in by_role.items():
            part.copy_(of_op[role])


def _reads(op: Op, views: Views) -> tuple[WeightRef, ...]:
    is_packed = op.matrix is not None and not op.stored and op.matrix.key not in views
    return packed_op(op).reads if is_packed else op.reads
