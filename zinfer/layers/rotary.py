"""Rotary positions (Su et al. 2021, arXiv 2104.09864).  In: positions, rows [T, H, D].  Out: rotated rows.

Frequencies and the scale of attention are computed in fp32 exactly as each kind was published; the tables are
rounded to the activations' dtype before they are applied, as the published models do.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from zinfer.kernels.row_kernels import row_kernels
from zinfer.layers.packed import Packed
from zinfer.memory.upload import upload
from zinfer.spec.records import Rope


def rotary_tables(
    rope: Rope, batch: Packed, dtype: torch.dtype, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the pass's rows, each [T, rotary_dim / 2] in `dtype`, on `device` (None: the host).

    The kinds that switch on length take each sequence's own known length, never that of a batch mate.
    """
    positions_T = batch.on("positions_T", device or batch.positions_T.device).float()
    lengths = [length_class(rope, length) for length in sequence_lengths(batch)]
    if len(set(lengths)) == 1:
        angles = positions_T[:, None] * inverse_frequencies(rope, lengths[0], positions_T.device)
    else:
        cuts = zip(torch.split(positions_T, row_counts(batch)), lengths, strict=True)
        angles = torch.cat(
            [part[:, None] * inverse_frequencies(rope, length, part.device) for part, length in cuts]
        )
    scale = _scale(rope)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def rotate(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first rotary_dim dimensions of every head, as pairs (i, i + rotary_dim / 2); the rest passes."""
    if fused := row_kernels(x_THD, cos, sin):
        return fused.rotate(x_THD, cos, sin)
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    left, right, rest = x_THD[..., :half], x_THD[..., half : 2 * half], x_THD[..., 2 * half :]
    return torch.cat((left * cos - right * sin, right * cos + left * sin, rest), dim=-1)


def sequence_lengths(batch: Packed) -> tuple[int, ...]:
    """Known length of each sequence."""
    if batch.lengths is not None:
        return batch.lengths
    return tuple(past + count for past, count in zip(batch.past, row_counts(batch), strict=True))


def row_counts(batch: Packed) -> list[int]:
    """New rows of each sequence."""
    return [stop - start for start, stop in pairwise(batch.bounds)]


def inverse_frequencies(rope: Rope, length: int, device: torch.device) -> Tensor:
    """fp32 [rotary_dim / 2] for a sequence of `length` tokens."""
    parameters = tuple(rope.parameters.items())
    return _frequencies(
        rope.kind, rope.theta, rope.rotary_dim, parameters, length_class(rope, length), device
    )


def length_class(rope: Rope, length: int) -> int:
    """Lengths of one class share their frequencies: sequences of one class rotate the same token by the same angles."""
    if rope.kind == "dynamic":
        return max(length, _whole(rope.parameters["max_context"]))
    if rope.kind == "longrope":
        original = _whole(rope.parameters["original_context"])
        return original + (length > original)
    return 0


@lru_cache(maxsize=64)
def _frequencies(
    kind: str,
    theta: float,
    dim: int,
    parameters: tuple[tuple[str, Any], ...],
    length: int,
    device: torch.device,
) -> Tensor:
    """Always computed on the host, so that every device rotates by the same angles."""
    given = dict(parameters)
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    base: float | Tensor = theta
    if kind == "dynamic":
        base = _dynamic_base(theta, dim, given["factor"], given["max_context"], length)
    wavelengths = base**exponents
    if kind == "longrope":
        extra = given["long_factor" if length > given["original_context"] else "short_factor"]
        return upload(1.0 / (torch.tensor(extra, dtype=torch.float32) * wavelengths), device)
    frequencies = 1.0 / wavelengths
    if kind == "linear":
        frequencies = frequencies / given["factor"]
    elif kind == "yarn":
        frequencies = _yarn(wavelengths, theta, dim, given)
    elif kind == "llama3":
        frequencies = _llama3(frequencies, given)
    return upload(frequencies, device)


def _dynamic_base(theta: float, dim: int, factor: float, max_context: int, length: int) -> Tensor:
    """NTK-aware base that grows with the sequence (as published by /u/bloc97 and /u/emozilla, 2023)."""
    stretch = factor * torch.tensor(length) / max_context - (factor - 1)
    return theta * stretch ** (dim / (dim - 2))


def _yarn(wavelengths: Tensor, theta: float, dim: int, given: dict[str, Any]) -> Tensor:
    """NTK-by-parts interpolation (Peng et al. 2023, arXiv 2309.00071, section 3.2)."""

    def dimension(num_rotations: float) -> float:
        turns = given["original_context"] / (num_rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    low, high = dimension(given["beta_fast"]), dimension(given["beta_slow"])
    if given["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / width, 0, 1)
    kept = 1 - ramp
    factor: float = given["factor"]
    return (1.0 / (factor * wavelengths)) * (1 - kept) + (1.0 / wavelengths) * kept


def _llama3(frequencies: Tensor, given: dict[str, Any]) -> Tensor:
    """Llama 3.1's published scaling: long waves divided by the factor, short ones kept, a ramp between."""
    factor, low, high = given["factor"], given["low_freq_factor"], given["high_freq_factor"]
    original = given["original_context"]
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    ramp = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    is_between = (wavelengths >= original / high) & (wavelengths <= original / low)
    return torch.where(is_between, ramp, scaled)


def _scale(rope: Rope) -> float:
    """What cosines and sines are multiplied by (YaRN and LongRoPE raise the softmax's temperature so)."""
    factor = rope.parameters.get("attention_factor", 1.0)
    assert isinstance(factor, int | float), "attention_factor is a number"
    return factor


def _whole(value: object) -> int:
    assert isinstance(value, int), "a rope length is a whole number"
    return value
