"""Small host tensors to where they are used.  In: numbers that the host knows.  Out: the same, on the device.

The one way for a pass to send indices up.  `torch.tensor(..., device="cuda")` and `.to("cuda")` copy from pageable
memory and wait for all work of the stream; from page-locked memory the copy is one more entry of the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`, itself if it is there.  Never waits for the device.

    The page-locked copy in between is a block of torch's host allocator, which keeps it until the stream has read it.
    """
    if x.device == device:
        return x
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def indices(values: Sequence[Any], device: torch.device) -> Tensor:
    """int64, of the shape of the nested `values`."""
    return upload(torch.tensor(values, dtype=torch.long), device)
