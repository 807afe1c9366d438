"""Each kernel beside its twin and beside the memory's own rate.  In: a GPU.  Out: one record; answers are checked.

usage: kernels.py [--repeats N] [--results DIR] [--dry-run]

Shapes are those of a decode pass of an 8 B model.  A kernel's limit is the time in which the device copies as many
bytes as the kernel must read and write.  `--dry-run` carries out all of it at tiny shapes in Triton's interpreter, on
any machine: its record is marked and no figure in it means anything.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2])
)  # the tree that is measured lies around this file
sys.path.append(str(Path(__file__).resolve().parents[1]))
os.environ["TRITON_INTERPRET"] = "1" if "--dry-run" in sys.argv else "0"  # before triton is imported

import torch
import torch.nn.functional as F
from harness import GIB, MIB, RESULTS, Record, summary
from torch import Tensor

from zinfer.kernels import fused_quant, quant, rows, served
from zinfer.kernels.paged import PageRows, paged_decode, paged_decode_twin
from zinfer.kernels.panels import dequantise
from zinfer.layers import mlp, norm, rotary
from zinfer.layers.mlp import activate
from zinfer.layers.norm import rms_norm
from zinfer.layers.rotary import rotate

PAGE = 16
COLD_BYTES = 512 * MIB  # inputs are taken in turn from so many bytes: no pass finds its weights in a cache


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the model and of the passes that are tried."""

    model_dim: int
    mlp_dim: int
    heads: int
    kv_heads: int
    head_dim: int
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    repeats: int


EARNEST = Sizes(4096, 14336, 32, 8, 128, (1, 16), (512, 8192), 30)
TINY = Sizes(128, 192, 4, 2, 16, (1, 2), (40,), 1)


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel and its twin on the same inputs, of which there are several; one run reads and writes `nbytes`."""

    name: str
    kernel: Callable[[int], Tensor]
    twin: Callable[[int], Tensor]
    want: Callable[[int], Tensor]  # fp32, by the plainest code
    nbytes: int
    close: float
    count: int  # different inputs


class Clock:
    """Seconds of a run, waited for; the runs of one figure follow each other without a pause.

    On a device they are recorded and replayed, as decode passes are: asking for them is not counted.
    """

    def __init__(self, device: str, repeats: int) -> None:
        self.device = device
        self.repeats = repeats

    def wait(self) -> None:
        """Until all that was asked of the device has ended."""
        if self.device != "cpu":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[int], object]) -> list[float]:
        """Three figures, each the mean of `repeats` runs; as many runs before them do not count."""
        figures, all_of_them = [], self.recorded(run)
        for number in range(4):
            self.wait()
            begin_s = time.perf_counter()
            all_of_them()
            self.wait()
            if number:
                figures.append((time.perf_counter() - begin_s) / self.repeats)
        return figures

    def recorded(self, run: Callable[[int], object]) -> Callable[[], None]:
        """All runs of a figure, one after another."""

        def all_of_them() -> None:
            for at in range(self.repeats):
                run(at)

        if self.device == "cpu":
            return all_of_them
        all_of_them()  # compiles what it needs: nothing may while it is recorded
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_of_them()
        return graph.replay


def copy_rate(clock: Clock, nbytes: int) -> float:
    """Bytes read and written per second by a kernel that does nothing else.

    A recorded copy would be the copy engine's, which reaches two thirds of it (2.7 of 4.2 TB/s on an H200).
    """
    source = torch.ones(nbytes // 8, dtype=torch.int64, device=clock.device)
    target = torch.empty_like(source)
    return 2 * nbytes / median(clock.seconds(lambda at: torch.bitwise_not(source, out=target)))


def several(nbytes: int, repeats: int) -> int:
    """How many inputs of that size make a turn: enough that none is in a cache when its turn comes again."""
    return max(min(COLD_BYTES // nbytes, repeats), 1) if repeats > 1 else 1


def row_cases(sizes: Sizes, device: str, dtype: torch.dtype, batch: int) -> Iterator[Case]:
    """Norm, rotation, gate: what lies between products."""

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x, weight, width = drawn(batch, sizes.model_dim), drawn(sizes.model_dim), dtype.itemsize
    q = drawn(batch, sizes.heads, sizes.head_dim)
    cos, sin = drawn(batch, sizes.head_dim // 2), drawn(batch, sizes.head_dim // 2)
    gate, up = drawn(batch, sizes.mlp_dim), drawn(batch, sizes.mlp_dim)
    for name, kernel, twin, args, nbytes in (
        ("norm", rows.norm, rms_norm, (x, weight, 1e-5), 2 * x.numel() + weight.numel()),
        ("rotate", rows.rotate, rotate, (q, cos, sin), 2 * q.numel() + 2 * cos.numel()),
        ("gate", rows.gated, gate_twin, (gate, up), 3 * gate.numel()),
    ):
        wide = tuple(part.float() if isinstance(part, Tensor) else part for part in args)
        yield Case(
            f"{name} x{batch}",
            lambda at, run=kernel, args=args: run(*args),
            lambda at, run=twin, args=args: unfused(run, *args),
            lambda at, run=twin, args=wide: unfused(run, *args),
            nbytes * width,
            0.06,
            1,
        )


def gate_twin(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up as torch has it."""
    return activate(gate, "silu", exact=False) * up


def unfused(run: Callable[..., Tensor], *args: Any) -> Tensor:
    """The twin, where the layer would take the kernel."""
    asked = ((mlp, "device_kernels"), (norm, "row_kernels"), (rotary, "row_kernels"))
    found = [getattr(layer, name) for layer, name in asked]
    for layer, name in asked:
        setattr(layer, name, lambda *tensors: None)
    try:
        return run(*args)
    finally:
        for (layer, name), kernels in zip(asked, found, strict=True):
            setattr(layer, name, kernels)


def product_cases(sizes: Sizes, device: str, dtype: torch.dtype, batch: int) -> Iterator[Case]:
    """Quantised products beside unpacking; one row of published weights beside torch's own product."""
    x = torch.randn(batch, sizes.model_dim, device=device)
    for weights in ("int8", "int4"):
        yield quantised_case(sizes, device, weights, x.to(torch.bfloat16))
    if batch == 1:
        nbytes = sizes.mlp_dim * sizes.model_dim * dtype.itemsize
        pool = torch.randn(several(nbytes, sizes.repeats), sizes.mlp_dim, sizes.model_dim, device=device).to(
            dtype
        )
        row = x.to(dtype)
        yield Case(
            "published product x1",
            lambda at: rows.one_row(row, pool[at % len(pool)], None),
            lambda at: F.linear(row, pool[at % len(pool)]),
            lambda at: row.float() @ pool[0].float().t(),
            nbytes,
            0.02,
            len(pool),
        )


def quantised_case(sizes: Sizes, device: str, weights: str, x: Tensor) -> Case:
    """The fused product beside the slot."""
    one = quant.made_up(weights, 64, sizes.mlp_dim, sizes.model_dim)
    many = [one.to(torch.device(device)) for _ in range(several(one.nbytes, sizes.repeats))]
    return Case(
        f"{weights} product x{len(x)}",
        lambda at: fused_quant.fused(x, many[at % len(many)]),
        lambda at: quant.unpacked(x, many[at % len(many)], exact=False),
        lambda at: x.float() @ dequantise(many[0]).t(),
        one.nbytes,
        0.02,
        len(many),
    )


def attention_cases(sizes: Sizes, device: str, dtype: torch.dtype, batch: int) -> Iterator[Case]:
    """Decode over pages in place, at every length."""
    for context in sizes.contexts:
        yield attention_case(sizes, device, dtype, batch, context)


def attention_case(sizes: Sizes, device: str, dtype: torch.dtype, batch: int, context: int) -> Case:
    """Pages in a random order, beside gathering them for torch's own attention."""
    counts = -(-context // PAGE)
    shape = (2, batch * counts * PAGE, sizes.kv_heads, sizes.head_dim)
    layers = several(torch.Size(shape).numel() * dtype.itemsize, sizes.repeats)
    planes = torch.randn(layers, *shape, device=device).to(dtype)
    table = torch.randperm(batch * counts, device=device).to(torch.int32).view(batch, counts)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
    pages = PageRows(table, lengths, context, PAGE)
    q = torch.randn(batch, sizes.heads, sizes.head_dim, device=device).to(dtype)
    at_n = torch.arange(context, device=device)
    slots = (table.long()[:, at_n // PAGE] * PAGE + at_n % PAGE).flatten()
    scale = sizes.head_dim**-0.5

    def gathered(at: int) -> Tensor:
        k, v = (
            part.index_select(0, slots).view(batch, context, *part.shape[1:]).transpose(1, 2)
            for part in planes[at % layers]
        )
        grouped = q.view(batch, sizes.kv_heads, -1, sizes.head_dim)
        return F.scaled_dot_product_attention(grouped, k, v, scale=scale).view_as(q)

    return Case(
        f"attention x{batch} over {context}",
        lambda at: paged_decode(q, [planes[at % layers]], pages, scale=scale),
        gathered,
        lambda at: paged_decode_twin(q.float(), [planes[0].float()], pages, scale=scale),
        2 * batch * context * sizes.kv_heads * sizes.head_dim * dtype.itemsize,
        0.02,
        layers,
    )


def measure(case: Case, clock: Clock, rate: float) -> dict[str, Any]:
    """One row of the record; raises SystemExit where the kernel is not right."""
    want = case.want(0).float()
    error = float((case.kernel(0).float() - want).abs().max() / want.abs().max())
    if not error <= case.close:
        raise SystemExit(f"{case.name}: off by {error:.2g} of the largest value, {case.close} is allowed")
    found, twin = clock.seconds(case.kernel), clock.seconds(case.twin)
    limit_s = case.nbytes / rate
    return {
        "name": case.name,
        "nbytes": case.nbytes,
        "inputs": case.count,
        "error": error,
        "kernel_s": summary(found),
        "twin_s": summary(twin),
        "limit_s": limit_s,
        "share_of_limit": limit_s / median(found),
        "times_twin": median(twin) / median(found),
    }


def main() -> None:
    """Check, time, print, write the record."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int)
    made.add_argument("--results", type=Path, default=RESULTS)
    made.add_argument("--dry-run", action="store_true")
    options = made.parse_args()
    sizes, device = (TINY, "cpu") if options.dry_run else (EARNEST, "cuda")
    if not options.dry_run and not served.serves(device):
        raise SystemExit("no figure: this needs a GPU with Triton (--dry-run needs neither)")
    torch.manual_seed(0)
    dtype = torch.float16 if options.dry_run else torch.bfloat16  # the interpreter cuts bfloat16 off
    clock = Clock(device, options.repeats or sizes.repeats)
    with torch.no_grad():
        rate = copy_rate(clock, MIB if options.dry_run else GIB)
        print(f"copying within memory: {rate / 1e9:.1f} GB/s read and written")
        seen = []
        for kind in (row_cases, product_cases, attention_cases):
            for batch in sizes.batches:
                for case in kind(sizes, device, dtype, batch):
                    seen.append(measure(case, clock, rate))
                    said = "{name:24} {share_of_limit:6.1%} of the limit, {times_twin:5.2f} x its twin"
                    print(said.format_map(seen[-1]), flush=True)
    record = Record(
        bench="gpu_kernels" + ("_dry_run" if options.dry_run else ""),
        config={"dtype": str(dtype), "sizes": str(sizes), "device": device_name(device)},
        repeats=clock.repeats,
        median={f"{row['name']} s": row["kernel_s"]["median"] for row in seen},
        spread={f"{row['name']} s": row["kernel_s"]["spread"] for row in seen},
        limit={"copy_bytes_per_s": rate} | {f"{row['name']} s": row["limit_s"] for row in seen},
        baseline={f"{row['name']} s": row["twin_s"]["median"] for row in seen},
        answer_matches=max(row["error"] for row in seen),
        comparable=not options.dry_run,
        rows=seen,
        notes=["a dry run in an interpreter: no figure means anything"] if options.dry_run else [],
    )
    print(record.write(options.results).name)


def device_name(device: str) -> str:
    """What is measured."""
    return torch.cuda.get_device_name() if device == "cuda" else "Triton's interpreter"


if __name__ == "__main__":
    main()
