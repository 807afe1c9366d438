"""The limits of this machine for one checkpoint.  In: a model folder.  Out: a record of disk rate and products.

usage: roofs.py [--model DIR | --shape NAME] [--work DIR] [--repeats N]

Two figures bound everything the other benchmarks measure: how fast the very files come from disk past the page cache,
and how long it takes to read all matrices once from memory by the fastest product there is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from conditions import ENGINES, checkpoint_bytes, embedding_bytes, weight_files
from contest import checkpoint
from harness import RESULTS, Record, direct_read_rate, run_child, summary


@dataclass(frozen=True, slots=True)
class Roofs:
    """Measured limits.  `read_rates` are bytes per second, [] where direct reads are refused.

    `beside` are the products once more, right before and right after the runs that are held to them: a machine that
    others use too changes within minutes.
    """

    checkpoint_bytes: int
    embedding_bytes: int
    read_rates: list[float]
    products: dict[str, list[float]]  # name -> [median, smallest, largest] seconds
    weight_bytes: int
    threads: int
    beside: list[dict[str, list[float]]] = field(default_factory=list)

    @property
    def read_rate(self) -> float | None:
        """Median bytes per second of direct reads."""
        return statistics.median(self.read_rates) if self.read_rates else None

    @property
    def weights_once_s(self) -> float:
        """Seconds to read all matrices once from memory by the fastest product: the mean of `beside`, if any."""
        moments = self.beside or [self.products]
        return fmean(min(median for median, _, _ in products.values()) for products in moments)

    def load_s(self) -> float | None:
        """Seconds to read all bytes once."""
        return self.checkpoint_bytes / self.read_rate if self.read_rate else None


def read_rates(model: Path, repeats: int = 3) -> list[float]:
    """Direct-read rates of the real files, bytes per second, one per repeat."""
    rates = [direct_read_rate(weight_files(model)) for _ in range(repeats)]
    return [rate for rate in rates if rate is not None]


def products_now(model: Path, work: Path, repeats: int) -> dict[str, Any]:
    """What run_roof.py says of the products, by a process of its own.  Raises RuntimeError if that fails."""
    job_file, result_file = work / "roof.job.json", work / "roof.result.json"
    job = {"kind": "roof", "model": str(model), "prompts": [], "steps": repeats, "logits": ""}
    job_file.write_text(json.dumps(job))
    result_file.unlink(missing_ok=True)
    runner = [sys.executable, str(ENGINES / "run_roof.py"), str(job_file), str(result_file)]
    child = run_child(runner, work / "roof.log")
    if child.returncode:
        raise RuntimeError(f"the products cannot be measured: {child.why}")
    found: dict[str, Any] = json.loads(result_file.read_text())
    return found


def measure(model: Path, work: Path, repeats: int = 5) -> Roofs:
    """All limits.  Raises RuntimeError if that fails."""
    result = products_now(model, work, repeats)
    return Roofs(
        checkpoint_bytes=checkpoint_bytes(model),
        embedding_bytes=embedding_bytes(model),
        read_rates=read_rates(model),
        products=result["products"],
        weight_bytes=result["weight_bytes"],
        threads=result["threads"],
    )


def main() -> None:
    """Measure, print, write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    model = checkpoint(options)
    roofs = measure(model, options.work, options.repeats)
    rates = summary(roofs.read_rates)
    median, spread = {"weights_once_s": roofs.weights_once_s}, {}
    for name, (middle, low, high) in roofs.products.items():
        median[f"{name} s"], spread[f"{name} s"] = middle, (low, high)
        print(
            f"{name:22} {middle:8.4f} s  [{low:.4f} .. {high:.4f}]  {roofs.weight_bytes / middle / 1e9:6.1f} GB/s"
        )
    if roofs.read_rate:
        median["read_bytes_per_s"], spread["read_bytes_per_s"] = roofs.read_rate, rates["spread"]
        print(f"{'direct read':22} {roofs.load_s():8.3f} s  {roofs.read_rate / 1e9:6.2f} GB/s")
    record = Record(
        bench="roofs",
        config={"model": model.name, "weight_bytes": roofs.weight_bytes, "threads": roofs.threads},
        repeats=options.repeats,
        median=median,
        spread=spread,
        limit={},
        baseline={},
        answer_matches=True,
        notes=["these figures are limits; what is compared with them is in the other records"],
    )
    print(record.write(options.results))


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark here has."""
    parser.add_argument(
        "--model", type=Path, help="checkpoint folder; default: a random one at --shape in --work"
    )
    parser.add_argument("--shape", default="tinyllama-1.1b", help="a file of configs/shapes, without .json")
    parser.add_argument(
        "--work", type=Path, default=Path("/tmp/zinfer-bench"), help="folder for what is made"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for records")


if __name__ == "__main__":
    main()
