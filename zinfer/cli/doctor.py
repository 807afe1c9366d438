"""`zinfer doctor`.  In: this machine, a model to read.  Out: what it can do, and the profile that plans use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click
import psutil

from zinfer.cli.options import check_seconds
from zinfer.cli.plan import DEMO, open_for_planning
from zinfer.cli.progress import Progress
from zinfer.config.limits import MemoryLimits, memory_limits
from zinfer.config.machine import Compute, Machine
from zinfer.config.profiles import save_machine, writable_profile
from zinfer.errors import MachineError
from zinfer.plan.profile import matrix_shapes
from zinfer.spec.lossless import LOSSLESS
from zinfer.units import Bytes, rate_text, seconds_text

_MUCH = 0.1  # of the processors' time: a product that waits for a core of its team takes many times as long


@click.command()
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.option("--seconds", type=float, help="How long to measure  [default: 20 for a MODEL, 60 for any]")
@click.option("--no-save", is_flag=True, help="Print only.")
@click.option("--json", "as_json", is_flag=True, help="The profile as one JSON object on stdout.")
def doctor(model: Path | None, seconds: float | None, no_save: bool, as_json: bool) -> None:
    """Measure this machine and save the profile that plans use.

    With MODEL: on its files, for its dtype and weight format.  Without: for every dtype and format there is.

    Nothing of the machine's settings is changed.
    """
    from zinfer.kernels.stored import any_linear
    from zinfer.memory.measure import DTYPES, measure
    from zinfer.memory.measure_products import SHAPES
    from zinfer.runtime.quant_rates import makers, packer_for
    from zinfer.runtime.small_model import SmallModel

    if seconds is not None:
        check_seconds("--seconds", seconds)
    if not no_save:
        writable_profile()
    spec, source = open_for_planning(model or DEMO)
    shapes = matrix_shapes(spec) if model else SHAPES
    dtypes = (spec.dtype,) if model else tuple(DTYPES)
    pack = packer_for(spec)
    formats = makers() if model is None else makers([spec.weights] if pack is None else [LOSSLESS])
    seconds = seconds or (20.0 if model else 60.0)
    limits = memory_limits()
    before_s = _processor_seconds()
    with Progress("s", quiet=as_json) as progress:
        progress(0, round(seconds), "measuring disk and products")
        machine = measure(
            source.files,
            any_linear,
            SmallModel,
            dtypes=dtypes,
            shapes=shapes,
            formats=formats,
            pack=pack,
            seconds=seconds,
        )
        machine = with_links(machine)
    others = others_share(before_s, _processor_seconds())
    if not as_json:
        for line in describe_machine(machine, limits):
            click.echo(line)
        click.echo(describe_kernels())
        for line in warnings_for(machine, limits, is_small=model is None, others=others):
            click.echo(f"warning    {line}")
    if not no_save:
        path = save_machine(machine)
        click.echo(f"saved      {path}", err=as_json)
    if as_json:
        click.echo(json.dumps(machine.model_dump(mode="json")))


def with_links(machine: Machine) -> Machine:
    """The machine with the links of all its devices, each measured alone and with the others, where it has several.

    Where they cannot be measured that is said, and one device's link is what the profile has.
    """
    import torch

    from zinfer.parallel.topology import cuda_links

    try:
        links = cuda_links(num_devices=torch.cuda.device_count() if machine.device is not None else 0)
    except MachineError as error:
        click.echo(f"warning    {error}", err=True)
        return machine
    return machine.model_copy(update={"links": links})


def describe_links(machine: Machine) -> Iterator[str]:
    """Each device's link alone and with all others at work, and what they come to."""
    from zinfer.parallel.topology import sharing

    shared = sharing(machine.links)
    for at, link in enumerate(machine.links):
        sent = f" · on to device 0 {rate_text(link.peer.bytes_per_s)}" if link.peer else ""
        yield (
            f"link {at:<6}alone {rate_text(link.h2d.bytes_per_s)} · with the others "
            f"{rate_text(link.together_bytes_per_s)}{' (shares its way)' if at in shared else ''}{sent}"
        )
    if machine.links and machine.h2d:
        gain = machine.up_bytes_per_s / machine.h2d.bytes_per_s
        yield f"links      {rate_text(machine.up_bytes_per_s)} together: {gain:.2f} times one (runtime.devices=auto)"


def describe_machine(machine: Machine, limits: MemoryLimits) -> Iterator[str]:
    """The machine in lines: memory, disk, products by rows, links."""
    yield f"machine    {machine.name} · {machine.fingerprint}"
    yield f"memory     {Bytes(limits.total)}, {Bytes(limits.available)} free (limit: {limits.binding})"
    yield (
        f"disk       {rate_text(machine.disk_read.bytes_per_s)} direct reads · one row "
        f"{seconds_text(machine.disk_row_latency_s)}"
    )
    yield from _describe_compute("host", machine.host)
    yield (
        f"at once    reads take {machine.overlap.disk:.2f} times as long, products {machine.overlap.compute:.2f} "
        f"times · {seconds_text(machine.host.chunk_overhead_s)} per chunk"
    )
    if machine.device is None or machine.h2d is None:
        yield "device     none: weights are computed with where they are, in host memory"
        return
    down = f" · down {rate_text(machine.d2h.bytes_per_s)}" if machine.d2h else ""
    yield f"device     {Bytes(machine.device_bytes)} · up {rate_text(machine.h2d.bytes_per_s)}{down}"
    yield from describe_links(machine)
    yield from _describe_compute("device", machine.device)


def describe_kernels() -> str:
    """Whose code multiplies on the host."""
    from zinfer.kernels.native.build import compiler
    from zinfer.kernels.native.calls import kernels

    command, found = compiler(), kernels()
    if found is not None and command is not None:
        products = "" if found.has_products else ", products left to torch"
        return f"kernels    compiled for this processor by {Path(command[0]).name}{products}"
    advice = "" if command else "; pip install 'zinfer[native]' brings a compiler"
    return f"kernels    torch's own{advice}"


def _processor_seconds() -> tuple[float, float, float]:
    """Seconds so far of all processors: all, at work, at work for this process."""
    times, own = psutil.cpu_times(), psutil.Process().cpu_times()
    return sum(times[:8]), sum(times[:8]) - times.idle - getattr(times, "iowait", 0.0), own.user + own.system


def others_share(before_s: tuple[float, float, float], after_s: tuple[float, float, float]) -> float:
    """The share of all processors' time that other processes took between the two."""
    total, busy, own = (after - before for before, after in zip(before_s, after_s, strict=True))
    return max(busy - own, 0.0) / total if total > 0 else 0.0


def warnings_for(
    machine: Machine, limits: MemoryLimits, *, is_small: bool, others: float = 0.0
) -> Iterator[str]:
    """What a user should know before trusting a plan made from this."""
    if others > _MUCH:
        yield f"other processes took {others:.0%} of the processors meanwhile: measure again when they are idle"
    if is_small:
        yield "the disk was measured on the small bundled model: zinfer doctor MODEL reads the files that count"
    if machine.skipped:
        yield f"no time was left for {'; '.join(machine.skipped)}: guessed (--seconds gives more)"
    if limits.is_cgroup:
        yield f"a memory cgroup allows {Bytes(limits.total)}, less than the machine has"
    if limits.swap:
        yield f"{Bytes(limits.swap)} of swap are not counted as memory"
    if machine.disk_read.bytes_per_s < 5e8:
        yield f"the disk reads {rate_text(machine.disk_read.bytes_per_s)}: every streamed GB costs seconds"
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if huge.is_file() and "[never]" in huge.read_text():
        yield "transparent huge pages are off: direct reads cost several times the CPU"


def _describe_compute(name: str, compute: Compute) -> Iterator[str]:
    for dtype, points in compute.products.items():
        cells = " · ".join(
            f"{point.rows} row{'s' if point.rows > 1 else ''} {1 / point.seconds_per_gb:.3g} GB/s"
            for point in points
        )
        yield f"{name:<11}{dtype}: weights at {cells}"
    yield (
        f"{'':<11}attention {compute.attention_flops_per_s / 1e9:.0f} GFLOP/s · "
        f"{seconds_text(compute.op_overhead_s)} per op"
    )
