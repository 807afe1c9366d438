"""The number format that a device computes in.  In: a ModelSpec and a device.  Out: the spec that runs there."""

from __future__ import annotations

from dataclasses import replace

import torch

from zinfer.errors import MachineError
from zinfer.log import logger
from zinfer.spec.records import ModelSpec

_BF16_SINCE = (8, 0)  # compute capability


def computable(spec: ModelSpec, device: str) -> ModelSpec:
    """The spec itself; on a GPU without bfloat16 arithmetic one that computes in float16, which is logged.

    Weights stay as published and each op converts its own.  float16 ends at 65504: what overflows is an error when
    tokens are drawn, never a wrong token.  Raises MachineError ZI-5361 for a quantised store, whose products are
    bfloat16.
    """
    if spec.dtype != "BF16" or not device.startswith("cuda") or capability(device) >= _BF16_SINCE:
        return spec
    major, minor = capability(device)
    lacks = f"{device} (compute capability {major}.{minor}) has no bfloat16 arithmetic"
    if spec.weights != "published":
        raise MachineError(
            "ZI-5361",
            f"{lacks}, in which {spec.weights} weights are multiplied",
            remedy="--device cpu, or give the published checkpoint, which such a device runs in float16",
        )
    logger.warning(
        "%s: computing in float16; activations beyond 65504 would overflow, and then --device cpu is right",
        lacks,
    )
    return replace(spec, dtype="F16", stored_dtype=spec.dtype)


def capability(device: str) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)
