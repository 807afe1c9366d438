"""Which members of a group are whole.  In: its tensors, digests written with them.  Out: how many may still answer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

COMMON = "common"


def part_of(name: str) -> str:
    """The member that a tensor of the group's file belongs to: a student's number, or what all share."""
    kind, _, rest = name.partition("/")
    return rest.partition("/")[0] if kind == "students" else COMMON


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 per member, over names, shapes and bytes."""
    found: dict[str, Any] = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest = found.setdefault(part_of(name), hashlib.sha256())
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return {part: digest.hexdigest() for part, digest in found.items()}


def num_whole(tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> int:
    """How many of the first students are as they were written; 0 where what all share is not, or nothing tells."""
    written, found = manifest.get("members"), digests(tensors)
    if not isinstance(written, dict) or written.get(COMMON) != found.get(COMMON):
        return 0
    count = 0
    while str(count) in written and written[str(count)] == found.get(str(count)):
        count += 1
    return count
