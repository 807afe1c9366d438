"""Which CUDA devices this process can use, or why none.  In: torch, a driver.  Out: a count, or one typed error.

Asks and changes nothing: no clock, no mode, no limit of a device is touched.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import dataclass

import torch

from zinfer.errors import MachineError, ZinferError


@dataclass(frozen=True, slots=True)
class Devices:
    """How many there are; where none, `error` says what is missing."""

    count: int
    error: ZinferError | None = None

    @property
    def is_disappointing(self) -> bool:
        """Whether somebody who left the choice to us would want to know why no device is used."""
        return self.error is not None and self.error.code != "ZI-5333"


def visible_devices() -> Devices:
    """ZI-5333: torch has no CUDA, or the system no driver; ZI-5334: the driver is too old; ZI-5335: anything else."""
    if torch.version.cuda is None:
        return Devices(0, _missing(f"torch {torch.__version__} was built without CUDA"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is said below, once
        if torch.cuda.is_available():
            return Devices(torch.cuda.device_count())
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        except Exception as error:
            return Devices(0, _why(str(error).strip().splitlines() or [type(error).__name__]))
    return Devices(0, _missing("the driver shows no device (is CUDA_VISIBLE_DEVICES set?)"))


def free_bytes(index: int) -> int:
    """Of a device's memory, what nobody holds at this moment; the context that asking makes is no longer free."""
    free, _ = torch.cuda.mem_get_info(index)
    return free


def give_back_cached(device: str) -> None:
    """What torch keeps of a CUDA device for later goes back to it: others may want it now."""
    if device.startswith("cuda"):
        with suppress(RuntimeError):  # of a device that is lost
            torch.cuda.empty_cache()


def _why(lines: list[str]) -> ZinferError:
    reason = lines[0]
    if "too old" in reason:
        return MachineError(
            "ZI-5334",
            f"the NVIDIA driver is too old for torch {torch.__version__} (CUDA {torch.version.cuda}): {reason}",
            remedy="update the driver, or install a torch for the CUDA version that nvidia-smi shows; "
            "until then: --device cpu",
        )
    if "no NVIDIA driver" in reason or "No CUDA GPUs" in reason or "not compiled" in reason:
        return _missing(reason)
    return MachineError(
        "ZI-5335",
        f"CUDA cannot be used: {reason}",
        remedy="nvidia-smi   # busy, in exclusive mode, or broken?  Until then: --device cpu",
    )


def _missing(reason: str) -> ZinferError:
    return MachineError(
        "ZI-5333", f"a CUDA device was asked for, there is none: {reason}", remedy="--device cpu"
    )
