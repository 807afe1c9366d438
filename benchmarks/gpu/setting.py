"""What the blocks on a GPU share.  In: a command line.  Out: a checkpoint whose answers are known, runs, records.

A block is a program of its own that ends with its record.  `--dry-run` carries out all of it on any machine: a tiny
model, the simulated device, one repeat; its records are marked and go to the work folder, never to results/.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2])
)  # the tree that is measured lies around this file
sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parent / "engines"))

from conditions import Conditions, checkpoint_bytes
from harness import GIB, MIB, RESULTS, ROOT, Child, Record, machine_facts, package_versions, run_child
from known import FACTS, Known, read_known, rewrite

HERE = Path(__file__).resolve().parent
PROFILE, PREDICTIONS = "machine.json", "predictions.jsonl"
PEERS = ("accelerate", "transformers", "airllm", "flexgen", "deepspeed", "triton")
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2051,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 1,
    "bos_token_id": 0,
}


@dataclass(frozen=True, slots=True)
class Size:
    """How much a block does: in earnest, or to see that all of it runs."""

    requests: int  # of the known checkpoint
    outputs: tuple[int, int]
    tokens: int  # of a decode run
    prompt: int
    prefill: tuple[int, int]  # prompts, tokens each
    budget: int  # device memory where it is capped
    slack: int  # beside resident weights: slots and activations
    copies: tuple[int, ...]  # bytes
    repeats: int


EARNEST = Size(
    128, (8, 64), 24, 128, (32, 512), 8 * GIB, GIB, tuple(n * MIB for n in (1, 8, 64, 256, 512)), 20
)
DRY = Size(8, (2, 4), 4, 16, (4, 16), 3 * MIB, 9 * MIB // 4, (MIB,), 1)


@dataclass(slots=True)
class Bench:
    """One block's surroundings."""

    name: str
    options: argparse.Namespace
    began_s: float

    @property
    def is_dry(self) -> bool:
        """Whether nothing is measured."""
        return bool(self.options.dry_run)

    @property
    def size(self) -> Size:
        """How much is done."""
        return DRY if self.is_dry else EARNEST

    @property
    def work(self) -> Path:
        """Where everything is made."""
        return Path(self.options.work)

    @property
    def device(self) -> str:
        """What zinfer computes on."""
        return "sim" if self.is_dry else "cuda:0"

    @property
    def torch_device(self) -> str:
        """The same for torch."""
        return "cpu" if self.is_dry else "cuda:0"

    @property
    def left_s(self) -> float:
        """Seconds until the block should have ended."""
        return float(self.options.seconds) - (time.perf_counter() - self.began_s)

    def cap(self, model: Path) -> int:
        """Device bytes for a model whose weights shall not fit: at most half of them."""
        return self.size.budget if self.is_dry else min(self.size.budget, checkpoint_bytes(model) // 2)

    def conditions(self, model: Path) -> Conditions:
        """How other engines are run: in processes of their own."""
        return Conditions(model, self.work, self.size.budget, max(self.left_s, 30.0))

    def checkpoint(self, shape: str = "") -> Path:
        """A random checkpoint of the shape whose continuations are known, made where it is not there yet."""
        shape, layers = shape or self.options.shape, self.options.layers
        name = f"{shape}-known" if layers is None else f"{shape}-of-{layers}-layers-known"
        folder = self.work / ("tiny-known" if self.is_dry else name)
        if not (folder / FACTS).exists():
            config = TINY if self.is_dry else shape_config(shape, layers)
            self.need_disk(folder, 0 if self.is_dry else weight_bytes(config))
            write(config, folder)
            rewrite(folder, self.size.requests, (16, 128) if not self.is_dry else (4, 8), self.size.outputs)
        return folder

    def known(self, folder: Path) -> Known:
        """What it must say."""
        return read_known(folder)

    def need_disk(self, folder: Path, nbytes: int) -> None:
        """Raises RuntimeError where there is no room: a block says so, and the next one goes on."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = os.statvfs(folder.parent)
        have = free.f_bavail * free.f_frsize
        if have < nbytes * 1.02 + GIB // 4:
            raise RuntimeError(
                f"{folder.name} needs {nbytes / 1e9:.1f} GB of disk, {have / 1e9:.1f} GB are free"
            )

    def profile(self, model: Path) -> Path:
        """The machine profile that plans are made from: measured once per run of the blocks."""
        path = self.work / PROFILE
        if path.exists():
            return path
        if self.is_dry:
            from zinfer.config.profiles import SIM_DEFAULT, load_machine

            path.write_text(load_machine(SIM_DEFAULT).using(1).model_dump_json())
        else:
            from contest import doctor

            doctor(model, self.work, 14.0)
        return path

    def zinfer(self, model: Path, series: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Run each entry of the series (engines/run_series.py); its prediction is on disk before it starts."""
        task = {
            "model": str(model),
            "device": self.device,
            "machine": str(self.profile(model)),
            "predictions": str(self.work / PREDICTIONS),
            "runtime": {"threads": 1} if self.is_dry else {},
            "series": list(series),
        }
        if self.is_dry:
            import run_series

            return run_series.run(task)
        job, out = (self.work / f"{self.name}.{kind}.json" for kind in ("job", "result"))
        job.write_text(json.dumps(task))
        out.unlink(missing_ok=True)
        child = self.child("run_series.py", job, out)
        if not out.exists():
            raise RuntimeError(f"zinfer: {child.why}")
        return list(json.loads(out.read_text()))

    def child(self, script: str, *arguments: Path | str) -> Child:
        """Run one of engines/ in a process of its own, within the block's time."""
        runner = [sys.executable, str(HERE / "engines" / script), *map(str, arguments)]
        return run_child(runner, self.work / f"{self.name}.{script}.log", timeout_s=max(self.left_s, 30.0))

    def record(
        self,
        figures: dict[str, float | None],
        rows: list[dict[str, Any]],
        *,
        is_right: bool,
        limit: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        notes: Sequence[str] = (),
    ) -> Path:
        """Write the block's record; a figure that is None was not measured and is left out."""
        found = {name: value for name, value in figures.items() if value is not None}
        told = Record(
            bench=f"gpu_{self.name}",
            config={"dry_run": self.is_dry, "device": self.device, "shape": self.options.shape}
            | {"layers": self.options.layers, **(config or {})},
            repeats=self.size.repeats,
            median=found,
            spread={},
            limit=limit or {},
            baseline={},
            answer_matches=is_right,
            rows=rows,
            notes=[*(["a dry run: no figure here means anything"] if self.is_dry else []), *notes],
            machine=machine_facts() | devices() | {"simulated": self.is_dry},
            versions=package_versions(*PEERS),
        )
        path = told.write(self.work / "dry" if self.is_dry else Path(self.options.results))
        for name, value in found.items():
            print(f"  {name:32} {value:.4g}")
        print(f"{'ok' if is_right else 'WRONG ANSWER'}  {path.name}", flush=True)
        return path


def devices() -> dict[str, Any]:
    """The GPUs of this machine, as they name themselves; changes nothing about them."""
    import torch

    found = [torch.cuda.get_device_properties(at) for at in range(torch.cuda.device_count())]
    return {"devices": [{"name": each.name, "memory_bytes": each.total_memory} for each in found]}


def parse(doc: str | None, name: str, argv: Sequence[str] | None, seconds: float) -> Bench:
    """The options that every block has."""
    parser = argparse.ArgumentParser(prog=f"{name}.py", description=doc)
    parser.add_argument("--dry-run", action="store_true", help="all of it, tiny, on a simulated device")
    parser.add_argument("--work", default="/tmp/zinfer-gpu", help="folder for checkpoints and what is made")
    parser.add_argument("--results", default=str(RESULTS), help="folder for records")
    parser.add_argument("--shape", default="llama-3-8b", help="a file of configs/shapes, without .json")
    parser.add_argument("--layers", type=int, help="of the shape, where time or disk is short")
    parser.add_argument("--seconds", type=float, default=seconds, help="end by then")
    options = parser.parse_args(argv)
    Path(options.work).mkdir(parents=True, exist_ok=True)
    import torch

    if options.dry_run:
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # of other engines' processes
    elif not torch.cuda.is_available():
        sys.exit("no CUDA device is visible: --dry-run needs none")
    return Bench(name, options, time.perf_counter())


def block(doc: str | None, name: str, run: Callable[[Bench], object], seconds: float) -> Callable[..., int]:
    """A block's main: parse, run, say why not."""

    def main(argv: Sequence[str] | None = None) -> int:
        bench = parse(doc, name, argv, seconds)
        try:
            run(bench)
        except RuntimeError as error:
            print(f"{name}: no record: {error}", flush=True)
            return 1
        return 0

    return main


def write(config: dict[str, Any], folder: Path) -> None:
    """A seeded random checkpoint in one file, straight to where it will be read."""
    from zinfer.checkpoint.synthetic import write_checkpoint
    from zinfer.spec.read import read_spec

    dtype = {"float16": "F16", "bfloat16": "BF16"}[config["torch_dtype"]]
    write_checkpoint(read_spec(config), config, folder, 0, dtype, shard_bytes=10**15)


def shape_config(shape: str, layers: int | None = None) -> dict[str, Any]:
    """A file of configs/shapes, with as many layers as are asked for."""
    config = json.loads((ROOT / f"configs/shapes/{shape}.json").read_text())
    return config if layers is None else config | {"num_hidden_layers": layers}


def weight_bytes(config: dict[str, Any]) -> int:
    """Of the whole checkpoint, 16-bit."""
    from zinfer.spec.read import read_spec

    return 2 * read_spec(config).num_parameters


def has(package: str) -> bool:
    """Whether it can be imported; imports nothing."""
    return find_spec(package) is not None


def saved_probe(bench: Bench) -> dict[str, float]:
    """Figures of the newest probe of this run; {} where there is none."""
    folder = bench.work / "dry" if bench.is_dry else Path(bench.options.results)
    found = sorted(folder.glob("gpu_probe_*.json"), key=lambda path: path.stat().st_mtime)
    return dict(json.loads(found[-1].read_text())["median"]) if found else {}


def num_wrong(known: Known, entry: dict[str, Any]) -> int:
    """Requests of an entry's calls whose tokens are not those that must come."""
    wrong = 0
    for call, found in zip(entry["asked"]["calls"], entry["calls"], strict=True):
        for prompt, came in zip(call["prompts"], found["outputs"], strict=True):
            wanted = known.follow(prompt, call["max_tokens"], ignore_eos=call.get("ignore_eos", False))
            wrong += came != wanted
    return wrong


__all__ = [
    "GIB",
    "MIB",
    "ROOT",
    "Bench",
    "block",
    "checkpoint_bytes",
    "has",
    "num_wrong",
    "saved_probe",
    "shape_config",
    "weight_bytes",
    "write",
]
