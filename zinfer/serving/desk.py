"""Answers, whichever way their requests came.  In: bodies.  Out: replies, each of them counted."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from zinfer.log import logger
from zinfer.serving.asks import Kind
from zinfer.serving.body import Bodies
from zinfer.serving.metrics import Meters
from zinfer.serving.refusal import Refusal
from zinfer.serving.service import Service

STUDENTS_HEADER = "x-students"
GONE = 499  # nobody is there to read it: for the counters


@dataclass(frozen=True, slots=True)
class Reply:
    """What is sent back, JSON; `headers` beside those of every response."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def refusing(cls, refusal: Refusal) -> Reply:
        """A refusal as it is sent."""
        return cls(refusal.status, refusal.body(), refusal.headers())

    @property
    def closes(self) -> bool:
        """Whether the connection ends with it."""
        return "connection" in self.headers


class Desk:
    """Where the way by the routes and the short one from the door meet.  Used from the event loop's thread."""

    def __init__(self, service: Service, meters: Meters) -> None:
        self.service, self.meters = service, meters
        self.bodies = Bodies(service.limits)

    async def answer(self, raw: bytes, kind: Kind) -> Reply:
        """The answer to one body.  Raises Refusal; cancelled, it leaves nothing behind."""
        answered, body = await self.service.answer(raw, kind)
        self.meters.answered(answered)
        return Reply(200, body, {STUDENTS_HEADER: str(answered.num_students)})

    async def reply(self, raw: bytes, kind: Kind) -> Reply:
        """What is sent back for a request that came by the short way, whatever becomes of it.

        Cancelled, its client has gone.
        """
        begin_s, status = time.perf_counter(), GONE
        self.service.in_flight += 1
        try:
            with self.bodies.holding(raw):
                reply = await self._answer_or_refusal(raw, kind)
            status = reply.status
            return reply
        finally:
            self.service.in_flight -= 1
            self.count(f"/{kind}", status, time.perf_counter() - begin_s)

    async def _answer_or_refusal(self, raw: bytes, kind: Kind) -> Reply:
        try:
            return await self.answer(raw, kind)
        except Refusal as error:
            return Reply.refusing(error)
        except Exception as error:
            return Reply.refusing(broken(error))

    def count(self, path: str, status: int, seconds: float) -> None:
        """A request that has ended."""
        self.meters.requests.labels(path, str(status)).inc()
        if path in ("/predict", "/embed") and status == 200:
            self.meters.latency.observe(seconds)
        if status == GONE:
            self.meters.disconnects.inc()
        if status in (429, 503):
            self.meters.rejected.labels({429: "overloaded", 503: "closed"}[status]).inc()


def broken(error: Exception) -> Refusal:
    """500: a bug of ours.  What it was goes to our own output, never to the client."""
    logger.error("a bug in zinfer: %s", error, exc_info=error)
    return Refusal(500, "ZI-0001", "a bug in zinfer", remedy="report what the server printed")
