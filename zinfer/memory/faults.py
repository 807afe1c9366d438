"""What a device's errors mean.  In: an exception of torch's.  Out: one typed error, or nothing where it is not ours.

CUDA reports a kernel's or a copy's fault at whatever call comes next, on any thread, and goes on reporting it: after
such an error the context is gone, and only a new process gets another.  Running out of memory is not of that kind.
"""

from __future__ import annotations

import torch

from zinfer.errors import BudgetError, MachineError, ZinferError

LOST, FULL, TOO_FULL = "ZI-5332", "ZI-2403", "ZI-2404"
_LOST_WORDS = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "device-side assert")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller demand might be met.  A library that finds no room for its workspace says so in words."""
    if isinstance(error, ZinferError):
        return error.code == FULL
    words = str(error)
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in words or "ALLOC_FAILED" in words)
    )


def is_lost(error: BaseException) -> bool:
    """Whether the device is of no more use to this process."""
    if isinstance(error, ZinferError):
        return error.code == LOST
    return (
        isinstance(error, RuntimeError)
        and not is_out_of_memory(error)
        and any(word in str(error) for word in _LOST_WORDS)
    )


def explained(error: BaseException, doing: str) -> ZinferError | None:
    """The typed error for what went wrong while `doing`; None for what is no fault of a device."""
    if isinstance(error, ZinferError):
        return None
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if is_out_of_memory(error):
        return BudgetError(
            FULL,
            f"the device ran out of memory {doing}: {reason}",
            remedy="nvidia-smi   # who else uses it?  Then --device-mem with less than is free",
        )
    if is_lost(error):
        return MachineError(
            LOST,
            f"the device was lost {doing}: {reason}",
            remedy="nvidia-smi -q -d ECC,PAGE_RETIREMENT   # is it healthy?  Then start the command again",
        )
    return None
