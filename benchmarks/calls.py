"""zinfer, call after call, on a checkpoint whose answers are known.  In: calls.  Out: what each took, checked.

The benchmarks of throughput share this: one checkpoint, one way to run it inside its conditions, one check of every
token of every request.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from conditions import PROFILE, Conditions, Seen, checkpoint_bytes, disk_pass_s, packs
from contest import checkpoint, doctor
from harness import MIB, end_on_signals
from known import FACTS, Known, read_known, rewrite
from roofs import add_model_options


@dataclass(slots=True)
class Bench:
    """What a benchmark of throughput starts from."""

    conditions: Conditions
    known: Known
    options: argparse.Namespace

    def describe(self) -> dict[str, Any]:
        """For the record's config."""
        return {
            "model": self.conditions.model.name,
            "dtype": "bfloat16",
            "checkpoint_bytes": checkpoint_bytes(self.conditions.model),
            "budget_bytes": self.conditions.budget_bytes,
            "sampling": "greedy",
            "exact": False,
            "caches": "dropped once before each run",
        }


@dataclass(slots=True)
class Call:
    """Prompts that are given to the engine together."""

    prompts: list[list[int]]
    max_tokens: int
    ignore_eos: bool = True
    outputs: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0
    passes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that came out."""
        return sum(map(len, self.outputs))

    def decode(self, settled: int = 1) -> list[dict[str, Any]]:
        """Passes without prompt rows, the first `settled` of them left out."""
        return [done for done in self.passes if done["is_decode"] and not done["is_first"]][settled:]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that all of them have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(made)
    made.add_argument("--budget", type=float, default=40.0, help="host memory, percent of the checkpoint")
    made.add_argument("--timeout", type=float, default=700.0, help="seconds after which a run is ended")
    made.add_argument("--doctor", type=float, default=15.0, help="seconds to measure the machine for")
    made.add_argument("--quick", action="store_true", help="a few passes of everything: does it run?")
    return made


def start(options: argparse.Namespace) -> Bench:
    """The known checkpoint, made if it is not there, and a fresh profile of this machine."""
    end_on_signals()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.model is None:
        model = options.work / f"{options.shape}-known"
        if not (model / FACTS).exists():
            made = argparse.Namespace(**vars(options) | {"folder": model.name})
            rewrite(checkpoint(made))
    else:
        model = Path(options.model).resolve()
    budget = round(checkpoint_bytes(model) * options.budget / 100)
    profile = doctor(model, options.work, options.doctor)
    print(
        f"{model.name}: {checkpoint_bytes(model) / 1e9:.2f} GB, budget {budget / MIB:.0f} MiB, "
        f"disk {profile['disk_read']['bytes_per_s'] / 1e9:.2f} GB/s",
        flush=True,
    )
    return Bench(Conditions(model, options.work, budget, options.timeout), read_known(model), options)


def run(bench: Bench, name: str, calls: Sequence[Call], runtime: dict[str, Any] | None = None) -> Seen:
    """Run the calls in one process of zinfer inside the conditions; what came of each is written into it."""
    job = job_of(bench, name, calls, runtime or {})
    return fill(calls, bench.conditions.run(name, "run_zinfer.py", job, limited=True))


def job_of(bench: Bench, name: str, calls: Sequence[Call], runtime: dict[str, Any]) -> dict[str, Any]:
    """What `run_zinfer.py` is told: the calls, this machine, and where to write the prediction."""
    asked = [
        {"prompts": call.prompts, "max_tokens": call.max_tokens, "ignore_eos": call.ignore_eos}
        for call in calls
    ]
    return {
        "kind": "calls",
        "prompts": [],
        "steps": 0,
        "options": {
            "calls": asked,
            "runtime": runtime,
            "machine": str(bench.conditions.work / PROFILE),
            "prediction": str(bench.conditions.work / f"{name}.prediction.json"),
        },
    }


def fill(calls: Sequence[Call], seen: Seen) -> Seen:
    """Write what came of each call into it."""
    if seen.result is not None:
        for call, found in zip(calls, seen.result["facts"]["calls"], strict=True):
            call.outputs, call.seconds, call.passes = found["outputs"], found["seconds"], found["passes"]
    return seen


def num_wrong(known: Known, calls: Iterable[Call]) -> int:
    """Requests whose tokens are not those that must come, of all calls."""
    wrong = 0
    for call in calls:
        wanted = [
            known.follow(prompt, call.max_tokens, ignore_eos=call.ignore_eos) for prompt in call.prompts
        ]
        wrong += sum(came != want for came, want in zip(call.outputs, wanted, strict=True))
    return wrong


def turns(names: tuple[str, str], repeats: int) -> list[str]:
    """A B B A A B ...: drift falls on both alike."""
    return [name for at in range(repeats) for name in names[:: 1 if at % 2 == 0 else -1]]


def limit_s(bench: Bench, seen: Seen, compute_s: float, kv: int) -> dict[str, Any]:
    """What bounds a pass: the disk at the rate beside this run, or the products alone."""
    at, is_packed = bench.conditions, seen.result is not None and packs(seen.result["facts"]["plan"])
    disk_s = disk_pass_s(at.model, at.budget_bytes, seen.disk_rates, kv, is_packed=is_packed) or 0.0
    return {
        "disk_s": disk_s,
        "compute_s": compute_s,
        "limit_s": max(disk_s, compute_s),
        "binding": "disk" if disk_s >= compute_s else "compute",
        "kv_bytes": kv,
        "read_bytes_per_s": fmean(seen.disk_rates) if seen.disk_rates else None,
    }


def median_s(passes: Sequence[dict[str, Any]]) -> float | None:
    """Median seconds of passes; None of none."""
    return median(done["seconds"] for done in passes) if passes else None
