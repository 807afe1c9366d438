"""Open-loop load from a process of its own.  In: a job.  Out: what became of every request, answers checked.

usage: http_load.py JOB.json RESULT.json

Job: {"url", "bodies": [str], "expected": file of encoder_facts or null (no answer is checked), "texts_of": [[numbers of
texts of a body]],
"segments": [[seconds, requests per second], ...], "connections": N, "seed"}.  Arrivals are Poisson; latency counts from
when a request was due, whether or not anything was late, so that a stall is seen by all who would have come meanwhile.
`connections` are opened before the clock runs and held to the end; more are opened as needed.  One that the server says
it closes is not used again: no client of HTTP may.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PATIENCE_S, TOLERANCE = 20.0, 2e-3
LATE, BROKEN, WRONG = (
    0,
    -1,
    -2,
)  # in place of a status: no answer in time, a broken connection, a wrong answer


@dataclass(slots=True)
class Seen:
    """One request: when it was due, seconds from then to its answer, its status, the fewest students of a text."""

    due_s: float
    latency_s: float = PATIENCE_S
    status: int = LATE
    students: int = 0
    retry_after: bool = False
    closes: bool = False
    body: bytes = field(default=b"", repr=False)


def arrivals(segments: list[list[float]], seed: int) -> list[float]:
    """When requests are due: a Poisson process of each segment's rate."""
    draw, found, begin = random.Random(seed), [], 0.0
    for seconds, rate in segments:
        at = begin + draw.expovariate(rate) if rate else begin + seconds
        while at < begin + seconds:
            found.append(at)
            at += draw.expovariate(rate)
        begin += seconds
    return found


class Connection(asyncio.Protocol):
    """One connection, one request at a time; between two it lies in `idle`.

    Few steps of Python for a request: what offers the load runs on the processors that it loads.
    """

    def __init__(self, idle: deque[Connection]) -> None:
        self.idle, self.loop = idle, asyncio.get_running_loop()
        self.got, self.is_lost = b"", False
        self.ended: asyncio.Future[None] | None = None

    def connection_made(self, transport: Any) -> None:
        """Open."""
        self.transport = transport

    def ask(self, raw: bytes, seen: Seen, due_at: float) -> asyncio.Future[None]:
        """Send a request that was due at `due_at`; what is returned is done when `seen` says what became of it."""
        self.seen, self.due_at = seen, due_at
        self.ended = self.loop.create_future()
        self.patience = self.loop.call_later(PATIENCE_S, self.end, LATE)
        self.transport.write(raw)
        ended = self.ended
        self.read()
        return ended

    def data_received(self, data: bytes) -> None:
        """A part of a response, which may come before its request where a server turns clients away."""
        self.got += data
        self.read()

    def connection_lost(self, _: Exception | None) -> None:
        """The server has closed, or we have."""
        self.is_lost = True
        self.read()

    def read(self) -> None:
        """Look whether the response is whole."""
        if self.ended is None:
            return
        head, is_whole, body = self.got.partition(b"\r\n\r\n")
        try:
            if is_whole and self.is_read(head.lower(), body):
                self.end(self.seen.status)
            elif self.is_lost:
                self.end(BROKEN)
        except (ValueError, KeyError, IndexError):
            self.end(BROKEN)

    def is_read(self, head: bytes, body: bytes) -> bool:
        """Take a response down, where all of it is there."""
        lines = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
        size = int(lines[b"content-length"])
        if len(body) < size:
            return False
        seen = self.seen
        seen.body, self.got = body[:size], body[size:]
        seen.status = int(head.split(b" ", 2)[1])
        seen.students = int(lines.get(b"x-students", 1))
        seen.retry_after = b"retry-after" in lines
        seen.closes = lines.get(b"connection") == b"close"
        return True

    def end(self, status: int) -> None:
        """The request has ended so."""
        assert self.ended is not None, "one was asked"
        self.patience.cancel()
        self.seen.status, ended, self.ended = status, self.ended, None
        if status in (LATE, BROKEN) or self.seen.closes:
            self.transport.close()
        else:
            self.idle.append(self)
        if status not in (LATE, BROKEN):
            self.seen.latency_s = time.perf_counter() - self.due_at
        if not ended.done():
            ended.set_result(None)


class Load:
    """Connections and the requests on them."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, parts = job, urlsplit(job["url"])
        self.host, self.port = parts.hostname, parts.port
        head = f"POST /predict HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
        bodies = [body.encode() for body in job["bodies"]]
        self.requests = [f"{head}content-length: {len(body)}\r\n\r\n".encode() + body for body in bodies]
        self.idle: deque[Connection] = deque()
        self.most_late_s = 0.0

    async def connect(self) -> Connection:
        """A new connection."""
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(lambda: Connection(self.idle), self.host, self.port)
        return made

    async def run(self) -> list[Seen]:
        """Send everything when it is due."""
        count = self.job.get("connections", 0)
        for at in range(0, count, 50):
            self.idle += await asyncio.gather(*(self.connect() for _ in range(min(50, count - at))))
        seen = [Seen(due) for due in arrivals(self.job["segments"], self.job["seed"])]
        asked, start = [], time.perf_counter()
        for number, one in enumerate(seen):
            if (wait := start + one.due_s - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            self.most_late_s = max(self.most_late_s, time.perf_counter() - start - one.due_s)
            asked.append(self.one(number, one, start))
        await asyncio.gather(*asked)
        self.held = len(self.idle)
        for connection in self.idle:
            connection.transport.close()
        return seen

    def one(self, number: int, seen: Seen, start: float) -> asyncio.Future[None]:
        """One request on a connection that is free, or on a new one."""
        raw, due_at = self.requests[number % len(self.requests)], start + seen.due_s
        if self.idle:
            return self.idle.popleft().ask(raw, seen, due_at)
        return asyncio.ensure_future(self.on_a_new_one(raw, seen, due_at))

    async def on_a_new_one(self, raw: bytes, seen: Seen, due_at: float) -> None:
        """A request for which no connection is free."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                connection = await self.connect()
        except TimeoutError:  # an OSError too, so it is asked for first
            seen.status = LATE
        except OSError:
            seen.status = BROKEN
        else:
            await connection.ask(raw, seen, due_at)


class Checker:
    """Compares answers with what the model says without a server."""

    def __init__(self, job: dict[str, Any]) -> None:
        facts = json.loads(Path(job["expected"]).read_text())
        self.labels, self.logits, self.texts_of = facts["labels"], facts["logits"], job["texts_of"]
        self.largest = 0.0

    def is_right(self, number: int, body: bytes) -> bool:
        """Every text of the request has its own logits, of the students that answered it."""
        rows, texts = json.loads(body)["results"], self.texts_of[number % len(self.texts_of)]
        if len(rows) != len(texts):
            return False
        for row, text in zip(rows, texts, strict=True):
            expected = dict(zip(self.labels, self.logits[str(row["students"])][text], strict=True))
            if {one["label"] for one in row["labels"]} != set(expected):
                return False
            gap = max(abs(one["score"] - expected[one["label"]]) for one in row["labels"])
            self.largest = max(self.largest, gap)
            if gap > TOLERANCE * max(1.0, *map(abs, expected.values())):
                return False
        return True


def main() -> None:
    """Run a job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    load, checker = Load(job), Checker(job) if job["expected"] else None
    seen = asyncio.run(load.run())
    for number, one in enumerate(seen):
        if one.status == 200 and checker is not None and not checker.is_right(number, one.body):
            one.status = WRONG
        if one.status == 429 and not one.retry_after:
            one.status = WRONG
    rows = [[one.due_s, one.latency_s, one.status, one.students] for one in seen]
    told = {
        "most_late_s": load.most_late_s,
        "largest_difference": checker.largest if checker else 0.0,
        "held": load.held,
    }
    Path(sys.argv[2]).write_text(json.dumps({"requests": rows} | told))


if __name__ == "__main__":
    main()
