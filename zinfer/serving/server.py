"""A server from its start to its end.  In: a folder, settings.  Out: answers until a signal, then those still owed."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from zinfer.classifier import Classifier
from zinfer.config.schema import Settings
from zinfer.errors import MachineError, ZinferError
from zinfer.serving.access import BACKLOG, bind, check_binding
from zinfer.serving.app import Guard, make_app
from zinfer.serving.door import Door
from zinfer.serving.model import ServedClassifier, open_queue
from zinfer.serving.pauses import few_pauses
from zinfer.serving.protocol import MAX_HEADER_BYTES, timed_protocol
from zinfer.serving.service import Service
from zinfer.serving.shift import Shift

SWITCH_S = (
    0.0005  # how long a thread may keep the interpreter: a pass of small products would hold answers up
)
_LAST_S = 5  # for connections to close, once everything is answered

Say = Callable[[str], None]
Ready = Callable[[dict[str, Any]], None]


def run_server(opened: Callable[[], Classifier], settings: Settings, *, say: Say, ready: Ready) -> None:
    """Serve what `opened` opens until SIGTERM or Ctrl-C; a second one ends at once.

    `say` gets one line about every `serve.access_s` seconds with requests, `ready` once what a script needs to know.
    Raises before anything is answered: UsageError ZI-1171, MachineError ZI-5352, and what `Classifier` raises; at the
    end MachineError ZI-5354 where the grace did not suffice.
    """
    limits = settings.serve
    check_binding(limits)
    with bind(limits) as listening, opened() as classifier, few_pauses() as settle:

        def settled(about: dict[str, Any]) -> None:
            settle()
            ready(about)

        service = Service(ServedClassifier(classifier), open_queue(classifier, limits), limits)
        before_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        try:
            server = Server(make_app(service), service, say=say, ready=settled)
            server.run(sockets=[listening])
        finally:
            sys.setswitchinterval(before_s)
            service.close()
        if server.failure is not None:
            raise server.failure


class Server(uvicorn.Server):
    """uvicorn's, but a signal first lets everything that was taken be answered while new requests get a 503."""

    def __init__(self, app: Guard, service: Service, *, say: Say, ready: Ready) -> None:
        self.service, self.say, self.ready = service, say, ready
        self.shift = Shift(app.desk.meters, service)
        self.failure: ZinferError | None = None
        self._ends_s: float | None = None
        self._last_words = ""
        limits = service.limits
        super().__init__(
            uvicorn.Config(
                app,
                loop="asyncio",
                http=timed_protocol(limits, Door(app.desk)),
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",  # what goes wrong is said by us, and trash that strangers send is counted
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=limits.idle_s,  # type: ignore[arg-type]  # a float is taken, and needed
                timeout_graceful_shutdown=_LAST_S,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen first, load then: /health and /ready tell meanwhile."""
        await super().startup(sockets)
        address = (sockets or self.servers[0].sockets)[0].getsockname()
        self._warming = asyncio.ensure_future(self._warm(address[0], address[1]))

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end.  While draining, when nothing is in flight or the grace is over."""
        is_over = await super().on_tick(counter)
        if self._last_words:
            self.say(self._last_words)
            self._last_words = ""
        if line := self.shift.line(time.perf_counter()):
            self.say(line)
        if self._ends_s is None or is_over:
            return is_over or self.failure is not None
        if not self.service.in_flight:
            return True
        if time.perf_counter() > self._ends_s:
            self.failure = MachineError(
                "ZI-5354",
                f"{self.service.in_flight} requests were not answered within {self.service.limits.grace_s:g} s",
                remedy="--set serve.grace_s=120",
            )
            self.service.queue.close()
            self.force_exit = True
            return True
        return False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: drain; a second one: end now.

        Nothing is written here: the signal may have come in the middle of another line.
        """
        if self._ends_s is not None:
            self.should_exit = self.force_exit = True
            return
        self.service.is_draining = True
        self._ends_s = time.perf_counter() + self.service.limits.grace_s
        name = signal.Signals(sig).name
        self._last_words = f"{name}: answering {self.service.in_flight} requests, then the end"

    async def _warm(self, host: str, port: int) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(None, self.service.warm)
        except ZinferError as error:
            self.failure = error
            return
        shown = f"[{host}]" if ":" in host else host
        self.ready({"url": f"http://{shown}:{port}", "host": host, "port": port} | self.shift.about())
