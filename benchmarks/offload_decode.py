"""Decode at batch 1, engines side by side.  In: a checkpoint, a memory budget.  Out: one record, a table.

usage: offload_decode.py [--model DIR | --shape NAME] [--work DIR] [--budget 40] [--rounds N] [--quick] ...

Prompt of 32 token ids, 16 tokens, greedy.  Streamed rows run in a memory group of budget + 700 MiB with caches
dropped once before each engine; resident rows without a limit.  Every row's answer is checked against transformers
in float32, teacher-forced.  zinfer runs twice: on the published folder, which is what ratios are of, and from a store
that `zinfer shard --weights lossless` made of it, in the same memory; "disk limit" is that of the published bytes.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from conditions import HEADROOM
from contest import (
    RESIDENT,
    STREAMED,
    Contest,
    Engine,
    Row,
    checkpoint,
    doctor,
    engines,
    prepare,
    random_prompts,
)
from harness import MIB, Record, end_on_signals, summary
from roofs import Roofs, add_model_options, measure, products_now

OURS = ("zinfer", RESIDENT)  # what is held to the products
TARGETS = {  # what the project wants of these rows: engine -> (mode, at least this many times longer than zinfer)
    "accelerate": (STREAMED, 3.5),
    "airllm": (STREAMED, 8.0),
    "transformers": (RESIDENT, 2.0),
    "llama.cpp no-mmap": (RESIDENT, 1.0),
}


def parse(doc: str | None, tokens: int, modes: str) -> argparse.Namespace:
    """The command line, `--quick` applied.  `tokens`, the number of passes or tokens, and `modes` are defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--budget", type=float, default=40.0, help="host memory, percent of the checkpoint")
    parser.add_argument(
        "--tokens", type=int, default=tokens, help="tokens to generate, or passes of a prefill"
    )
    parser.add_argument(
        "--rounds", type=int, default=1, help="how often every engine runs, in alternating order"
    )
    parser.add_argument(
        "--engines", default="", help="only these, by a part of the name, separated by commas"
    )
    parser.add_argument("--modes", default=modes, help="streamed, resident, or both")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds after which an engine is ended")
    parser.add_argument("--quick", action="store_true", help="fewer tokens: does everything run?")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.rounds = min(options.tokens, 5), 1
    return options


def chosen(all_engines: list[Engine], wanted: str) -> list[Engine]:
    """The engines whose names contain one of the wanted words; all if there are none."""
    words = [word for word in wanted.split(",") if word]
    return [engine for engine in all_engines if not words or any(word in engine.name for word in words)]


def compete(options: argparse.Namespace, kind: str, prompts: tuple[int, int]) -> tuple[Contest, Roofs]:
    """Prepare, measure limits, run the reference and every engine; prints a line per row.  `prompts`: count, length."""
    end_on_signals()
    model = checkpoint(options)
    config = json.loads((model / "config.json").read_text())
    contestants = chosen(engines(model, options.work, config["vocab_size"]), options.engines)
    broken = prepare(model, options.work, contestants)
    profile = doctor(model, options.work, 5.0 if options.quick else 20.0)
    print(f"zinfer doctor: disk {profile['disk_read']['bytes_per_s'] / 1e9:.2f} GB/s", flush=True)
    roofs = measure(model, options.work, repeats=3)
    contest = Contest(
        model=model,
        work=options.work,
        kind=kind,
        prompts=random_prompts(config["vocab_size"], *prompts),
        steps=options.tokens,
        budget_bytes=int(roofs.checkpoint_bytes * options.budget / 100),
        timeout_s=options.timeout,
    )
    print(
        f"{model.name}: {roofs.checkpoint_bytes / 1e9:.2f} GB, budget {contest.budget_bytes / MIB:.0f} MiB",
        flush=True,
    )
    contest.set_reference()
    for engine in contestants:
        for mode in engine.modes if engine.name in broken else ():
            contest.rows[engine.name, mode] = Row(engine.name, mode, error=broken[engine.name])
    for engine, mode in contest.turns(contestants, tuple(options.modes.split(",")), options.rounds):
        with products_beside(roofs, model, options.work) if (engine.name, mode) == OURS else nullcontext():
            row = contest.enter(engine, mode)  # one that failed once stays out
        print(line(contest, row), flush=True)
    return contest, roofs


@contextmanager
def products_beside(roofs: Roofs, model: Path, work: Path) -> Iterator[None]:
    """Time the products right before and right after a run."""
    roofs.beside.append(products_now(model, work, 3)["products"])
    yield
    roofs.beside.append(products_now(model, work, 3)["products"])


def line(contest: Contest, row: Row) -> str:
    """One row for people."""
    head = f"{row.mode:9} {row.engine:18}"
    if row.error:
        return f"{head} no figure: {row.error}"
    seen = summary(row.pass_s)
    if not row.is_right:
        return f"{head} no figure: wrong answer ({row.answer})"
    low, high = seen["spread"]
    ratio = contest.ratio(row)
    told = f"{ratio:5.2f} x zinfer" if ratio else "" if row.comparable else "not comparable"
    difference = row.answer["largest_difference"]
    return (
        f"{head} {seen['median']:7.3f} s [{low:.3f} .. {high:.3f}]  first {min(row.first_token_s):6.2f} s  "
        f"rss {row.peak_rss_bytes / MIB:5.0f} MiB  logits within {difference:.3f}  {told}"
        + (f"  {row.over_limit:.2f} x disk limit" if row.over_limit else "")
    )


def limits(contest: Contest, roofs: Roofs) -> dict[str, Any]:
    """The measured limits that belong beside the figures, and zinfer's distance from each."""
    streamed, resident = (contest.rows.get(("zinfer", mode)) for mode in (STREAMED, RESIDENT))
    disk_s = streamed.limit_s if streamed else None
    resident_s = resident.median if resident else None
    bound = max((part for part in (disk_s, resident_s) if part is not None), default=None)
    rate = (streamed.disk_rate if streamed else None) or roofs.read_rate
    load_s = roofs.checkpoint_bytes / rate if rate else None
    found: dict[str, Any] = {
        "read_bytes_per_s_at_first": summary(roofs.read_rates),
        "read_bytes_per_s": streamed.disk_rate if streamed else None,  # beside zinfer's runs
        "streamed_disk_s": disk_s,
        "streamed_s": bound,
        "streamed_binding": "disk" if bound == disk_s else "compute",
        "load_all_s": load_s,
        "resident_s": roofs.weights_once_s,
        "resident_products_s": roofs.products,
        "resident_products_beside_s": roofs.beside,
        "weight_bytes": roofs.weight_bytes,
    }
    if streamed and streamed.median and bound:
        found["streamed_over_limit"] = streamed.median / bound
        found["first_token_over_load"] = min(streamed.first_token_s) / load_s
    if resident_s:
        found["resident_over_limit"] = resident_s / roofs.weights_once_s
    return found


def record(options: argparse.Namespace, contest: Contest, roofs: Roofs, bench: str) -> Record:
    """The record of all rows, zinfer's figures on top."""
    ours = {mode: contest.rows.get(("zinfer", mode)) for mode in (STREAMED, RESIDENT)}
    present = {mode: row for mode, row in ours.items() if row is not None and row.median is not None}
    baseline = {
        f"{row.engine}, {row.mode}": {"pass_s": row.median, "ratio": contest.ratio(row)}
        for row in contest.rows.values()
        if row.engine != "zinfer"
    }
    return Record(
        bench=bench,
        config={
            "model": contest.model.name,
            "dtype": "bfloat16",
            "prompts": [len(contest.prompts), len(contest.prompts[0])],
            "steps": contest.steps,
            "rounds": options.rounds,
            "budget_bytes": contest.budget_bytes,
            "group_bytes": contest.budget_bytes + HEADROOM,
            "sampling": "greedy",
            "caches": "dropped once before each streamed engine, not between passes",
            "threads": "each engine's default",
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        },
        repeats=max((len(row.pass_s) for row in present.values()), default=0),
        median={f"{mode}_pass_s": row.median for mode, row in present.items()},
        spread={f"{mode}_pass_s": summary(row.pass_s)["spread"] for mode, row in present.items()},
        limit=limits(contest, roofs),
        baseline=baseline,
        answer_matches=bool(present) and all(row is None or row.is_right for row in ours.values()),
        comparable=all(row.comparable for row in contest.rows.values()),
        rows=[row.to_dict() for row in contest.rows.values()],
        notes=notes(contest),
    )


def notes(contest: Contest) -> list[str]:
    """What a reader must know: engines without a figure, targets met or missed, groups that could not be made."""
    said = [f"{row.engine}, {row.mode}: {row.error}" for row in contest.rows.values() if row.error]
    said += [
        f"not comparable: {why}" for why in dict.fromkeys(row.why for row in contest.rows.values()) if why
    ]
    for name, (mode, wanted) in TARGETS.items() if contest.kind == "decode" else ():
        row = contest.rows.get((name, mode))
        ratio = contest.ratio(row) if row else None
        if ratio is not None:
            said.append(
                f"{name}, {mode}: {ratio:.2f} x zinfer, {'at least' if ratio >= wanted else 'NOT'} {wanted} x"
            )
            lossless = contest.rows.get(("zinfer lossless", mode))
            ours = contest.ratio(lossless) if lossless else None
            if ours is not None:
                said.append(f"{name}, {mode}: {ratio / ours:.2f} x zinfer from a lossless store")
    return said


def main() -> None:
    """Run, print, write the record."""
    options = parse(__doc__, tokens=16, modes=f"{STREAMED},{RESIDENT}")
    contest, roofs = compete(options, "decode", (1, 32))
    written = record(options, contest, roofs, "offload_decode")
    for name, value in written.limit.items():
        print(f"  limit {name}: {value}")
    print("\n".join(f"  {note}" for note in written.notes))
    print(Path(written.write(options.results)))


if __name__ == "__main__":
    main()
