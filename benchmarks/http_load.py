"""Open-loop load from a process of its own.  In: a job.  Out: what became of every request, answers checked.

usage: http_load.py JOB.json RESULT.json

Job: {"url", "bodies": [str], "expected": file of encoder_facts, "texts_of": [[numbers of texts of a body]],
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


class Load:
    """Connections and the requests on them."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, parts = job, urlsplit(job["url"])
        self.host, self.port = parts.hostname, parts.port
        head = f"POST /predict HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
        bodies = [body.encode() for body in job["bodies"]]
        self.requests = [f"{head}content-length: {len(body)}\r\n\r\n".encode() + body for body in bodies]
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.most_late_s = 0.0

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A new connection."""
        return await asyncio.open_connection(self.host, self.port)

    async def run(self) -> list[Seen]:
        """Send everything when it is due."""
        count = self.job.get("connections", 0)
        for at in range(0, count, 50):
            self.idle += await asyncio.gather(*(self.connect() for _ in range(min(50, count - at))))
        seen = [Seen(due) for due in arrivals(self.job["segments"], self.job["seed"])]
        tasks, start = [], time.perf_counter()
        for number, one in enumerate(seen):
            if (wait := start + one.due_s - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            self.most_late_s = max(self.most_late_s, time.perf_counter() - start - one.due_s)
            tasks.append(asyncio.ensure_future(self.one(number, one, start)))
        await asyncio.gather(*tasks)
        self.held = len(self.idle)
        for _, writer in self.idle:
            writer.close()
        return seen

    async def one(self, number: int, seen: Seen, start: float) -> None:
        """One request on a connection that is free."""
        pair = None
        try:
            async with asyncio.timeout(PATIENCE_S):
                pair = self.idle.pop(0) if self.idle else await self.connect()
                pair[1].write(self.requests[number % len(self.requests)])
                await self.answer(pair[0], seen)
            seen.latency_s = time.perf_counter() - start - seen.due_s
            if seen.closes:
                pair[1].close()
            else:
                self.idle.append(pair)
        except TimeoutError:  # an OSError too, so it is asked for first
            seen.status = LATE
        except (OSError, EOFError, ValueError):
            seen.status = BROKEN
        finally:
            if pair is not None and seen.status in (BROKEN, LATE):
                pair[1].close()

    async def answer(self, reader: asyncio.StreamReader, seen: Seen) -> None:
        """Read one response."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        lines = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
        seen.body = await reader.readexactly(int(lines["content-length"]))
        seen.status = int(head.split()[1])
        seen.students = int(lines.get("x-students", 1))
        seen.retry_after = "retry-after" in lines
        seen.closes = lines.get("connection") == "close"


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
    load, checker = Load(job), Checker(job)
    seen = asyncio.run(load.run())
    for number, one in enumerate(seen):
        if one.status == 200 and not checker.is_right(number, one.body):
            one.status = WRONG
        if one.status == 429 and not one.retry_after:
            one.status = WRONG
    rows = [[one.due_s, one.latency_s, one.status, one.students] for one in seen]
    told = {"most_late_s": load.most_late_s, "largest_difference": checker.largest, "held": load.held}
    Path(sys.argv[2]).write_text(json.dumps({"requests": rows} | told))


if __name__ == "__main__":
    main()
