"""Engines side by side on the same weights and token ids.  In: a checkpoint, a kind of pass.  Out: one row per engine.

A row is "streamed" (the weights do not fit: budget and a memory group around the process) or "resident".  Rows are
run one after another, never at once; with several rounds the order is turned round each time, and passes of all
rounds are pooled.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from answer import BF16_GAP, compare, stream_error
from conditions import ENGINES, PROFILE, Conditions, disk_pass_s
from harness import ROOT, made_store, run_child, summary

WARM_UP = 2  # decode passes that are thrown away
STREAMED, RESIDENT = "streamed", "resident"


@dataclass(frozen=True, slots=True)
class Engine:
    """A runner and what it is given; `modes` are those that it can be asked for."""

    name: str
    script: str
    modes: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    store: Path | None = None  # which it runs from, in the place of the published folder


def engines(model: Path, work: Path, vocab: int) -> list[Engine]:
    """All engines with their best documented settings; files they need lie in `work`."""
    gguf = {"gguf": str(work / "model.gguf"), "vocab_size": vocab, "batch": 2048}
    profile, both = {"machine": str(work / PROFILE)}, (STREAMED, RESIDENT)
    return [
        Engine("zinfer", "run_zinfer.py", both, profile),
        Engine("zinfer lossless", "run_zinfer.py", both, profile, work / f"{model.name}-lossless"),
        Engine("accelerate", "run_accelerate.py", (STREAMED,), {"folder": str(work / "offload")}),
        Engine("airllm", "run_airllm.py", (STREAMED,), {"folder": str(work / "airllm")}),
        Engine("llama.cpp mmap", "run_llamacpp.py", (STREAMED, RESIDENT), gguf | {"load_mode": "auto"}),
        Engine("llama.cpp no-mmap", "run_llamacpp.py", (STREAMED, RESIDENT), gguf | {"load_mode": "none"}),
        Engine("transformers", "run_transformers.py", (RESIDENT,)),
    ]


@dataclass(slots=True)
class Row:
    """One engine in one mode, over all rounds.  `error` says why there is no figure, `why` why no ratio."""

    engine: str
    mode: str
    comparable: bool = True
    why: str = ""
    error: str = ""
    pass_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    read_bytes: list[int] = field(default_factory=list)
    reported_read_bytes: float | None = None
    peak_rss_bytes: int = 0
    import_rss_bytes: int = 0
    group_peak_bytes: int | None = None
    caches: str = ""
    disk_rates: list[tuple[float, ...]] = field(default_factory=list)  # bytes/s before and after each run
    limit_s: float | None = None  # what the disk allows at the mean of these rates; None: resident
    answer: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_right(self) -> bool:
        """Whether there is a figure, and the answer behind it is right."""
        return not self.error and bool(self.answer.get("matches")) and not self.answer.get("stream_error")

    @property
    def median(self) -> float | None:
        """Median seconds of a steady pass; None without a right answer: a wrong run has no time."""
        return summary(self.pass_s)["median"] if self.is_right else None

    def to_dict(self) -> dict[str, Any]:
        """For the record."""
        told = {"is_right": self.is_right, "over_limit": self.over_limit, "disk_rate": self.disk_rate}
        return asdict(self) | summary(self.pass_s) | told

    @property
    def disk_rate(self) -> float | None:
        """Mean bytes per second of the disk beside this row's runs."""
        rates = [rate for beside in self.disk_rates for rate in beside]
        return fmean(rates) if rates else None

    @property
    def over_limit(self) -> float | None:
        """Seconds of a pass over what the disk allowed then; None where either is not known."""
        return self.median / self.limit_s if self.median and self.limit_s else None


@dataclass(slots=True)
class Contest(Conditions):
    """One model, one kind of pass, and the rows so far."""

    kind: str = "decode"
    prompts: list[list[int]] = field(default_factory=list)
    steps: int = 16
    forced: list[list[int]] | None = None
    reference: np.ndarray | None = None
    rows: dict[tuple[str, str], Row] = field(default_factory=dict)

    @property
    def job(self) -> dict[str, Any]:
        """What every engine is asked for."""
        return {"kind": self.kind, "prompts": self.prompts, "steps": self.steps, "forced": self.forced}

    def set_reference(self) -> None:
        """Tokens and logits of the oracle: transformers in float32, all in memory.  Raises RuntimeError without it."""
        job = self.job | {"dtype": "float32", "steps": self.steps if self.kind == "decode" else 1}
        child, result = self.ask("reference", "run_transformers.py", job, None)
        if result is None:
            raise RuntimeError(f"the reference cannot be run: {child.why}")
        self.reference = np.load(result["logits"])
        self.forced = [result["argmax"]] if self.kind == "decode" else None

    def enter(self, engine: Engine, mode: str) -> Row:
        """Run one engine once more in one mode and add what it saw to its row."""
        row = self.rows.setdefault((engine.name, mode), Row(engine.name, mode))
        if row.error:
            return row
        name, job = f"{engine.name}.{mode}", self.job | {"options": engine.options}
        if engine.store is not None:
            job["model"] = str(engine.store)
        seen = self.run(name, engine.script, job, limited=mode == STREAMED)
        if seen.why:
            row.comparable, row.why = False, seen.why
        if seen.disk_rates:
            row.disk_rates.append(tuple(seen.disk_rates))
            is_packed = seen.result is not None and seen.result["facts"].get("is_packed", False)
            row.limit_s = disk_pass_s(self.model, self.budget_bytes, [row.disk_rate], is_packed=is_packed)
        row.caches = seen.caches
        row.peak_rss_bytes = max(row.peak_rss_bytes, seen.child.peak_rss_bytes)
        row.group_peak_bytes = seen.child.group_peak_bytes
        row.error, result = seen.error, seen.result
        if result is None:
            return row
        self.judge(row, result)
        warm_up = WARM_UP if self.kind == "decode" and len(result["pass_s"]) > WARM_UP else 1
        row.pass_s += result["pass_s"][warm_up:]
        row.read_bytes += result["read_bytes"][warm_up:]
        row.first_token_s.append(result["first_token_s"])
        row.import_rss_bytes = result["import_rss_bytes"]
        row.reported_read_bytes = result["reported_read_bytes"]
        row.settings, row.versions, row.facts = result["settings"], result["versions"], result["facts"]
        return row

    def judge(self, row: Row, result: dict[str, Any]) -> None:
        """Compare a result with the reference; the worst of all rounds stays in the row."""
        logits = np.load(result["logits"]) if result["logits"] else None
        verdict = compare(self.reference, logits, log_probabilities=result["log_softmax"])
        error = ""
        if self.forced and result["tokens"]:
            error = stream_error(self.reference, self.forced[0], result["tokens"])
        answer = asdict(verdict) | {"gap": BF16_GAP, "stream_error": error}
        if not row.answer or row.is_right:
            row.answer = answer

    @staticmethod
    def turns(contestants: list[Engine], modes: tuple[str, ...], count: int) -> Iterator[tuple[Engine, str]]:
        """All engines in all modes, `count` times, in alternating order."""
        turns = [(engine, mode) for mode in modes for engine in contestants if mode in engine.modes]
        for number in range(count):
            yield from turns if number % 2 == 0 else reversed(turns)

    def ratio(self, row: Row) -> float | None:
        """How many times longer a pass takes than zinfer's in the same mode; None where it may not be formed."""
        ours = self.rows.get(("zinfer", row.mode))
        if ours is None or ours.median is None or row.median is None:
            return None
        return row.median / ours.median if row.comparable and ours.comparable else None


def doctor(model: Path, work: Path, seconds: float = 20.0) -> dict[str, Any]:
    """Let zinfer measure this machine and keep the profile in `work` for its rows; nothing is saved elsewhere.

    It measures disk and products, never a pass of this model.  Raises RuntimeError if it fails.
    """
    command = [sys.executable, "-m", "zinfer", "doctor", str(model), "--seconds", str(seconds)]
    log = work / "doctor.log"
    child = run_child([*command, "--no-save", "--json"], log)
    if child.returncode:
        raise RuntimeError(f"zinfer doctor failed: {child.why}")
    profile = json.loads(log.read_text().strip().splitlines()[-1])  # a GPU's is longer than the log's end
    (work / PROFILE).write_text(json.dumps(profile))
    return profile


def prepare(model: Path, work: Path, contestants: list[Engine]) -> dict[str, str]:
    """What engines convert once per model, outside of any measurement; engine's name -> why it failed."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "offload").mkdir(exist_ok=True)
    failed: dict[str, str] = {}
    gguf, split = work / "model.gguf", work / "airllm"
    names = {engine.script for engine in contestants}
    steps = {
        "run_llamacpp.py": (gguf, [str(ROOT / "benchmarks" / "write_gguf.py"), str(model), str(gguf)]),
        "run_airllm.py": (
            split / "ready",
            [str(ENGINES / "run_airllm.py"), "--split", str(model), str(split)],
        ),
    }
    for script, (product, arguments) in steps.items():
        if script not in names or product.exists():
            continue
        split.mkdir(exist_ok=True)
        child = run_child([sys.executable, *arguments], work / f"prepare-{script}.log", timeout_s=600)
        if child.returncode:
            why = f"could not convert the model: {child.why}"
            failed |= {engine.name: why for engine in contestants if engine.script == script}
        elif product.parent == split:
            product.touch()
    for engine in contestants:
        if engine.store is not None:
            try:
                made_store(model, engine.store, "lossless", work / "shard-lossless.log", 600)
            except RuntimeError as error:
                failed[engine.name] = str(error)
    return failed


def checkpoint(options: argparse.Namespace) -> Path:
    """The folder that was named, or a random checkpoint at `--shape` in the work folder, made if it is not there.

    `options.folder`, where there is one, is what the random one is called.
    """
    if options.model:
        return Path(options.model).resolve()
    folder = options.work / (getattr(options, "folder", None) or options.shape)
    if not (folder / "config.json").exists():
        options.work.mkdir(parents=True, exist_ok=True)
        tool = [sys.executable, str(ROOT / "tools" / "make_checkpoint.py")]
        child = run_child([*tool, "--shape", options.shape, "--out", str(folder)], options.work / "make.log")
        if child.returncode:
            raise RuntimeError(f"the checkpoint cannot be made: {child.why}")
    return folder


def random_prompts(vocab: int, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Token ids of prompts, the same for every engine; the first few ids are left to special tokens."""
    draw = random.Random(seed)
    return [[draw.randrange(300, vocab) for _ in range(length)] for _ in range(count)]
