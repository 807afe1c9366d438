"""Keep threads and slabs near a device.  In: a PCI address.  Out: cores and a memory policy, if it shows any.

A copy from the wrong socket reaches a third of the link's rate.  Where there is one node, or the kernel says nothing,
nothing happens and nothing is said.  Linux's own interfaces: sysfs, sched_setaffinity(2), mbind(2).
"""

from __future__ import annotations

import ctypes
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zinfer.log import logger

_SYS = Path("/sys")
_MBIND = {"x86_64": 237, "aarch64": 235}  # system call numbers
_MPOL_PREFERRED = 1  # another node serves when this one is full


@dataclass(frozen=True, slots=True)
class Near:
    """The NUMA node of a device and its cores; nothing where all memory is alike."""

    node: int | None = None
    cores: frozenset[int] = frozenset()

    def bind_thread(self) -> None:
        """Keep the calling thread on the node's cores, those that the process may use; no matter if refused."""
        allowed = self.cores & os.sched_getaffinity(0)
        if allowed:
            with suppress(OSError):
                os.sched_setaffinity(0, allowed)

    def bind_memory(self, address: int, nbytes: int) -> bool:
        """Pages of the range (page-aligned) that are first touched from now on come from the node, while it has any.

        Whoever touches them: a direct read's pages are found by the kernel in the reader's name.
        """
        number = _MBIND.get(platform.machine())
        if self.node is None or number is None or not nbytes:
            return False
        mask = ctypes.c_ulong(1 << self.node)
        call = ctypes.CDLL(None, use_errno=True).syscall
        answer = call(
            ctypes.c_long(number),
            ctypes.c_void_p(address),
            ctypes.c_ulong(nbytes),
            ctypes.c_int(_MPOL_PREFERRED),
            ctypes.byref(mask),
            ctypes.c_ulong(8 * ctypes.sizeof(mask)),
            ctypes.c_uint(0),
        )
        return bool(answer == 0)


def near_device(device: torch.device) -> Near:
    """Where a CUDA device's root port is."""
    with suppress(Exception):  # what torch cannot tell, nobody needs
        found: Any = torch.cuda.get_device_properties(device)
        address = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
        near = near_address(address)
        if near.node is not None:
            logger.debug("%s lies near NUMA node %d: cores %s", device, near.node, sorted(near.cores))
        return near
    return Near()


def near_address(address: str, sys: Path = _SYS) -> Near:
    """What sysfs says of a PCI address ("0000:17:00.0"); nothing where it says nothing or there is one node."""
    try:
        nodes = [path for path in (sys / "devices/system/node").iterdir() if path.name[4:].isdigit()]
        node = int((sys / "bus/pci/devices" / address.lower() / "numa_node").read_text())
        if len(nodes) < 2 or node < 0 or node >= 8 * ctypes.sizeof(ctypes.c_ulong) - 1:
            return Near()
        return Near(node, frozenset(_numbers((sys / f"devices/system/node/node{node}/cpulist").read_text())))
    except (OSError, ValueError):
        return Near()


def _numbers(text: str) -> set[int]:
    """The kernel's list format: "0-3,8,10-11"."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found
