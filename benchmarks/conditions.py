"""The conditions a run is held to.  In: a checkpoint, a budget, a runner's job.  Out: its result, and how it was got.

Every comparison uses these: one memory group of budget + 700 MiB around the process, caches dropped once before it,
and the disk's rate taken right before and right after it, since a shared disk drifts by tens of percent.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
from cgroup import MemoryGroup, NoGroupError, drop_caches, make
from engines.turn import Order, options_of, order_of
from harness import GIB, MIB, ROOT, Child, direct_read_rate, run_child

HEADROOM = (
    700 * MIB
)  # what a Python process with its libraries and a little page cache may take above the budget
ENGINES = ROOT / "benchmarks" / "engines"
PROFILE = "machine.json"
_PROBE_BYTES = 2 * GIB
PACKED_SHARE = 0.755  # of bf16 weights packed without loss


@dataclass(slots=True)
class Seen:
    """One run of one runner.  `result` None: it failed, and `error` says why.

    `why` not empty: the conditions were not held, no ratio may be formed.  `disk_rates` are bytes per second before
    and after the run, [] where nothing was limited or direct reads are refused.
    """

    child: Child
    result: dict[str, Any] | None
    why: str = ""
    caches: str = ""
    disk_rates: list[float] | None = None

    @property
    def error(self) -> str:
        """Why there is no result; empty if there is one."""
        return "" if self.result is not None else self.child.why


@dataclass(frozen=True, slots=True)
class Asked:
    """One runner of several that take turns: it makes `passes` a turn, and has `weight` turns of a round."""

    name: str
    script: str
    job: dict[str, Any]
    passes: int
    weight: int


@dataclass(slots=True)
class Conditions:
    """One model and the memory it may take."""

    model: Path
    work: Path
    budget_bytes: int
    timeout_s: float = 300.0

    def run(self, name: str, script: str, job: dict[str, Any], *, limited: bool) -> Seen:
        """Run one runner with a job, `limited` to the budget or not."""
        if not limited:
            child, result = self.ask(name, script, job, None)
            return Seen(child, result)
        before = self.disk_rate()
        caches = drop_caches()
        with self.group() as (group, why):
            child, result = self.ask(name, script, job | {"budget_bytes": self.budget_bytes}, group)
        rates = [rate for rate in (before, self.disk_rate()) if rate is not None]
        why = why or ("" if caches == "dropped" else f"caches {caches}")
        return Seen(child, result, why, caches, rates)

    def run_by_turns(self, folder: Path, asked: Sequence[Asked]) -> dict[str, Seen]:
        """Several runners at once, each limited to the budget, of which one works at a time; by name.

        The disk is measured before and after all of them.  Whoever ends makes room for the others.
        """
        folder.mkdir(parents=True, exist_ok=True)
        order = Order(folder, order_of([(each.name, each.weight) for each in asked]))
        order.begin()
        before, caches = self.disk_rate(), drop_caches()
        fault = "" if caches == "dropped" else f"caches {caches}"
        alone = replace(self, timeout_s=self.timeout_s * len(asked))

        def one(each: Asked) -> Seen:
            turn = {"turn": options_of(order, each.name, each.passes)}
            job = each.job | {"options": each.job["options"] | turn, "budget_bytes": self.budget_bytes}
            try:
                with self.group() as (group, why):
                    child, result = alone.ask(f"{folder.name}-{each.name}", each.script, job, group)
            finally:
                order.leave(each.name)
            return Seen(child, result, why or fault, caches)

        with ThreadPoolExecutor(len(asked)) as threads:
            try:
                seen = list(threads.map(one, asked))
            except BaseException:  # or the threads would wait for their children
                for child in psutil.Process().children(recursive=True):
                    with suppress(psutil.Error):
                        child.kill()
                raise
        rates = [rate for rate in (before, self.disk_rate()) if rate is not None]
        return {one.name: replace(found, disk_rates=rates) for one, found in zip(asked, seen, strict=True)}

    def ask(
        self, name: str, script: str, job: dict[str, Any], group: MemoryGroup | None
    ) -> tuple[Child, dict[str, Any] | None]:
        """Start the runner; its result is None if it failed."""
        stem = f"{self.work}/{name.replace(' ', '-')}"
        job_file, result_file, log = (Path(f"{stem}.{kind}") for kind in ("job.json", "result.json", "log"))
        result_file.unlink(missing_ok=True)
        job_file.write_text(json.dumps({"model": str(self.model), "logits": f"{stem}.npy"} | job))
        runner = [sys.executable, str(ENGINES / script), str(job_file), str(result_file)]
        child = run_child(runner, log, group, self.timeout_s)
        done = child.returncode == 0 and result_file.exists()
        return child, json.loads(result_file.read_text()) if done else None

    @contextmanager
    def group(self) -> Iterator[tuple[MemoryGroup | None, str]]:
        """A group of budget + headroom, or None and why there is none or why it limits nothing."""
        try:
            group = make(self.budget_bytes + HEADROOM)
        except NoGroupError as error:
            yield None, str(error)
            return
        holds_all = checkpoint_bytes(self.model) <= self.budget_bytes + HEADROOM
        try:
            yield group, "the group holds the whole checkpoint" if holds_all else ""
        finally:
            group.remove()

    def disk_rate(self) -> float | None:
        """Bytes per second of direct reads of the very files, now."""
        return direct_read_rate(weight_files(self.model), _PROBE_BYTES)


def weight_files(model: Path) -> list[Path]:
    """The checkpoint's data files."""
    return sorted(model.glob("*.safetensors"))


def planned_memory(machine: dict[str, Any]) -> dict[str, Any]:
    """What a plan took finding memory for: the rate where it is fresh, and what of it was still there, by its look."""
    return {"fresh_bytes_per_s": machine["fresh_bytes_per_s"]} | machine["there"]


def checkpoint_bytes(model: Path) -> int:
    """Bytes of all data files."""
    return sum(file.stat().st_size for file in weight_files(model))


def embedding_bytes(model: Path) -> int:
    """Bytes of the input embedding, of which a pass reads a few rows."""
    config = json.loads((model / "config.json").read_text())
    return config["vocab_size"] * config["hidden_size"] * 2


def streamed_bytes(
    model: Path, budget_bytes: int, kv_bytes: int = 0, kept_share: float = 0.85, *, is_packed: bool = False
) -> int:
    """What a pass must read: all but the embedding and the share of the budget, less the KV, that keeps weights.

    Where those are packed in memory without loss the same bytes keep more of them.
    """
    kept = max(kept_share * budget_bytes - kv_bytes, 0) / (PACKED_SHARE if is_packed else 1)
    return max(round(checkpoint_bytes(model) - embedding_bytes(model) - kept), 0)


def disk_pass_s(
    model: Path, budget_bytes: int, rates: list[float] | None, kv_bytes: int = 0, *, is_packed: bool = False
) -> float | None:
    """Seconds of a pass that only reads, at the mean of `rates`; None where the disk's rate is not known."""
    if not rates:
        return None
    return streamed_bytes(model, budget_bytes, kv_bytes, is_packed=is_packed) / fmean(rates)


def packs(plan: dict[str, Any]) -> bool:
    """Whether a plan, as a dict, packs what stays: then its limit is that of fewer bytes."""
    return bool(plan["placement"].get("packed"))
