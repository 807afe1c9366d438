"""How fast this machine's products read weights.  In: a job.  Out: seconds to read all matrices once, per product.

One activation row is multiplied with every matrix of the checkpoint, all in memory, as often as `steps` says; the
input embedding is left out, since a pass reads rows of it.  Nothing else is done, so no engine can be faster with
these products.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path

import job
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from zinfer.kernels.native.calls import kernels

ROUNDS = 4  # in which products of different numbers of rows take turns


def matrices(model: Path, most_bytes: int | None = None) -> dict[str, Tensor]:
    """Copies of all matrices but the input embedding, in memory of our own; of so many bytes only those that fit."""
    found: dict[str, Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a mapping)
                shape = opened.get_slice(name).get_shape()
                if len(shape) != 2 or ".embed_tokens." in name:
                    continue
                if (
                    most_bytes is None
                    or sum(x.nbytes for x in found.values()) + 2 * prod(shape) <= most_bytes
                ):
                    found[name] = opened.get_tensor(name).clone()
    return found


def without_onednn(x: Tensor, weight: Tensor) -> Tensor:
    """The product of torch's own kernels."""
    with torch.backends.mkldnn.flags(enabled=False):
        return F.linear(x, weight)


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear, oneDNN": F.linear,
    "linear, oneDNN off": without_onednn,
    "mv": lambda x, weight: torch.mv(weight, x[0]),
}
if (
    compiled := kernels()
) is not None and compiled.has_products:  # a limit has to know every product there is
    PRODUCTS["zinfer's"] = compiled.dense


def measure(task: job.Job) -> dict[str, object]:
    """{product: [median, smallest, largest] seconds}, the bytes that were read, and the settings."""
    named = matrices(Path(task.model), task.options.get("most_bytes"))
    if "rows" in task.options:
        found = by_rows(named, task.options["rows"], task.options["least_s"])
        return {"by_rows": found, "threads": torch.get_num_threads()}
    weights = list(named.values())
    rows = {weight.shape[1]: torch.ones(1, weight.shape[1], dtype=weight.dtype) for weight in weights}
    products = {}
    with torch.inference_mode():
        for name, product in PRODUCTS.items():
            seconds = []
            for _ in range(task.steps + 1):
                start = job.clock()
                for weight in weights:
                    product(rows[weight.shape[1]], weight)
                seconds.append(job.clock() - start)
            products[name] = [statistics.median(seconds[1:]), min(seconds[1:]), max(seconds[1:])]
    nbytes = sum(weight.numel() * weight.element_size() for weight in weights)
    return {"products": products, "weight_bytes": nbytes, "threads": torch.get_num_threads()}


def by_rows(named: dict[str, Tensor], counts: list[int], least_s: float) -> dict[str, dict[int, float]]:
    """{"body" | "head": {rows: seconds}}: all matrices once by the product that is fastest at so many rows.

    Of each product the mean over at least `least_s` seconds, in ROUNDS turns with all the others: a machine that others
    use too changes from one second to the next, and no number of rows may be the one that met a quiet second.
    """
    parts = {
        "head": [weight for name, weight in named.items() if "lm_head" in name],
        "body": [weight for name, weight in named.items() if "lm_head" not in name],
    }
    tried = [(part, count, product) for count in counts for part in parts for product in products_of(count)]
    seconds: dict[tuple[str, int, Callable[[Tensor, Tensor], Tensor]], list[float]] = {
        each: [] for each in tried
    }
    with torch.inference_mode():
        for turn in range(ROUNDS + 1):
            for part, count, product in tried:
                taken = timed(parts[part], product, count, least_s / ROUNDS if turn else 0.0)
                seconds[part, count, product] += taken if turn else []  # a first time does not count
    return {
        part: {
            count: min(statistics.fmean(seconds[part, count, product]) for product in products_of(count))
            for count in counts
        }
        for part in parts
    }


def products_of(count: int) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """Those that may be the fastest at so many rows: from five on oneDNN wins over torch's own."""
    found = [F.linear, without_onednn] if count <= 4 else [F.linear]
    return found + ([PRODUCTS["zinfer's"]] if "zinfer's" in PRODUCTS else [])


def timed(
    weights: list[Tensor], product: Callable[[Tensor, Tensor], Tensor], count: int, least_s: float
) -> list[float]:
    """Seconds to multiply `count` rows with every matrix, at least once, until `least_s` have passed."""
    draw = torch.Generator().manual_seed(count)
    rows = {
        inputs: torch.randn(count, inputs, generator=draw).to(weights[0].dtype)
        for inputs in {weight.shape[1] for weight in weights}
    }
    seconds: list[float] = []
    while not seconds or sum(seconds) < least_s:
        start = job.clock()
        for weight in weights:
            product(rows[weight.shape[1]], weight)
        seconds.append(job.clock() - start)
    return seconds


if __name__ == "__main__":
    task = job.Job(**json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(measure(task)))
