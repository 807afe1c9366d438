"""A server under ten times what it bears.  In: a model.  Out: a record: statuses, answers, memory from outside.

usage: serve_soak.py [--model DIR] [--seconds 60] [--connections 1000] [--times 10] [--texts 32] [--quick]

What the server bears is what it answers of twice as much as passes of the fewest students alone could, HTTP and all.
Then a thousand connections are opened and held; Poisson requests come on them at ten times that rate.  Nothing but
right answers and 429 with a Retry-After may come back, resident memory may not grow once it is warm, and when all is
over the queue is empty, the connections' handles are given back and SIGTERM ends the server with 0.
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from harness import MIB, RESULTS, Record, end_on_signals, package_versions
from served import Running, Traffic, bundled_or, serving, zinfer_command
from students_burst import num_wrong, told

WARM_SHARE, MAY_GROW_BYTES = 0.25, 16 * MIB
SETTLE_S, SATURATED_S = 10.0, 6.0


class Watcher:
    """Resident bytes of a process, once a second."""

    def __init__(self, running: Running) -> None:
        self.running, self.seen = running, [(0.0, running.rss_bytes())]
        self.stop, self.begin = threading.Event(), time.perf_counter()
        self.thread = threading.Thread(target=self.watch)

    def watch(self) -> None:
        """Until the block ends."""
        while not self.stop.wait(1.0):
            self.seen.append((time.perf_counter() - self.begin, self.running.rss_bytes()))

    def __enter__(self) -> Watcher:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def growth_bytes(self) -> int:
        """Largest of the last quarter above the largest of what was seen by the end of the warm quarter."""
        end = self.seen[-1][0]
        warm = [held for at, held in self.seen if at <= WARM_SHARE * end]
        last = [held for at, held in self.seen if at >= (1 - WARM_SHARE) * end]
        return max(last) - max(warm)


def gauges(running: Running) -> dict[str, float]:
    """Unlabelled values of /metrics."""
    with urlopen(f"{running.url}/metrics", timeout=30) as found:
        lines = found.read().decode().splitlines()
    return {
        name: float(value) for name, _, value in (line.partition(" ") for line in lines if line[0] != "#")
    }


def settled(running: Running, handles: int) -> dict[str, float]:
    """What is left once every client is gone: waits a little for connections to be seen as closed."""
    end = time.perf_counter() + SETTLE_S
    while running.handles() > handles + 2 and time.perf_counter() < end:
        time.sleep(0.2)
    found = gauges(running)
    return {
        "handles_more": running.handles() - handles,
        "queue_texts": found["zinfer_queue_texts"],
        "in_flight": found["zinfer_in_flight"] - 1,  # the one that asks
    }


def faults(
    row: dict[str, Any], growth_bytes: int, left: dict[str, float], held: int, connections: int
) -> list[str]:
    """What was not as it must be, in words; nothing if all was."""
    said = []
    if others := {
        status: count for status, count in row["by_status"].items() if status not in ("200", "429")
    }:
        said.append(f"neither a right answer nor a 429: {others}")
    if not {"200", "429"} <= set(row["by_status"]):
        said.append("the server was not overloaded, or answered nothing")
    if growth_bytes > MAY_GROW_BYTES:
        said.append(f"memory grew by {growth_bytes / MIB:.0f} MiB")
    if left["handles_more"] > 2 or left["queue_texts"] or left["in_flight"]:
        said.append(f"left behind: {left}")
    if held < connections:
        said.append(f"{connections - held} connections were closed")
    return said


def borne(traffic: Traffic, running: Running, rate: float) -> float:
    """Requests per second that are answered of so many; whether in time does not count."""
    seen = traffic.offer(running.url, "group", [(SATURATED_S, rate)])
    by_status = told(seen["requests"], SATURATED_S)["by_status"]
    if not by_status.get("200"):
        raise SystemExit(f"the server answers nothing under load: {by_status}")
    return float(by_status["200"] / SATURATED_S)


def main() -> int:
    """Run, print, write the record; 1 where anything was not as it must be."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument(
        "--model", type=Path, help="a folder with teacher/ and group/; default: the bundled example"
    )
    made.add_argument("--work", type=Path, default=Path("/tmp/zinfer-bench/soak"))
    made.add_argument("--results", type=Path, default=RESULTS)
    made.add_argument("--seconds", type=float, default=60.0)
    made.add_argument("--connections", type=int, default=1000)
    made.add_argument("--times", type=float, default=10.0)
    made.add_argument("--texts", type=int, default=32, help="texts of a request")
    made.add_argument("--objective-ms", type=float, default=100.0)
    made.add_argument("--quick", action="store_true", help="seconds only, to see that it runs")
    options = made.parse_args()
    if options.quick:
        options.seconds, options.connections = 5.0, 200
    end_on_signals()
    model = bundled_or(options.model)
    options.work.mkdir(parents=True, exist_ok=True)
    traffic = Traffic.of(options.work, options.texts)
    facts = traffic.facts("group", model / "group", options.texts)
    alone = 1 / facts["seconds"]["1"][str(options.texts)]
    command = zinfer_command(model / "group", "--objective-ms", str(options.objective_ms))
    with serving(command, options.work / "server.log") as running:
        traffic.offer(running.url, "group", [(2.0, alone / 4)])
        bears = borne(traffic, running, 2 * alone)
        rate = options.times * bears
        handles = running.handles()
        with Watcher(running) as watcher:
            found = traffic.offer(
                running.url, "group", [(options.seconds, rate)], connections=options.connections
            )
        left = settled(running, handles)
    row = told(found["requests"], options.objective_ms / 1000)
    growth_bytes = watcher.growth_bytes()
    wrong = faults(row, growth_bytes, left, found["held"], options.connections)
    seconds = max(due for due, *_ in found["requests"])
    answered, refused = (row["by_status"].get(status, 0) for status in ("200", "429"))
    said = [
        f"{row['requests']} requests in {seconds:.0f} s on {found['held']} connections, {options.times:g} x capacity",
        f"{answered} answered rightly, {refused} refused with 429, others {num_wrong([row])}",
        f"p99 of the answered {1000 * row['p99_s']:.0f} ms, {row['students']:.2f} students",
        f"resident {watcher.seen[0][1] / MIB:.0f} MiB, at the end {watcher.seen[-1][1] / MIB:.0f} MiB, "
        f"growth once warm {growth_bytes / MIB:.1f} MiB",
        f"left behind: {left}",
        f"load generator late by at most {found['most_late_s']:.2f} s",
        *(f"NOT AS IT MUST BE: {what}" for what in wrong),
    ]
    print("\n".join(said))
    record = Record(
        bench="serve_soak",
        config={
            "model": model.name,
            "connections": options.connections,
            "offered_per_s": rate,
            "capacity_per_s": bears,
            "texts_per_request": options.texts,
            "seconds": options.seconds,
        },
        repeats=1,
        median={
            "answered_per_s": answered / seconds,
            "refused_per_s": refused / seconds,
            "p99_s": row["p99_s"],
            "growth_bytes": growth_bytes,
        },
        spread={"rss_bytes": (min(held for _, held in watcher.seen), max(held for _, held in watcher.seen))},
        limit={"growth_bytes": MAY_GROW_BYTES, "statuses": ["200", "429"]},
        baseline={},
        answer_matches=not num_wrong([row]),
        comparable=not wrong,
        rows=[row, {"rss": watcher.seen[:: max(1, len(watcher.seen) // 60)]}, {"left": left}],
        notes=said,
        versions=package_versions("uvicorn", "starlette"),
    )
    print(record.write(options.results))
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
