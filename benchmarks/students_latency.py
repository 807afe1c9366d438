"""A teacher against 1 to K of its students.  In: a group, its teacher.  Out: a record and a picture of the latencies.

usage: students_latency.py [GROUP --teacher DIR] [--work DIR] [--results DIR] [--cell 0.3] [--rate-s 3] [--quick]

Without a group: the bundled one where it is there, else one with random weights of MiniLM-L6's shape.  Two parts, in
one process, threads as zinfer chooses them.  "Model": seconds of a call with so many texts of so many tokens, the
contestants in turn; beside teacher and students one student of the group's total size (two layers, sqrt(K) times as
wide).  "Served": the highest Poisson rate of texts whose p99 lies within an objective, each contestant behind
`TextScheduler`.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, Record, end_on_signals
from made_group import write_students, write_teacher

from zinfer.config.load import load_settings
from zinfer.runtime.encoder_engine import EncoderEngine
from zinfer.runtime.texts import pack_texts
from zinfer.spec.records import ModelSpec
from zinfer.students.controller import ServiceTable
from zinfer.students.group import read_group
from zinfer.students.intake import Overloaded
from zinfer.students.opening import measured, open_scheduler
from zinfer.students.scheduler import Answerer, Served
from zinfer.students.serving import GroupService
from zinfer.students.student import layer_shapes, width_of
from zinfer.students.tally import percentile
from zinfer.tokenizer import Encoded

WIDTH, LAYERS, HEADS, STUDENTS = 384, 6, 12, 3
LENGTHS, BATCHES, MOST_ROWS = (16, 32, 64, 128, 256), (1, 4, 16, 64), 4096
SERVED_LENGTH, SERVED_AT_LEAST = (16, 64), 0.7
PASS_TOKENS = 2048
MATRICES = 12  # of width x width that a layer of a made teacher has: four of attention, eight of the MLP
BUNDLED = Path(__file__).resolve().parent.parent / "zinfer" / "assets" / "classifier"
Call = Callable[[list[Encoded]], Any]


@dataclass(frozen=True)
class Folders:
    """Where the contestants lie."""

    group: Path
    teacher: Path
    wide: Path
    what: str  # the group is "given", "bundled" or made with "random weights"


def folders(options: argparse.Namespace) -> Folders:
    """Given, bundled or made; the wide student is always made, of as many weights as the group."""
    group, teacher, what = options.group, options.teacher, "given"
    if group is None and all((BUNDLED / own / "config.json").exists() for own in ("group", "teacher")):
        group, teacher, what = BUNDLED / "group", BUNDLED / "teacher", "bundled"
    if group is None:
        what = "random weights"
        teacher = write_teacher(options.work / "teacher", WIDTH, LAYERS, HEADS)
        group = write_students(options.work / "group", teacher, STUDENTS)
    if teacher is None:
        raise SystemExit("--teacher is wanted beside a group")
    service = open_group(group, options.threads)
    spec, own, count = service.spec, service.bank.spec, service.num_students
    service.close()
    of_layer = count * num_weights(own) / own.num_layers
    width = round((of_layer / MATRICES) ** 0.5 / spec.num_heads) * spec.num_heads
    shape = options.work / f"wide-{width}"
    of_wide = write_teacher(shape / "teacher", width, 3, spec.num_heads)
    return Folders(group, teacher, write_students(shape / "group", of_wide, 1), what)


def num_weights(student: ModelSpec) -> int:
    """Elements of a student's layers."""
    return sum(prod(shape) for shape in layer_shapes(student).values())


def settings_for(folder: Path, threads: int | None) -> Any:
    """The CPU, no probe of the disk: everything is resident."""
    flags = {
        "model": str(folder),
        "device": "cpu",
        "machine": "sim-default",
        "exact": False,
        "runtime.threads": threads or "auto",
    }
    return load_settings(None, flags=flags).settings


def open_group(folder: Path, threads: int | None) -> GroupService:
    """A group in host memory."""
    return GroupService(folder, settings_for(folder, threads))


def drawn(count: int, length: int, vocab: int, draw: random.Random) -> list[Encoded]:
    """Texts of random ids; ids from 4 on, so that none is special."""
    return [
        Encoded(tuple(draw.randrange(4, vocab) for _ in range(length)), (0,) * length, is_cut=False)
        for _ in range(count)
    ]


def largest_difference(group: GroupService, folder: Path, teacher: EncoderEngine, vocab: int) -> float:
    """Served answers beside slow ones: students one by one, the teacher's texts one by one."""
    texts = [text for length in (5, 40, 16) for text in drawn(3, length, vocab, random.Random(1))]
    slow, _ = read_group(folder, group.spec)
    batch = pack_texts(texts)
    batch = batch if group.encoder.num_segments > 1 else batch.without_segments()
    differences = []
    with torch.no_grad():
        for m in range(1, group.num_students + 1):
            rows, _ = group.answer(texts, m)
            differences.append((rows - slow.represent(batch, m)).abs().max().item())
    alone = torch.cat([teacher.answer([text])[0] for text in texts])
    differences.append((teacher.answer(texts)[0] - alone).abs().max().item())
    return max(differences)


def timed(
    calls: dict[str, Call], texts: Callable[[], list[Encoded]], cell_s: float
) -> dict[str, list[float]]:
    """Seconds of each contestant's calls, in turn, at least three after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(texts())
    end_s = time.perf_counter() + cell_s * len(calls)
    while min(map(len, seconds.values())) < 3 or time.perf_counter() < end_s:
        given = texts()
        for name, call in calls.items():
            begin_s = time.perf_counter()
            call(given)
            seconds[name].append(time.perf_counter() - begin_s)
    return seconds


def model_rows(
    calls: dict[str, Call], longest: int, vocab: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row per contestant, batch and length."""
    rows = []
    draw = random.Random(2)
    lengths, batches = ((16, 64), (1,)) if options.quick else (LENGTHS, BATCHES)
    for length in (one for one in lengths if one <= longest):
        for batch in (one for one in batches if one * length <= MOST_ROWS):
            seconds = timed(calls, partial(drawn, batch, length, vocab, draw), options.cell)
            for name, found in seconds.items():
                rows.append(
                    {
                        "part": "model",
                        "engine": name,
                        "batch": batch,
                        "tokens": length,
                        "repeats": len(found),
                        "p50_s": percentile(found, 0.5),
                        "p99_s": percentile(found, 0.99),
                        "spread_s": (min(found), max(found)),
                    }
                )
            said = ", ".join(f"{name} {1e3 * percentile(found, 0.5):.1f}" for name, found in seconds.items())
            print(f"{batch} x {length} tokens, p50 ms: {said}", flush=True)
    return rows


def latencies(
    answerer: Answerer,
    objective_s: float,
    rate: float,
    seconds: float,
    vocab: int,
    table: ServiceTable,
    least: int,
) -> tuple[list[float], dict[int, int]]:
    """Seconds from each text's arrival to its answer, in an open loop at `rate` texts/s; and who answered.

    Refused texts count as never answered.  `least` students answer at least.
    """
    draw = random.Random(3)
    arrivals, at_s = [], 0.0
    while (at_s := at_s + draw.expovariate(rate)) < seconds:
        arrivals.append((at_s, drawn(1, draw.randint(*SERVED_LENGTH), vocab, draw)[0]))
    found = [float("inf")] * len(arrivals)
    left = threading.Semaphore(0)

    def note(number: int, due_s: float, _: Future[Served]) -> None:
        found[number] = time.perf_counter() - due_s
        left.release()

    queue = int(2 * seconds * rate * SERVED_LENGTH[1]) + 10_000
    with open_scheduler(
        answerer, objective_s=objective_s, max_queue_tokens=queue, least=least, table=table
    ) as scheduler:
        begin_s, num_taken = time.perf_counter(), 0
        for number, (due_s, text) in enumerate(arrivals):
            time.sleep(max(begin_s + due_s - time.perf_counter(), 0))
            try:
                future = scheduler.submit(text)
            except Overloaded:
                continue
            num_taken += 1
            future.add_done_callback(partial(note, number, begin_s + due_s))
        for _ in range(num_taken):
            left.acquire()
        return found, scheduler.stats().answers


def capacity(
    name: str,
    run: Callable[[float], tuple[list[float], dict[int, int]]],
    objective_s: float,
    guess: float,
    tries: int,
) -> dict[str, Any]:
    """The highest rate that holds the objective, by doubling or halving and then bisection; texts/s within 8 %."""
    held, broken = 0.0, float("inf")
    tried: list[dict[str, Any]] = []
    rate = guess
    while broken > 1.08 * held and len(tried) < tries:
        found, answers = run(rate)
        p99_s = percentile(found, 0.99) or float("inf")
        tried.append({"rate": rate, "p50_s": percentile(found, 0.5), "p99_s": p99_s, "answers": answers})
        held, broken = (max(held, rate), broken) if p99_s <= objective_s else (held, min(broken, rate))
        rate = 2 * held if broken == float("inf") else (broken / 2 if not held else (held + broken) / 2)
    print(f"{name}: {held:.1f} texts/s within {1e3 * objective_s:.0f} ms", flush=True)
    return {"part": "served", "engine": name, "texts_per_s": held, "objective_s": objective_s, "tried": tried}


def served_rows(
    group: GroupService, teacher: EncoderEngine, vocab: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Capacity of the teacher, of all students, and of as many as the controller says."""
    middle = sum(SERVED_LENGTH) // 2
    one = timed({"": teacher.answer}, lambda: drawn(1, middle, vocab, random.Random(4)), 0.2)[""]
    teacher_s = percentile(one, 0.5) or 1.0
    objective_s = options.objective or max(0.05, 6 * teacher_s)
    students = measured(group, PASS_TOKENS, objective_s)
    entrants = (
        ("teacher", teacher, measured(teacher, PASS_TOKENS, objective_s), 1),
        ("all students", group, students, group.num_students),
        ("controller", group, students, 1),
    )

    def run(
        answerer: Answerer, table: ServiceTable, least: int, rate: float
    ) -> tuple[list[float], dict[int, int]]:
        return latencies(answerer, objective_s, rate, options.rate_s, vocab, table, least)

    tries = 2 if options.quick else 8
    return [
        capacity(name, partial(run, answerer, table, least), objective_s, 0.7 / teacher_s, tries)
        for name, answerer, table, least in entrants
    ]


def draw_picture(rows: list[dict[str, Any]], path: Path) -> None:
    """p50 over tokens at batch 1, with p99 as whiskers; capacities beside it."""
    from matplotlib.figure import Figure

    drawn_figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = drawn_figure.subplots(1, 2)
    for name in dict.fromkeys(row["engine"] for row in rows if row["part"] == "model"):
        own = [row for row in rows if row["part"] == "model" and row["engine"] == name and row["batch"] == 1]
        middle = [1e3 * row["p50_s"] for row in own]
        above = [1e3 * (row["p99_s"] - row["p50_s"]) for row in own]
        left.errorbar(
            [row["tokens"] for row in own], middle, yerr=[[0] * len(own), above], fmt="o-", label=name
        )
    lengths = sorted({row["tokens"] for row in rows if row["part"] == "model"})
    left.set(xlabel="tokens", ylabel="ms at batch 1, p50 to p99", xscale="log", yscale="log")
    left.set_xticks(lengths, [str(length) for length in lengths], minor=False)
    left.set_xticks([], minor=True)
    left.legend(fontsize=7)
    served = [row for row in rows if row["part"] == "served"]
    right.barh([row["engine"] for row in served], [row["texts_per_s"] for row in served])
    right.set(xlabel="texts/s with p99 within the objective")
    drawn_figure.savefig(path, dpi=110)


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of the teacher's p50 at batch 1 to the students', the range over 16 to 64 tokens; of capacities."""
    at = {
        (row["engine"], row["tokens"]): row["p50_s"]
        for row in rows
        if row["part"] == "model" and row["batch"] == 1
    }
    found = {}
    for name in dict.fromkeys(engine for engine, _ in at if engine != "teacher"):
        each = [
            at["teacher", tokens] / at[name, tokens]
            for engine, tokens in at
            if engine == name and 16 <= tokens <= 64
        ]
        found[f"teacher / {name}, least"], found[f"teacher / {name}, most"] = min(each), max(each)
    held = {row["engine"]: row["texts_per_s"] for row in rows if row["part"] == "served"}
    for name in ("all students", "controller"):
        found[f"served {name} / teacher"] = held[name] / held["teacher"] if held["teacher"] else float("nan")
    return found


def options_of() -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("group", nargs="?", type=Path)
    made.add_argument("--teacher", type=Path)
    made.add_argument("--work", type=Path, default=Path("/tmp/zinfer-bench/students"))
    made.add_argument("--results", type=Path, default=RESULTS)
    made.add_argument("--cell", type=float, default=0.3, help="seconds per contestant, batch and length")
    made.add_argument("--rate-s", type=float, default=3.0, help="seconds at each rate that is tried")
    made.add_argument("--threads", type=int, help="cores of a pass; default: all")
    made.add_argument("--objective", type=float, help="seconds; default 6 x the teacher's, at least 0.05")
    made.add_argument("--quick", action="store_true", help="does it run? two cells, two rates")
    options = made.parse_args()
    if options.quick:
        options.cell, options.rate_s, options.threads = 0.02, 0.3, 1
    return options


def main() -> None:
    """Run, print, write the record and the picture."""
    end_on_signals()
    options = options_of()
    begin_s = time.perf_counter()
    where = folders(options)
    group, wide = (open_group(one, options.threads) for one in (where.group, where.wide))
    teacher = EncoderEngine(where.teacher, settings_for(where.teacher, options.threads))
    vocab = min(group.spec.vocab_size, wide.spec.vocab_size)
    difference = largest_difference(group, where.group, teacher, vocab)
    calls: dict[str, Call] = {"teacher": teacher.answer}
    for m in range(1, group.num_students + 1):
        calls[f"{m} student{'s' * (m > 1)}"] = partial(group.answer, num_students=m)
    calls["one wide student"] = partial(wide.answer, num_students=1)
    longest = min(group.max_tokens, wide.max_tokens, teacher.max_tokens)
    rows = model_rows(calls, longest, vocab, options) + served_rows(group, teacher, vocab, options)
    found = ratios(rows)
    one = found["teacher / 1 student, most"]
    wanted = SERVED_AT_LEAST * one
    said = [f"{name}: {value:.2f}" for name, value in found.items()]
    said.append(
        f"served with the controller {found['served controller / teacher']:.2f} x the teacher, wanted at least "
        f"{SERVED_AT_LEAST} x {one:.2f} = {wanted:.2f}; largest difference of an answer {difference:.2e}"
    )
    said.append(f"{time.perf_counter() - begin_s:.0f} s in all")
    print("\n".join(said))
    record = Record(
        bench="students_latency",
        config={
            "group": where.group.name if options.group else where.what,
            "teacher_layers": teacher.spec.num_layers,
            "width": group.spec.model_dim,
            "students": group.num_students,
            "layers": group.bank.spec.num_layers,
            "student_width": asdict(width_of(group.bank.spec)),
            "wide": wide.spec.model_dim,
            "threads": torch.get_num_threads(),
            "quick": options.quick,
        },
        repeats=min(row["repeats"] for row in rows if row["part"] == "model"),
        median=found,
        spread={},
        limit={
            "served_at_least": wanted,
            "layers_ratio": teacher.spec.num_layers / group.bank.spec.num_layers,
        },
        baseline={"engine": "teacher"},
        answer_matches=difference,
        comparable=not options.quick,
        rows=rows,
        notes=said,
    )
    path = record.write(options.results)
    print(path)
    try:
        draw_picture(rows, path.with_suffix(".png"))
    except ModuleNotFoundError:
        print("no picture: matplotlib is not installed")
    for engine in (group, wide, teacher):
        engine.close()


if __name__ == "__main__":
    main()
