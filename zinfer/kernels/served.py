"""Which devices zinfer's own kernels serve.  In: a device's type.  Out: yes or no, decided once and said once.

Kernels are written in Triton, which CUDA builds of torch bring along; the torch twin of each does the same work
where they do not serve.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zinfer.log import logger


def serves(device_type: str) -> bool:
    """Whether Triton kernels run on such a device.  Where Triton does not work on CUDA their torch twins do: logged."""
    return device_type == "cuda" and _has_triton()


@cache
def _has_triton() -> bool:
    """Imported and tried here for the first time: it may lack a compiler, or know nothing of the device."""
    try:
        from zinfer.kernels.jit.rows import gate_rows

        x = torch.full((1, 16), 2.0, device="cuda")
        y = torch.empty_like(x)
        gate_rows[(1, 1)](x, x, y, 16, 16, 16, BLOCK=16)
        is_right = bool(((y - 2 * F.silu(x)).abs() < 1e-3).all())
        reason = "a first kernel gives wrong numbers"
    except Exception as error:  # a broken compiler or driver raises what it likes
        is_right, reason = False, str(error)
    if not is_right:
        logger.warning("Triton does not work here (%s): slower torch code replaces its kernels", reason)
    return is_right


def launching(x: Tensor) -> AbstractContextManager[object]:
    """Kernels launched inside run on the device of `x`, whichever is the current one."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


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
