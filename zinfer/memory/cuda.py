"""The CUDA implementation of the transfer seam.  In: chunks in page-locked host memory.  Out: one DMA each, events."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from zinfer.chunks.table import Chunk
from zinfer.errors import MachineError
from zinfer.memory.links import LinkLog, Movement, Ticket
from zinfer.memory.nvme import Reader
from zinfer.memory.transfer import StagedTransfer, Trip


class CudaTransfer(StagedTransfer):
    """One copy stream of its own, one DMA per chunk.

    Order comes from events alone: a copy waits on the device for the fence of the place's last reader; computation
    waits on the device for the copy's arrival event; a staging slot is reused when the host has seen that event.
    A ticket lands when its copy is queued, so `lease` blocks the host for the disk, never for the DMA.  Nothing
    synchronises the device, and torch's allocator is told nothing: the places are ours until close().
    """

    def __init__(self, reader: Reader, staging: Sequence[Tensor], log: LinkLog, device: torch.device) -> None:
        super().__init__(reader, staging, device)
        self._log = log
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(
            torch.cuda.current_stream(device)
        )  # the slab may be recycled memory with work pending
        self._issuer = ThreadPoolExecutor(1, "zinfer-h2d")  # a copy from pageable memory blocks who issues it
        self._retirer = ThreadPoolExecutor(1, "zinfer-h2d-done")
        self._failure: MachineError | None = None  # of a copy whose ticket had landed; set once, read by all

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
        """A copy on the computation's own stream, ordered with what is issued there; blocks for pageable memory."""
        begin_s = time.perf_counter()
        copy = x.to(self.device)
        self._log.add(Movement("h2d", None, x.nbytes, begin_s, time.perf_counter()))
        return copy

    def to_host(self, x: Tensor) -> Tensor:
        """A copy, complete when this returns: the computation before it is waited for."""
        begin_s = time.perf_counter()
        copy = x.to("cpu")
        self._log.add(Movement("d2h", None, x.nbytes, begin_s, time.perf_counter()))
        return copy

    def close(self) -> None:
        """End both workers; the last DMA has then ended."""
        self._issuer.shutdown()
        self._retirer.shutdown()

    def _copy(self, trip: Trip) -> None:
        self._issuer.submit(self._issue, trip)

    def _issue(self, trip: Trip) -> None:
        chunk = trip.order.chunk
        try:
            trip.ticket.refuse_if_cancelled()
            assert trip.source_N is not None, "a trip is copied from a place"
            begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(self._stream):
                if trip.order.after is not None:
                    self._stream.wait_event(trip.order.after)
                begin.record(self._stream)
                trip.order.target_N[: chunk.nbytes].copy_(trip.source_N[: chunk.nbytes], non_blocking=True)
                end.record(self._stream)
        except BaseException as error:
            self._copied(trip)
            trip.ticket.land(error if isinstance(error, MachineError) else _refused(chunk, error))
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


def _refused(chunk: Chunk, error: BaseException) -> MachineError:
    return MachineError(
        "ZI-5331",
        f"chunk {chunk.id} ({chunk.nbytes} bytes) could not be copied to the device: {error}",
        remedy="nvidia-smi   # is the device healthy, and is its memory free?",
    )
