"""Carry out a job.  In: an open LLM, request lines, a results file.  Out: every request's line, exactly once.

Two sides: a thread that runs the passes, and an asyncio writer that brings what they finish to the disk.  The
passes wait for the writer only where MAX_WAITING results do.
"""

from __future__ import annotations

import asyncio
import errno
import shlex
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from aiofiles.base import wrap

from zinfer.chunks.disk import Disk
from zinfer.errors import BudgetError, InternalError, MachineError, ZinferError
from zinfer.jobs.identity import identity_of
from zinfer.jobs.line import Fault, JobRequest
from zinfer.jobs.output import Entry, JobOutput
from zinfer.jobs.prompt import ids_of
from zinfer.jobs.requests import Survey, read_lines, request_of, survey
from zinfer.jobs.results import answer, fault_answer
from zinfer.plan.make import Plan
from zinfer.runtime.model import Model
from zinfer.runtime.request import RequestOutput
from zinfer.runtime.stats import Stats
from zinfer.sampling.params import SamplingParams
from zinfer.tokenizer import Renderer

MAX_WAITING = 1024
REPORT_EVERY_S = 0.5
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Engine(Protocol):
    """What a job asks of an LLM."""

    @property
    def model(self) -> Model: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def stats(self) -> Stats: ...

    def generate_iter(
        self, prompts: Iterable[tuple[list[int], SamplingParams]], params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Outputs as they finish; `request_id` is the position in `prompts`, which is read lazily."""
        ...


class StoppedError(BaseException):
    """Passes the brake through the engine; no handler of errors may take it for one."""


class Brake:
    """Stops passes between two chunks: give it to the LLM as its `watch`; hands progress on to `watch`."""

    def __init__(self, watch: Callable[[int, int, str], None] | None = None) -> None:
        self._watch = watch
        self._is_pulled = threading.Event()

    @property
    def is_pulled(self) -> bool:
        """Whether the passes are to stop."""
        return self._is_pulled.is_set()

    def pull(self) -> None:
        """Stop the passes as soon as they can be; from any thread or signal handler."""
        self._is_pulled.set()

    def check(self) -> None:
        """Raises StoppedError once the brake is pulled."""
        if self.is_pulled:
            raise StoppedError

    def __call__(self, done: int, total: int, what: str) -> None:
        """What a pass calls for every chunk."""
        self.check()
        if self._watch is not None:
            self._watch(done, total, what)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is: requests with a result on disk, faults among them, all of them."""

    done: int
    faults: int
    total: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run of a job ended.  `earlier` of `done` were there when it began."""

    done: int
    faults: int
    total: int
    earlier: int
    damaged: int
    is_interrupted: bool


class Job:
    """One run of one job.  Use once."""

    def __init__(
        self,
        llm: Engine,
        source: Path,
        results: Path,
        *,
        defaults: SamplingParams,
        brake: Brake,
        model_name: str,
        disk: Disk | None = None,
        report: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self._llm = llm
        self._source = source
        self._results = results
        self._defaults = defaults
        self._brake = brake
        self._model_name = model_name
        self._disk = disk or Disk()
        self._report = report
        self._flying: dict[int, JobRequest] = {}
        self._room = threading.BoundedSemaphore(MAX_WAITING)

    async def run(self) -> Outcome:
        """Do what is left of the job; pull the brake to stop it.

        Raises CheckpointError ZI-4921 (no input), UsageError ZI-1711 to ZI-1713 as JobOutput, BudgetError ZI-2702
        (disk full), MachineError ZI-5701 (the disk fails), and what a pass raised.  Whatever it raises, results
        that were on disk stay, and the same job run again goes on behind them.
        """
        found = await asyncio.to_thread(survey, self._source)
        plan = self._llm.plan
        identity = identity_of(self._llm.model, plan.device, plan.exact, self._defaults, found)
        try:
            output = JobOutput(self._results, identity, found.num_lines, self._disk)
        except OSError as error:
            raise _refusal(error, self._results, 0, found.num_requests) from error
        with closing(output):
            earlier, damaged = output.num_done, output.num_damaged
            if output.num_done < found.num_requests:
                await self._both(output, found)
            is_whole = output.num_done == found.num_requests
            if not is_whole and not self._brake.is_pulled:
                left = found.num_requests - output.num_done
                raise InternalError("ZI-1709", f"the passes ended and {left} requests have no result")
            return Outcome(
                output.num_done, output.num_faults, found.num_requests, earlier, damaged, not is_whole
            )

    async def _both(self, output: JobOutput, found: Survey) -> None:
        """Passes and writer side by side; the writer ends when the passes have."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Entry | None] = asyncio.Queue()

        def put(entry: Entry | None) -> None:
            if entry is not None:
                while not self._room.acquire(timeout=REPORT_EVERY_S):
                    self._brake.check()
            loop.call_soon_threadsafe(queue.put_nowait, entry)

        def passes() -> None:
            try:
                self._generate(put, output, found)
            except StoppedError:
                pass
            finally:
                put(None)

        reports = asyncio.create_task(self._reports(output, found))
        running = asyncio.create_task(asyncio.to_thread(passes))
        try:
            await self._write(queue, output)
        except OSError as error:
            raise _refusal(error, self._results, output.num_done, found.num_requests) from error
        finally:
            self._brake_unless_done(running)
            await asyncio.wait([running])
            reports.cancel()
        with suppress(asyncio.CancelledError):
            await reports  # raises what drawing did
        self._report(self._progress(output, found))
        await running  # raises what a pass did

    def _brake_unless_done(self, running: asyncio.Task[None]) -> None:
        if not running.done():
            self._brake.pull()

    async def _write(self, queue: asyncio.Queue[Entry | None], output: JobOutput) -> None:
        """Bring results to the disk, as many at once as are waiting."""
        append = wrap(output.append)
        is_last = False
        while not is_last:
            waiting = [await queue.get()]
            while not queue.empty():
                waiting.append(queue.get_nowait())
            entries = [entry for entry in waiting if entry is not None]
            is_last = len(entries) < len(waiting)
            if entries:
                await append(entries)
                self._room.release(len(entries))

    def _generate(self, put: Callable[[Entry], None], output: JobOutput, found: Survey) -> None:
        """Run the passes: what is left of the input in, results out."""
        decode = _decoder(self._llm.model)
        with Renderer() as renderer:
            outputs = self._llm.generate_iter(self._prompts(put, output, found, renderer))
            try:
                for finished in outputs:
                    request = self._flying.pop(finished.request_id)
                    if finished.error is not None:  # more cache than this budget could ever give
                        put(fault_answer(request.fault(finished.error)))
                        continue
                    name = self._model_name
                    put(answer(request, finished, begun_s=output.begun_s, model=name, decode=decode))
                    self._brake.check()
            finally:
                if isinstance(outputs, Generator):
                    outputs.close()  # gives its cache pages back now

    def _prompts(
        self, put: Callable[[Entry], None], output: JobOutput, found: Survey, renderer: Renderer
    ) -> Iterator[tuple[list[int], SamplingParams]]:
        """Requests whose result is not on disk yet, read as the engine asks for them; faults go straight out."""
        position = 0
        for number, raw in read_lines(self._source):
            self._brake.check()
            if number >= len(output.done) or output.done[number]:
                continue
            request = request_of(number, raw, self._defaults, found.repeated)
            model = self._llm.model
            ids = ids_of(request, model, renderer) if isinstance(request, JobRequest) else request
            if isinstance(ids, Fault):
                put(fault_answer(ids))
                continue
            assert isinstance(request, JobRequest), "a fault was answered above"
            self._flying[position] = request
            position += 1
            yield ids, request.params

    async def _reports(self, output: JobOutput, found: Survey) -> None:
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            self._report(self._progress(output, found))

    def _progress(self, output: JobOutput, found: Survey) -> Progress:
        return Progress(output.num_done, output.num_faults, found.num_requests)


def _decoder(model: Model) -> Callable[[int], str]:
    tokenizer = model.tokenizer
    if tokenizer is None:
        return str
    return lambda token_id: tokenizer.decode([token_id], skip_special_tokens=False)


def _refusal(error: OSError, results: Path, done: int, total: int) -> ZinferError:
    where = shlex.quote(str(results.parent))
    safe = f"{done} of {total} results are safely written"
    if error.errno in DISK_FULL:
        return BudgetError(
            "ZI-2702",
            f"the disk is full: {results} cannot grow; {safe}",
            remedy=f"df -h {where}   # free space, then run the same command: it goes on from here",
        )
    return MachineError(
        "ZI-5701",
        f"{results} cannot be written: {error.strerror}; {safe}",
        remedy=f"ls -ld {where}   # make it writable, then run the same command: it goes on from here",
    )
