"""Turn what was asked into numbers, once.  In: Settings, a Machine, memory limits.  Out: bytes, and why each."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from zinfer.config.limits import MemoryLimits
from zinfer.config.machine import Machine
from zinfer.config.schema import Settings
from zinfer.errors import MachineError, UsageError
from zinfer.units import Bytes, rate_text

_AUTO_HOST_SHARE = 0.8  # the rest is for the interpreter, the page tables and the neighbours
_AUTO_DEVICE_SHARE = 0.9  # the rest is for the driver's context and library workspaces
_GAIN = 1.05  # several links are worth their devices' memory when they carry so many times what one does


@dataclass(frozen=True, slots=True)
class Resolved:
    """Settings whose machine-dependent part is settled; what depends on the model is left to the plan.

    `device` is "cpu", "sim" or "cuda:N", `devices` how many bring weights to it, itself included; `reasons` says for
    each key that was not taken literally why it is what it is; the limits are the most that a larger setting would be
    granted.
    """

    settings: Settings
    device: str
    host_bytes: int
    device_bytes: int  # 0 on cpu: host memory is compute memory
    host_limit_bytes: int
    device_limit_bytes: int
    threads: int
    reasons: dict[str, str] = field(default_factory=dict)
    devices: int = 1
    lanes: int = 1  # cores that take texts of an encoder's pass in turn


def resolve(
    settings: Settings,
    machine: Machine,
    *,
    limits: MemoryLimits | None,
    num_gpus: int = 0,
    free_device_bytes: int | None = None,
) -> Resolved:
    """Settle device, budgets and threads.

    `limits` are those of the machine we run on; None plans for another machine, and only its declared capacities
    count.  Shares are of the clamped memory; what was asked beyond it is cut, and the reason says so.
    Raises MachineError ZI-5001 for a GPU that is not there, UsageError ZI-1009 for a simulation of no device,
    ZI-1196 to ZI-1198 for several devices that cannot serve one.
    """
    reasons: dict[str, str] = {}
    device = _device(settings, machine, limits is None, num_gpus, reasons)
    host_total, host_free, owner = machine.host_bytes, machine.host_bytes, machine.name
    if limits is not None:
        host_total, host_free = min(host_total, limits.total), min(host_total, limits.available)
        owner = limits.binding
    if device != "cpu" and machine.pinnable_bytes is not None and machine.pinnable_bytes < host_free:
        host_free, owner = machine.pinnable_bytes, "what can be pinned"
    host = _budget(
        "memory.host", settings.memory.host, host_total, host_free, _AUTO_HOST_SHARE, owner, reasons
    )
    device_bytes = free = 0
    if device != "cpu":
        free = machine.device_bytes if free_device_bytes is None else free_device_bytes
        device_bytes = _budget(
            "memory.device",
            settings.memory.device,
            machine.device_bytes,
            free,
            _AUTO_DEVICE_SHARE,
            machine.name,
            reasons,
        )
    elif settings.memory.device != "auto":
        reasons["memory.device"] = "not used: on cpu the compute memory is the host's"
    threads = settings.runtime.threads
    if threads == "auto":
        threads = len(os.sched_getaffinity(0))
        reasons["runtime.threads"] = f"auto: the {threads} cores this process may use"
    lanes = settings.runtime.lanes
    lanes = threads if lanes == "auto" else lanes
    devices = _devices(settings, machine, device, None if limits is None else num_gpus, reasons)
    return Resolved(settings, device, host, device_bytes, host_free, free, threads, reasons, devices, lanes)


def _device(
    settings: Settings, machine: Machine, is_elsewhere: bool, num_gpus: int, reasons: dict[str, str]
) -> str:
    wanted = "cuda:0" if settings.device == "cuda" else settings.device
    has_device = machine.device is not None and machine.h2d is not None
    if wanted == "auto":
        if has_device and (is_elsewhere or num_gpus):
            wanted = "cuda:0"
        else:
            wanted = "sim" if has_device and settings.machine else "cpu"
        reasons["device"] = f"auto: {machine.name} has {'a' if has_device else 'no'} device"
    elif wanted.startswith("cuda") and not is_elsewhere and int(wanted[5:]) >= num_gpus:
        raise MachineError(
            "ZI-5001", f"{wanted} was asked for, {num_gpus} CUDA devices are visible", remedy="--device cpu"
        )
    if wanted != "cpu" and not has_device:
        raise UsageError(
            "ZI-1009",
            f"device {wanted!r} needs a machine with a device, {machine.name!r} declares none",
            remedy="--device sim --machine sim-default" if wanted == "sim" else "--device cpu",
        )
    return wanted


def _budget(
    key: str, asked: int | str, total: int, free: int, auto_share: float, owner: str, reasons: dict[str, str]
) -> int:
    """Bytes granted of `asked`; `free` bounds it, `total` is what shares are of."""
    if asked == "auto":
        reasons[key] = f"auto: {auto_share:.0%} of the {Bytes(free)} available ({owner})"
        return int(free * auto_share)
    if isinstance(asked, str):
        wanted = int(total * float(asked.rstrip("%")) / 100)
        reasons[key] = f"{asked} of {Bytes(total)} ({owner})"
    else:
        wanted = asked
    if wanted > free:
        reasons[key] = f"cut from {Bytes(wanted)} to the {Bytes(free)} available ({owner})"
    return min(wanted, free)


def _devices(
    settings: Settings, machine: Machine, device: str, num_gpus: int | None, reasons: dict[str, str]
) -> int:
    """How many devices' links bring weights to the first one; `num_gpus` None: planned for another machine."""
    wanted, there = settings.runtime.devices, max(len(machine.links), 1)
    if device.startswith("cuda") and num_gpus is not None:
        there = min(there, num_gpus)
    if wanted == 1 or (wanted == "auto" and (device not in ("sim", "cuda:0") or there == 1)):
        return 1
    if device not in ("sim", "cuda:0"):
        raise UsageError(
            "ZI-1196" if device == "cpu" else "ZI-1198",
            f"runtime.devices = {wanted} was asked for on {device}: shares are gathered on the first device",
            remedy="--set runtime.devices=1",
        )
    if wanted != "auto" and wanted > there:
        raise UsageError(
            "ZI-1197",
            f"runtime.devices = {wanted} was asked for, of {machine.name!r} {there} "
            f"{'link is' if there == 1 else 'links are'} known",
            remedy=f"--set runtime.devices={there}"
            + ("" if device == "sim" else ", or measure the links: zinfer doctor"),
        )
    used = machine.using(there if wanted == "auto" else wanted)
    gain = used.up_bytes_per_s / machine.using(1).up_bytes_per_s
    found = f"{len(used.links)} links carry {rate_text(used.up_bytes_per_s)} together, {gain:.2f} times the first alone"
    if gain < _GAIN:
        found += ": no gain, they share a port, or what is gathered takes the first link's way"
    if wanted == "auto" and gain < _GAIN:
        reasons["runtime.devices"] = f"auto: 1; {found}"
        return 1
    reasons["runtime.devices"] = f"auto: {found}" if wanted == "auto" else found
    return len(used.links)
