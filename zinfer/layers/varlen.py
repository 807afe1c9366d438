"""torch's own attention of packed sequences on a device.  In: rows back to back.  Out: [T, H, D], no padding anywhere.

`torch.nn.attention.varlen` came with torch 2.10 and its arguments still change, so what is served is what a
self-test shows to be right; everything else goes to the slower drivers of `zinfer.layers.attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from zinfer.memory.upload import upload

_CLOSE = 0.03  # of values of about 1, rounded to half precision
_TRIALS = (((7, 7), (33, 33)), ((5, 40),), ((1, 3), (9, 9)))  # (new rows, keys) of the sequences of one call
_WINDOW = 6
_KERNELLESS = ("cpu",)


@dataclass(frozen=True, slots=True)
class Pack:
    """Where sequences begin and end, for the kernel; sequence s has as many rows as `rows[s]` and `keys[s]` keys.

    The last row of a sequence is its last key's: rows are the newest of the tokens.
    """

    row_ends: Tensor
    key_ends: Tensor
    most_rows: int
    most_keys: int

    @classmethod
    def of(cls, rows: Sequence[int], keys: Sequence[int], device: torch.device | str) -> Pack:
        """int32 [S + 1] each, as the kernel wants them."""
        ends = [torch.tensor([0, *accumulate(counts)], dtype=torch.int32) for counts in (rows, keys)]
        row_ends, key_ends = (upload(counted, torch.device(device)) for counted in ends)
        return cls(row_ends, key_ends, max(rows), max(keys))


def varlen(
    q_THD: Tensor, k_nKD: Tensor, v_nKD: Tensor, pack: Pack, *, scale: float, window: int | None
) -> Tensor:
    """Causal attention of every sequence's rows over its keys; raises what torch raises where it cannot."""
    from torch.nn.attention.varlen import varlen_attn

    known = signature(varlen_attn).parameters
    options: dict[str, Any] = {}
    if "window_size" in known:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    else:
        assert window is None, "the self-test has refused windows"
        options["is_causal"] = True
    if "enable_gqa" in known:
        options["enable_gqa"] = q_THD.shape[1] != k_nKD.shape[1]
    if "scale" in known:
        options["scale"] = scale
    else:
        q_THD = q_THD * (scale * q_THD.shape[2] ** 0.5)
    run: Callable[..., Any] = varlen_attn
    found: Tensor = run(
        q_THD, k_nKD, v_nKD, pack.row_ends, pack.key_ends, pack.most_rows, pack.most_keys, **options
    )
    return found


@cache
def varlen_serves(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, device: str, is_windowed: bool
) -> bool:
    """Whether `varlen` is right for such heads on such a device: tried on small cases, once per process.

    Never on a CPU, where torch has no kernel for it.
    """
    if device in _KERNELLESS or dtype == torch.float32:
        return False
    draw = torch.Generator().manual_seed(0)
    window = _WINDOW if is_windowed else None
    for trial in _TRIALS:
        rows, keys = zip(*trial, strict=True)
        q = torch.randn(sum(rows), heads, head_dim, generator=draw).to(device, dtype)
        k, v = torch.randn(2, sum(keys), kv_heads, head_dim, generator=draw).to(device, dtype)
        try:
            found = varlen(q, k, v, Pack.of(rows, keys, device), scale=0.2, window=window)
        except (AssertionError, ImportError, RuntimeError, TypeError, ValueError):
            return False
        want = varlen_twin(q, k, v, rows, keys, scale=0.2, window=window)
        if not bool(((found.float() - want).abs() <= _CLOSE).all()):
            return False
    return True


def varlen_twin(
    q_THD: Tensor,
    k_nKD: Tensor,
    v_nKD: Tensor,
    rows: Sequence[int],
    keys: Sequence[int],
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """The slow twin: sequence by sequence under a dense mask, fp32."""
    group = q_THD.shape[1] // k_nKD.shape[1]
    parts = []
    cuts = ((q_THD, rows), (k_nKD, keys), (v_nKD, keys))
    for q, k, v in zip(*(torch.split(x, list(counts)) for x, counts in cuts), strict=True):
        q_HRD, k_KnD, v_KnD = (x.float().transpose(0, 1) for x in (q, k, v))
        k_HnD, v_HnD = k_KnD.repeat_interleave(group, 0), v_KnD.repeat_interleave(group, 0)
        at_R1 = torch.arange(len(k) - len(q), len(k), device=q.device)[:, None]
        key_n = torch.arange(len(k), device=q.device)
        is_hidden = (key_n > at_R1) | (key_n <= at_R1 - (window or len(k)))
        scores = (q_HRD @ k_HnD.transpose(1, 2) * scale).masked_fill(is_hidden, -torch.inf)
        parts.append((scores.softmax(-1) @ v_HnD).transpose(0, 1))
    return torch.cat(parts)
