"""A pass over stacked students.  In: weights [m, ...], packed or filled-up rows.  Out: what each of them answers.

Shape legend: m students in use, T token rows, S texts, M model dim, H heads, D representation.  Student parallelism
(arXiv 2408.12526): a layer of all students is one batched product, so depth falls to a student's own, and using fewer
students is a slice of every tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from zinfer.layers.bidirectional import attend_whole
from zinfer.layers.mlp import activate
from zinfer.layers.packed import Packed
from zinfer.layers.pooling import pool
from zinfer.models.encoder import EncoderFlow, run_op
from zinfer.spec.records import ModelSpec, Op
from zinfer.students.student import OFFSET, PROJECTION, encoder_of

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [m, T, H * D] -> [m, T, H * D]
Pool = Callable[[Tensor], Tensor]  # [m, T, M] -> [m, S, M per mode]


def fused(
    spec: ModelSpec, shared: Mapping[str, Tensor], stacked: Mapping[str, Tensor], batch: Packed
) -> Tensor:
    """f_1 .. f_m of packed texts, fp32 [m, S, D]: every op over the student axis; `stacked` holds m of each weight.

    Every student's copy of a text is a text of its own.
    """
    bounds = _repeated(batch, len(stacked[PROJECTION]))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.reshape(-1, spec.num_heads, spec.head_dim) for x in (query, key, value))
        attended = attend_whole(q, k, v, bounds, scale=spec.head_dim**-0.5, exact=False, memo=batch.memo)
        return attended.reshape(query.shape)

    def pooled(x_mTM: Tensor) -> Tensor:
        rows = pool(x_mTM.flatten(0, 1), bounds, encoder_of(spec).pooling)
        return rows.unflatten(0, (len(x_mTM), -1))  # type: ignore[no-untyped-call, no-any-return]

    return _answers(spec, shared, stacked, batch, attend, pooled)


def filled(
    spec: ModelSpec,
    shared: Mapping[str, Tensor],
    stacked: Mapping[str, Tensor],
    batch: Packed,
    text_T: Tensor,
    starts_S: Tensor,
) -> Tensor:
    """The same for rows filled up to a fixed number, whatever texts they are: fp32 [m, S, D].

    `text_T` is each row's text, S for rows that fill up; of a text that fills up the answer means nothing.  No shape
    depends on the texts, and nothing is asked of the device: this is what a CUDA graph records.
    """
    same_TT = text_T[:, None] == text_T

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = (spec.num_heads, spec.head_dim)
        q, k, v = (x.unflatten(-1, heads).transpose(1, 2) for x in (query, key, value))  # type: ignore[no-untyped-call]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=same_TT, scale=spec.head_dim**-0.5)
        return attended.transpose(1, 2).flatten(2)

    def pooled(x_mTM: Tensor) -> Tensor:
        modes = encoder_of(spec).pooling
        return torch.cat([_pooled(mode, x_mTM, text_T, starts_S) for mode in modes], dim=-1)

    return _answers(spec, shared, stacked, batch, attend, pooled)


def _pooled(mode: str, x_mTM: Tensor, text_T: Tensor, starts_S: Tensor) -> Tensor:
    """As layers.pooling, over a fixed number of texts."""
    if mode == "cls":
        return x_mTM[:, starts_S]
    if mode == "max":
        least = x_mTM.new_zeros(len(x_mTM), len(starts_S) + 1, x_mTM.shape[-1])
        return least.scatter_reduce(1, text_T[:, None].expand_as(x_mTM), x_mTM, "amax", include_self=False)[
            :, :-1
        ]
    member_ST = (text_T == torch.arange(len(starts_S), device=text_T.device)[:, None]).to(x_mTM.dtype)
    lengths_S1 = member_ST.sum(1, keepdim=True).clamp(min=1)
    return member_ST @ x_mTM / (lengths_S1 if mode == "mean" else lengths_S1.sqrt())


def _answers(
    spec: ModelSpec,
    shared: Mapping[str, Tensor],
    stacked: Mapping[str, Tensor],
    batch: Packed,
    attend: Attend,
    pool_rows: Pool,
) -> Tensor:
    """The student's program, every op over the student axis, then the projections."""
    embed, *ops = spec.program
    stream = embedded(spec, shared, embed, batch).expand(len(stacked[PROJECTION]), -1, -1)
    read = query = key = stream
    for op in ops:
        views = {weight.role: stacked[weight.name] for weight in op.weights if weight.name in stacked}
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
                read = attend(query, key, output)
            case "up":
                read = activate(output, spec.activation, exact=False)
            case _:
                stream = stream + output
    return _linear(pool_rows(stream), stacked[PROJECTION], stacked[OFFSET])


def embedded(spec: ModelSpec, shared: Mapping[str, Tensor], op: Op, batch: Packed) -> Tensor:
    """[T, M], once for all students."""
    flow = EncoderFlow()
    for lookup in spec.lookups:
        flow.rows[lookup.role] = F.embedding(batch.ids(lookup.role) + lookup.offset, shared[lookup.name])
    views = {weight.role: shared[weight.name] for weight in op.weights}
    run_op(op, spec, flow, views, batch, exact=False)
    return flow.take("stream")


def _repeated(batch: Packed, num_students: int) -> Sequence[int]:
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
