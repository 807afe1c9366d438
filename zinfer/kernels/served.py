"""Which devices zinfer's own kernels serve.  In: a device's type.  Out: yes or no, decided once and said once.

Kernels are written in Triton, which CUDA builds of torch bring along; the torch twin of each does the same work
where they do not serve.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from zinfer.log import logger


def serves(device_type: str) -> bool:
    """Whether Triton kernels run on such a device.  Without Triton on CUDA their torch twins do, which is logged."""
    return device_type == "cuda" and _has_triton()


@cache
def _has_triton() -> bool:
    """Imported here for the first time, and nowhere where there is no CUDA device."""
    try:
        import triton.language  # noqa: F401
    except Exception as error:  # a broken compiler or driver raises what it likes
        logger.warning("Triton cannot be imported (%s): slower torch code replaces its kernels", error)
        return False
    return True


@cache
def operand(dtype: torch.dtype) -> Any:
    """Triton's word for `dtype` as an operand of a product; fp32 where its interpreter would multiply bf16's bits."""
    import triton
    import triton.language as tl

    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]


@cache
def device_name(device_type: str) -> str:
    """What a remembered choice belongs to."""
    return torch.cuda.get_device_name() if device_type == "cuda" else device_type


@cache
def num_cores(device: torch.device) -> int:
    """Multiprocessors of a device; the interpreter is one."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def power(number: int) -> int:
    """The next power of two: what a tile's edge must be."""
    return 1 << (number - 1).bit_length()
