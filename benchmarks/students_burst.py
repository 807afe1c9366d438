"""How much load a teacher and its students bear over HTTP, and a burst.  In: teacher/ and group/.  Out: record, plot.

usage: students_burst.py [--model DIR | --bundled] [--objective-ms 100] [--texts 8] [--probe-s 5] [--probes 6] [--quick]
                         [--burst-of RATE]

Capacity is the highest rate of Poisson arrivals at which 99 of 100 requests have a right answer within the objective,
counted from when they were due; found by bisection on ratios, and a rate is too much when it was so twice.  Five
servers, one after the other, each its own process, the load from another: a bare Starlette that answers with as many
bytes (the floor: what no model makes faster), the teacher by ONNX Runtime (one request at a time, padded, the same HTTP
library), the teacher by zinfer, the students with the controller and without.  Then the burst: five times the load for
a third of the time, as far above what all students always bear as below what the controller bears (on a ratio's scale),
and at most 0.9 of that; `--burst-of` runs it alone and only prints.  All share this machine's processors, the load too.

The model is by default a teacher of six layers 192 wide and three students of two, random weights, made by
`made_group.py`: its passes weigh more than HTTP.  Those of the bundled example (`--bundled`) take less time than it
takes to cut their texts into tokens, so whoever serves it, the teacher is never far behind.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from harness import RESULTS, Record, end_on_signals, package_versions, run_child
from made_group import write_students, write_teacher
from served import ENGINES, ROOT, Running, Traffic, bundled_or, serving, zinfer_command

SHARE, TIMES, LEAST_OF_MODEL_RATIO = 0.99, 5, 0.7
MADE = {"width": 192, "layers": 6, "heads": 6}
STUDENTS = 3
ANSWER_BYTES = 660  # about those of a text's labels
ANSWER_S = 0.001  # with what to begin the search for the floor
FEW = 60  # requests of a probe that is to say something
WIDEST = 64.0  # between the lowest and the highest rate that are tried
COLOURS = {"adaptive": "#1f6feb", "fixed": "#d1242f"}


def in_time(requests: Sequence[Sequence[float]], objective_s: float) -> float:
    """Share of the requests that were answered, rightly, within the objective."""
    good = sum(status == 200 and latency_s <= objective_s for _, latency_s, status, _ in requests)
    return good / len(requests) if requests else 0.0


def quantile(values: Sequence[float], share: float) -> float:
    """Nearest rank; infinite where there is nothing."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)] if ordered else math.inf


def told(requests: Sequence[Sequence[float]], objective_s: float) -> dict[str, Any]:
    """Of some requests: how many, how they ended, percentiles of what was answered, students on average."""
    answered = [latency_s for _, latency_s, status, _ in requests if status == 200]
    students = [row[3] for row in requests if row[2] == 200]
    statuses = [int(row[2]) for row in requests]
    return {
        "requests": len(requests),
        "in_time": in_time(requests, objective_s),
        "p50_s": quantile(answered, 0.5),
        "p99_s": quantile(answered, 0.99),
        "students": fmean(students) if students else 0.0,
        "by_status": {str(status): statuses.count(status) for status in sorted(set(statuses))},
    }


def num_wrong(rows: Sequence[dict[str, Any]]) -> int:
    """Requests that ended in anything but a right answer or a refusal that says when."""
    return sum(
        count
        for row in rows
        for status, count in row["by_status"].items()
        if status not in ("200", "429", "0")
    )


class Bench:
    """The servers and the traffic of one run."""

    def __init__(self, options: argparse.Namespace, model: Path) -> None:
        self.options, self.model = options, model
        self.work: Path = options.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.objective_s = options.objective_ms / 1000
        self.traffic = Traffic.of(self.work, options.texts)
        self.facts = {
            part: self.traffic.facts(part, model / part, options.texts) for part in ("teacher", "group")
        }
        floor = [sys.executable, str(ENGINES / "serve_echo.py"), str(ANSWER_BYTES * options.texts)]
        graph = self.work / f"{model.name}.onnx"
        script = str(ROOT / "benchmarks" / "export_onnx.py")
        made = run_child(
            [sys.executable, script, str(model / "teacher"), str(graph)], self.work / "export.log"
        )
        self.onnx_note = (
            f"onnx: {made.log.strip().splitlines()[-1][:200] if made.log.strip() else 'exported'}"
        )
        zinfer = ("--objective-ms", str(options.objective_ms))
        self.systems: dict[str, tuple[str, list[str]]] = {
            "teacher": ("teacher", zinfer_command(model / "teacher", "--no-exact")),
            "adaptive": ("group", zinfer_command(model / "group", *zinfer)),
            "fixed": ("group", zinfer_command(model / "group", "--no-adapt", *zinfer)),
        }
        if graph.exists():
            serve = [sys.executable, str(ENGINES / "serve_onnx.py"), str(model / "teacher"), str(graph)]
            self.systems = {"onnxruntime": ("teacher", serve)} | self.systems
        self.systems = {"floor": ("", floor)} | self.systems

    def probe(self, running: Running, part: str, rate: float, seconds: float) -> dict[str, Any]:
        """One rate for some seconds, more where few would come; the first tenth is not counted."""
        seconds = min(max(seconds, FEW / rate), 3 * seconds)
        found = self.traffic.offer(running.url, part, [(seconds, rate)], seed=round(1000 * rate))
        counted = [row for row in found["requests"] if row[0] >= seconds / 10]
        return {"rate": rate} | told(counted, self.objective_s)

    def capacity(self, name: str) -> tuple[float, list[dict[str, Any]]]:
        """Requests per second that a server bears, and what was tried."""
        part, command = self.systems[name]
        seconds, tried = self.options.probe_s, []
        pass_s = self.pass_s(part) if part else ANSWER_S
        low, high = 1 / pass_s / math.sqrt(WIDEST), math.sqrt(WIDEST) / pass_s
        with serving(command, self.work / f"{name}.log") as running:
            self.probe(running, part, low, 1.0)  # warms it; not counted
            for _ in range(self.options.probes):
                rate = math.sqrt(low * high)
                tried.append(self.probe(running, part, rate, seconds))
                if tried[-1]["in_time"] < SHARE:  # a slow moment of the machine is not the server's
                    tried.append(self.probe(running, part, rate, seconds))
                is_held = tried[-1]["in_time"] >= SHARE
                low, high = (rate, high) if is_held else (low, rate)
        held = [row["rate"] for row in tried if row["in_time"] >= SHARE]
        print(f"{name}: {max(held, default=0.0):.1f} requests/s", flush=True)
        return max(held, default=0.0), tried

    def pass_s(self, part: str) -> float:
        """Seconds of a request's pass, by all that answer."""
        by_students = self.facts[part]["seconds"]
        found: float = by_students[str(max(map(int, by_students)))][str(self.options.texts)]
        return found

    def burst(self, name: str, base: float) -> tuple[dict[str, Any], list[list[float]]]:
        """The same arrivals for every server: calm, burst, calm."""
        part, command = self.systems[name]
        third = self.options.burst_s / 3
        segments = [(third, base), (third, TIMES * base), (third, base)]
        with serving(command, self.work / f"{name}.burst.log") as running:
            self.probe(running, part, base, 1.0)
            found = self.traffic.offer(running.url, part, segments, seed=7)
        requests = found["requests"]
        parts = {"before": (0, third), "burst": (third, 2 * third), "after": (2 * third, 3 * third)}
        rows = {
            when: told([row for row in requests if begin <= row[0] < end], self.objective_s)
            for when, (begin, end) in parts.items()
        }
        return rows | {"most_late_s": found["most_late_s"]}, requests


def plot(path: Path, seen: dict[str, list[list[float]]], objective_s: float, burst_s: float) -> None:
    """Latency and students over time, both servers; path gets the endings .svg and .png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for name, requests in seen.items():
        answered = [row for row in requests if row[2] == 200]
        refused = [row[0] for row in requests if row[2] != 200]
        due = [row[0] for row in answered]
        above.plot(due, [1000 * row[1] for row in answered], ".", ms=3, color=COLOURS[name], label=name)
        above.plot(refused, [2000 * objective_s] * len(refused), "x", ms=4, color=COLOURS[name])
        below.plot(due, [row[3] for row in answered], ".", ms=3, color=COLOURS[name], label=name)
    above.axhline(1000 * objective_s, color="#57606a", ls="--", label="objective")
    above.set(yscale="log", ylabel="ms from due to answered (x: refused)")
    below.set(xlabel="s", ylabel="students that answered")
    for axes in (above, below):
        axes.axvspan(burst_s / 3, 2 * burst_s / 3, color="#57606a", alpha=0.1)
        axes.legend()
    for ending in (".svg", ".png"):
        figure.savefig(path.with_suffix(ending))
    pyplot.close(figure)


def burst_rate(capacity: dict[str, float]) -> float:
    """Requests/s of the burst: between what all students always bear and what the controller bears."""
    adaptive, fixed = capacity["adaptive"], capacity["fixed"]
    return min(0.9 * adaptive, math.sqrt(adaptive * fixed)) or 0.9 * adaptive or TIMES


def lines(capacity: dict[str, float], model_ratio: dict[str, float], bursts: dict[str, Any]) -> list[str]:
    """What was found, in words."""
    teacher_s, student_s = model_ratio.get("teacher_s", 0.0), model_ratio.get("student_s", 0.0)
    said = [f"capacity {name}: {rate:.1f} requests/s" for name, rate in capacity.items()]
    teacher, onnx = capacity["teacher"], capacity.get("onnxruntime", 0.0)
    if teacher:
        ratio, least = capacity["adaptive"] / teacher, LEAST_OF_MODEL_RATIO * model_ratio["batch"]
        verdict = "at least" if ratio >= least else "NOT"
        said.append(
            f"students with the controller / teacher: {ratio:.2f} x, {verdict} {LEAST_OF_MODEL_RATIO} x the model-only "
            f"ratio of {model_ratio['batch']:.2f} (one text: {model_ratio['one']:.2f})"
        )
    if floor := capacity.get("floor"):
        said.append(
            f"a request costs {1000 / floor:.2f} ms by a bare Starlette, its passes {1000 * teacher_s:.2f} "
            f"(teacher) and {1000 * student_s:.2f} (one student)"
        )
    if onnx:
        said.append(
            f"students with the controller / ONNX Runtime's teacher: {capacity['adaptive'] / onnx:.2f} x"
        )
    return said + burst_lines(bursts)


def burst_lines(bursts: dict[str, Any]) -> list[str]:
    """How each server came through."""
    said = []
    for name, rows in bursts.items():
        row = rows["burst"]
        holds = "holds" if row["in_time"] >= SHARE else "BREAKS"
        said.append(
            f"burst, {name}: {holds}: {row['in_time']:.1%} in time, p99 {1000 * row['p99_s']:.0f} ms, "
            f"{row['students']:.2f} students, {row['by_status']}"
        )
    return said


def chosen(options: argparse.Namespace) -> Path:
    """The folder with teacher/ and group/."""
    if options.model or options.bundled:
        return bundled_or(options.model)
    folder: Path = options.work / "made-{width}-{layers}-{heads}".format(**MADE)
    teacher = write_teacher(folder / "teacher", **MADE)
    write_students(folder / "group", teacher, STUDENTS)
    return folder


def arguments() -> argparse.ArgumentParser:
    """What the command line takes."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--model", type=Path, help="a folder with teacher/ and group/; default: one is made")
    made.add_argument("--bundled", action="store_true", help="the bundled example")
    made.add_argument("--work", type=Path, default=Path("/tmp/zinfer-bench/burst"))
    made.add_argument("--results", type=Path, default=RESULTS)
    made.add_argument("--objective-ms", type=float, default=100.0)
    made.add_argument("--texts", type=int, default=8, help="texts of a request")
    made.add_argument("--probe-s", type=float, default=5.0)
    made.add_argument("--probes", type=int, default=6)
    made.add_argument("--burst-s", type=float, default=18.0)
    made.add_argument("--burst-of", type=float, metavar="RATE", help="the burst alone, of so many requests/s")
    made.add_argument("--quick", action="store_true", help="seconds only, to see that it runs")
    return made


def main() -> None:
    """Run, print, write the record and the plot."""
    options = arguments().parse_args()
    if options.quick:
        options.probe_s, options.probes, options.burst_s = 1.0, 2, 3.0
    end_on_signals()
    bench = Bench(options, chosen(options))
    if options.burst_of:
        alone = {name: bench.burst(name, options.burst_of / TIMES)[0] for name in ("adaptive", "fixed")}
        print("\n".join(burst_lines(alone)))
        return
    tried = {name: bench.capacity(name) for name in bench.systems}
    capacity = {name: found[0] for name, found in tried.items()}
    base = burst_rate(capacity) / TIMES
    bursts, seen = {}, {}
    for name in ("adaptive", "fixed"):
        bursts[name], seen[name] = bench.burst(name, base)
    seconds = {part: bench.facts[part]["seconds"]["1"] for part in ("teacher", "group")}
    model_ratio = {
        "batch": seconds["teacher"][str(options.texts)] / seconds["group"][str(options.texts)],
        "one": seconds["teacher"]["1"] / seconds["group"]["1"],
        "teacher_s": seconds["teacher"][str(options.texts)],
        "student_s": seconds["group"][str(options.texts)],
    }
    said = [*lines(capacity, model_ratio, bursts), bench.onnx_note]
    print("\n".join(said))
    rows = [{"server": name} | row for name, (_, found) in tried.items() for row in found]
    rows += [
        {"server": name, "when": when} | bursts[name][when]
        for name in bursts
        for when in ("before", "burst", "after")
    ]
    teacher = capacity["teacher"] or math.nan
    record = Record(
        bench="students_burst",
        config={
            "model": bench.model.name,
            "students": max(map(int, bench.facts["group"]["seconds"])),
            "texts_per_request": options.texts,
            "tokens_per_text": fmean(bench.facts["group"]["tokens"]),
            "objective_s": bench.objective_s,
            "probe_s": options.probe_s,
            "probes": options.probes,
            "burst_s": options.burst_s,
            "burst_base_per_s": base,
        },
        repeats=1,
        median={f"{name}_per_s": rate for name, rate in capacity.items()}
        | {
            "ratio_to_teacher": capacity["adaptive"] / teacher,
            "burst_in_time": bursts["adaptive"]["burst"]["in_time"],
        },
        spread={
            f"{name}_step": (rate, rate * WIDEST ** (0.5**options.probes)) for name, rate in capacity.items()
        },
        limit={
            "model_only_ratio": model_ratio,
            "ratio_at_least": LEAST_OF_MODEL_RATIO * model_ratio["batch"],
        },
        baseline={
            "onnxruntime_per_s": capacity.get("onnxruntime"),
            "teacher_per_s": capacity["teacher"],
            "floor_per_s": capacity["floor"],
            "fixed_burst_in_time": bursts["fixed"]["burst"]["in_time"],
        },
        answer_matches=not num_wrong([row for row in rows if "by_status" in row]),
        rows=[*rows, {"pass_seconds": {part: bench.facts[part]["seconds"] for part in bench.facts}}],
        notes=said,
        versions=package_versions("onnxruntime", "onnx", "uvicorn", "starlette"),
    )
    path = record.write(options.results)
    plot(path, seen, bench.objective_s, options.burst_s)
    print(path)


if __name__ == "__main__":
    main()
