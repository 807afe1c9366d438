"""Which links add up.  In: a way to copy over some of them at once.  Out: the rate of each, alone and with the others.

Nothing is guessed from addresses on a bus: who shares a root port or a switch shows in what is left of a link's rate
when all links work, and so does a gather that takes the computing device's own link.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from zinfer.config.machine import DeviceLink, Link
from zinfer.memory.measure_devices import CudaLinks

_LATENCY_S = 1e-5
_SHARED = 0.9  # of its rate alone: a link that keeps less has to share


class Links(Protocol):
    """Links to several devices, the one that computes first."""

    @property
    def num_devices(self) -> int:
        """How many."""
        ...

    def pull(self, devices: Sequence[int]) -> list[float]:
        """Bytes per second from host memory to the computing device by way of each of these, all at the same time."""
        ...

    def send(self, device: int) -> float:
        """Bytes per second from a further device to the computing one, alone."""
        ...

    def own(self, device: int) -> float:
        """Bytes per second from host memory into that device, alone."""
        ...


def measure_links(links: Links) -> tuple[DeviceLink, ...]:
    """Every link alone, then all of them at once, the gathering included; () where there is one device."""
    if links.num_devices < 2:
        return ()
    devices = range(links.num_devices)
    together = links.pull(devices)
    return tuple(
        DeviceLink(
            h2d=_link(links.own(device)),
            together_bytes_per_s=together[device],
            peer=_link(links.send(device)) if device else None,
        )
        for device in devices
    )


def sharing(links: Sequence[DeviceLink]) -> list[int]:
    """Devices whose link carries less while the others work: they share a port, or the last hop."""
    return [
        device
        for device, link in enumerate(links)
        if link.together_bytes_per_s
        < _SHARED * min(way.bytes_per_s for way in (link.h2d, link.peer or link.h2d))
    ]


def cuda_links(
    open_links: Callable[[int], CudaLinks] = CudaLinks, *, num_devices: int
) -> tuple[DeviceLink, ...]:
    """Of the CUDA devices here.  Raises MachineError ZI-5383 when one of them cannot be measured."""
    if num_devices < 2:
        return ()
    with open_links(num_devices) as links:
        return measure_links(links)


def _link(bytes_per_s: float) -> Link:
    return Link(bytes_per_s=bytes_per_s, latency_s=_LATENCY_S)
