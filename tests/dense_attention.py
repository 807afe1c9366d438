"""Attention under a dense mask, in fp64, and the rows to try it with."""

import torch

from zinfer.layers.packed import Packed

WORDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def packed(counts, past, positions=None, ancestors=None):
    """A batch with `counts[s]` new rows after `past[s]` committed ones."""
    bounds = [0]
    for count in counts:
        bounds.append(bounds[-1] + count)
    if positions is None:
        positions = [p + i for count, p in zip(counts, past, strict=True) for i in range(count)]
    return Packed(
        tokens_T=torch.zeros(bounds[-1], dtype=torch.long),
        positions_T=torch.as_tensor(positions),
        bounds=tuple(bounds),
        past=tuple(past),
        logit_rows=torch.zeros(0, dtype=torch.long),
        ancestors=ancestors,
    )


def dense(q, k, v, mask, scale):
    """Attention of [N, H, D] over [M, K, D] with bool [N, M], in fp64."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)


def causal(rows, keys, window=None):
    """Rows are the last `rows` of `keys` tokens."""
    at, key = torch.arange(keys - rows, keys)[:, None], torch.arange(keys)
    return (key <= at) & (key > at - window) if window else key <= at


def qkv(tokens, heads=4, kv_heads=2, dim=16, dtype=torch.float32):
    draw = torch.Generator().manual_seed(tokens)
    q = torch.randn(tokens, heads, dim, generator=draw)
    k, v = torch.randn(2, tokens, kv_heads, dim, generator=draw)
    return q.to(dtype), k.to(dtype), v.to(dtype)
