"""The CUDA implementation of the transfer seam.  In: chunks in page-locked host memory.  Out: one DMA each, events."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor

from zinfer.chunks.table import Chunk
from zinfer.errors import MachineError, ZinferError
from zinfer.memory.clock import Clock, CudaClock
from zinfer.memory.crossing import Crossing
from zinfer.memory.faults import explained
from zinfer.memory.links import LinkLog, Movement, Ticket
from zinfer.memory.numa import Near
from zinfer.memory.nvme import Reader
from zinfer.memory.transfer import StagedTransfer, Trip


class CudaTransfer(StagedTransfer):
    """A stream for weights, one DMA per chunk; a stream each way for everything else.

    Order comes from events alone: a copy waits on the device for the fence of the place's last reader; computation
    waits on the device for the copy's arrival event; a staging slot is reused when the host has seen that event.
    A ticket lands when its copy is queued, so `lease` blocks the host for the disk, never for the DMA.  Nothing
    synchronises the device, and torch's allocator is told nothing: the places are ours until close().

    torch hands a copy with `non_blocking` to the runtime as it is, whatever memory it comes from; the runtime knows
    what was page-locked by cudaHostRegister.  From other memory it waits for the stream first, which is why copies
    are issued by a thread of their own.
    """

    def __init__(
        self,
        reader: Reader,
        staging: Sequence[Tensor],
        log: LinkLog,
        device: torch.device,
        *,
        near: Near | None = None,
        parking_bytes: int = 0,
    ) -> None:
        super().__init__(reader, staging, device)
        self.clock: Clock = CudaClock(device)
        self._log = log
        self._near = near or Near()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(
            torch.cuda.current_stream(device)
        )  # the slab may be recycled memory with work pending
        self.crossing = Crossing(device, log, parking_bytes)
        self._issuer = ThreadPoolExecutor(1, "zinfer-h2d", initializer=self.enter)
        self._retirer = ThreadPoolExecutor(1, "zinfer-h2d-done", initializer=self.enter)
        self._failure: ZinferError | None = None  # of a copy whose ticket had landed; set once, read by all

    def enter(self) -> None:
        """What each thread that speaks to the device does first: stand near it, and make no context elsewhere."""
        self._near.bind_thread()
        with suppress(Exception):  # a lost device refuses: what is asked of it next says so
            torch.cuda.set_device(self.device)

    def ready(self, ticket: Ticket) -> None:
        """Order the computation that is issued next behind the arrival.  Raises what a DMA died of."""
        if self._failure is not None:
            raise self._failure
        torch.cuda.current_stream(self.device).wait_event(ticket.arrival)

    def fence(self) -> torch.cuda.Event:
        """A mark behind all computation issued so far."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def release(self, place_N: Tensor) -> None:
        """The next copy into the place waits for its fence; nothing else to do."""

    def to_device(self, x: Tensor) -> Tensor:
        """As `Crossing.to_device`."""
        return self.crossing.to_device(x)

    def to_host(self, x: Tensor) -> Tensor:
        """As `Crossing.to_host`: complete when this returns."""
        return self.crossing.to_host(x)

    def park(self, x: Tensor) -> Tensor:
        """As `Crossing.park`: for `unpark` alone."""
        return self.crossing.park(x)

    def unpark(self, x: Tensor) -> Tensor:
        """As `Crossing.unpark`."""
        return self.crossing.unpark(x)

    def forget(self) -> None:
        """Nobody will come for what is parked."""
        self.crossing.forget()

    def close(self) -> None:
        """End the workers; the last DMA has then ended."""
        self._issuer.shutdown()
        self._retirer.shutdown()
        self.crossing.close()

    def _copy(self, trip: Trip) -> None:
        self._issuer.submit(self._issue, trip)

    def _issue(self, trip: Trip) -> None:
        chunk = trip.order.chunk
        try:
            trip.ticket.refuse_if_cancelled()
            assert trip.source_N is not None, "a trip is copied from a place"
            # Blocking: who waits for one sleeps, where it would spin on a core.
            begin = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(self._stream):
                if trip.order.after is not None:
                    self._stream.wait_event(trip.order.after)
                begin.record(self._stream)
                trip.order.target_N[: chunk.nbytes].copy_(trip.source_N[: chunk.nbytes], non_blocking=True)
                end.record(self._stream)
        except BaseException as error:
            self._copied(trip)
            trip.ticket.land(error if isinstance(error, ZinferError) else _refused(chunk, error))
            return
        trip.ticket.arrival = end
        trip.ticket.land()
        self._retirer.submit(self._retire, trip, begin, end)

    def _retire(self, trip: Trip, begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
        try:
            end.synchronize()
            end_s, seconds = time.perf_counter(), begin.elapsed_time(end) / 1e3
            chunk = trip.order.chunk
            self._log.add(Movement("h2d", chunk.id, chunk.nbytes, end_s - seconds, end_s))
        except BaseException as error:
            self._failure = self._failure or _refused(trip.order.chunk, error)
        self._copied(trip)


def _refused(chunk: Chunk, error: BaseException) -> ZinferError:
    """A copy's error: the device's own where it is lost, else that of this copy."""
    return explained(error, f"while chunk {chunk.id} was copied to it") or MachineError(
        "ZI-5331",
        f"chunk {chunk.id} ({chunk.nbytes} bytes) could not be copied to the device: {error}",
        remedy="nvidia-smi   # is the device healthy, and is its memory free?",
    )
