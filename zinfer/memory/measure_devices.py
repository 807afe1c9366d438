"""Copies over the links of several CUDA devices, one at a time or all at once.  Out: bytes per second."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from zinfer.errors import MachineError
from zinfer.memory.slab import DeviceSlab, HostSlab
from zinfer.units import MIB

_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device
_ROUNDS = 16  # copies of a measurement: the first and last, which run without company, hardly count


def common_rates(ends_s: Sequence[Sequence[float]], nbytes: int) -> list[float]:
    """Bytes per second of each way, from the ends of its rounds of `nbytes`, for as long as all ways were at work.

    What a slow way does when a fast one has ended already says nothing about both at once.
    """
    common_s = min(ends[-1] for ends in ends_s)
    rates = []
    for ends in ends_s:
        rounds = max(sum(end_s <= common_s for end_s in ends), 1)
        rates.append(rounds * nbytes / ends[rounds - 1])
    return rates


class CudaLinks:
    """Page-locked host memory and two places on each device, until it is closed.

    A way over a further device pulls into one place while it sends from the other, as a stream of shares does.
    """

    def __init__(self, num_devices: int, nbytes: int = 64 * MIB) -> None:
        self.num_devices = num_devices
        self._nbytes = nbytes
        self._closing = ExitStack()
        self._devices = [torch.device("cuda", at) for at in range(num_devices)]

    def __enter__(self) -> CudaLinks:
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        with _spoken_for("page-locking"), ExitStack() as opened:
            self._sources, self._places, self._targets = [], [], []
            for device in self._devices:
                slab = HostSlab(self._nbytes)
                opened.callback(slab.close)
                slab.bytes_N.fill_(0)
                address = slab.bytes_N.data_ptr()
                if int(runtime.cudaHostRegister(address, self._nbytes, _PORTABLE)) == 0:
                    opened.callback(runtime.cudaHostUnregister, address)
                self._sources.append(slab.bytes_N)
                self._places.append([self._slab(device, opened) for _ in range(2)])
                self._targets.append(self._slab(self._devices[0], opened))
            self._pulls = [_stream(device) for device in self._devices]
            self._sends = [_stream(device) for device in self._devices]
            self._gathers = [_stream(self._devices[0]) for _ in self._devices]
            self._closing = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tensors in (self._sources, self._places, self._targets):
            tensors.clear()  # memory goes back when nobody refers to it any more
        self._closing.close()

    def own(self, device: int) -> float:
        """Host memory to the device, alone."""
        return self._rates([device], self._pull)[0]

    def send(self, device: int) -> float:
        """The device to the first one, alone."""
        return self._rates([device], self._send)[0]

    def pull(self, devices: Sequence[int]) -> list[float]:
        """Host memory to the first device by way of each, all at the same time."""
        return self._rates(
            devices, lambda at, turn: self._send(at, turn) if self._pull(at, turn) and at else None
        )

    def _pull(self, at: int, turn: int) -> bool:
        """Into one of two places, behind the copy that last read it; the next copy out of it comes behind this."""
        stream, free = self._pulls[at], self._marks.get((at, turn % 2))
        with torch.cuda.stream(stream):
            if free is not None:
                stream.wait_event(free)
            self._places[at][turn % 2].copy_(self._sources[at], non_blocking=True)
            self._ends[at].append(_mark(stream))
            self._sends[at].wait_event(self._ends[at][-1])
        return True

    def _send(self, at: int, turn: int) -> None:
        """On to the first device.  Its round ends with this copy, not with the pull."""
        with torch.cuda.stream(self._gathers[at]), torch.cuda.stream(self._sends[at]):
            self._targets[at].copy_(self._places[at][turn % 2], non_blocking=True)
            self._marks[at, turn % 2] = _mark(self._sends[at])
        self._ends[at] = [*self._ends[at][:turn], self._marks[at, turn % 2]]

    def _rates(self, devices: Sequence[int], one_round: Callable[[int, int], object]) -> list[float]:
        self._ends: dict[int, list[Any]] = {at: [] for at in devices}
        self._marks: dict[tuple[int, int], Any] = {}
        with _spoken_for("copying"):
            for at in range(self.num_devices):
                torch.cuda.synchronize(at)
            begins = {at: _mark(self._pulls[at]) for at in devices}
            for turn in range(_ROUNDS):
                for at in devices:
                    one_round(at, turn)
            for at in devices:
                self._ends[at][-1].synchronize()
            ends_s = [[begins[at].elapsed_time(end) / 1e3 for end in self._ends[at]] for at in devices]
        return common_rates(ends_s, self._nbytes)

    def _slab(self, device: torch.device, opened: ExitStack) -> Tensor:
        slab = DeviceSlab(self._nbytes, device)
        opened.callback(slab.close)
        return slab.bytes_N


def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _mark(stream: Any) -> Any:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


@contextmanager
def _spoken_for(what: str) -> Iterator[None]:
    """One error for whatever the driver refuses."""
    try:
        yield
    except RuntimeError as error:
        raise MachineError(
            "ZI-5383",
            f"the links of several devices could not be measured, {what} failed: {error}",
            remedy="nvidia-smi topo -m   # then zinfer doctor again; runtime.devices=1 needs no such measurement",
        ) from error
