"""`zinfer plan`.  In: a model folder or a lone config.json, budgets.  Out: what would live where, and how fast."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from zinfer.checkpoint.check import check_weights
from zinfer.checkpoint.index import CheckpointIndex
from zinfer.chunks.source import Source, checkpoint_source, imagined_source
from zinfer.chunks.store import open_store
from zinfer.cli.options import engine_options, settings_of
from zinfer.cli.progress import Progress
from zinfer.config.limits import memory_limits
from zinfer.config.machine import Machine
from zinfer.config.profiles import SIM_DEFAULT, load_machine, saved_machine
from zinfer.config.resolve import resolve
from zinfer.config.schema import Settings
from zinfer.errors import UsageError
from zinfer.plan.explain import Alternative, alternatives, explain, explained_dict
from zinfer.plan.make import Plan, make_plan
from zinfer.plan.optimise import batch_sizes
from zinfer.plan.records import Workload
from zinfer.spec.read import read_spec
from zinfer.spec.records import ModelSpec
from zinfer.watch import Watch
from zinfer.whole import refuse_unwritable

DEMO = Path(__file__).parents[1] / "assets" / "demo"


@click.command()
@click.argument("model", required=False)
@click.option(
    "--batch", type=click.IntRange(1), help="Sequences at once  [default: 1, or what is best for --requests]"
)
@click.option("--requests", metavar="N|open", help="Requests in all; open: a queue without end.")
@click.option(
    "--prompt-len", type=click.IntRange(1), default=128, show_default=True, help="Tokens of a prompt."
)
@click.option(
    "--gen-len",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Tokens to generate per sequence.",
)
@click.option("--save", "save_file", type=click.Path(path_type=Path), help="Write the plan as JSON.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@engine_options
def plan(
    model: str | None,
    batch: int | None,
    requests: str | None,
    prompt_len: int,
    gen_len: int,
    save_file: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Say where MODEL would live, how fast it would run, and what another budget would buy.

    MODEL is a folder, a zinfer store, or a config.json alone; no weight is read.  --machine plans for a machine
    that is not this one.
    """
    settings = settings_of(model, **options).settings
    num_requests = _num_requests(requests, batch or 1)
    refuse_unwritable(save_file)
    workload = Workload(batch or 1, prompt_len, gen_len, num_requests=num_requests)
    batches = batch_sizes(num_requests) if requests and batch is None else []
    with _uncollected(), Progress("steps") as progress:
        made, others = _planned(settings, workload, batches, progress)
    if (made.workload.prompt_len, made.workload.gen_len) != (prompt_len, gen_len):
        click.echo(
            f"note       {prompt_len} prompt tokens and {gen_len} to generate are not what this model takes: "
            f"planned for {made.workload.prompt_len} and {made.workload.gen_len}",
            err=True,
        )
    if save_file is not None:
        made.save(save_file)
    if as_json:
        click.echo(json.dumps(explained_dict(made, others)))
        return
    for line in explain(made, others):
        click.echo(line)


def _planned(
    settings: Settings, workload: Workload, batches: Sequence[int], watch: Watch
) -> tuple[Plan, list[Alternative]]:
    spec, source = open_for_planning(Path(settings.model) if settings.model else DEMO)
    machine, is_here = planning_machine(settings, source, spec)
    resolved = resolve(settings, machine, limits=memory_limits() if is_here else None, num_gpus=num_gpus())
    made = make_plan(spec, source, resolved, machine, workload, batches=batches, watch=watch)
    return made, alternatives(spec, made, watch)


@contextmanager
def _uncollected() -> Iterator[None]:
    """A plan is a hundred thousand records without cycles: looking for garbage took a quarter of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _num_requests(text: str | None, batch: int) -> int | None:
    """None for an open queue.  Raises UsageError ZI-1109."""
    if text == "open":
        return None
    if text is None:
        return batch
    if not text.isdecimal() or int(text) < 1:
        raise UsageError("ZI-1109", f"--requests {text!r} is no number of requests", remedy="--requests 128")
    return int(text)


def open_for_planning(path: Path) -> tuple[ModelSpec, Source]:
    """A model's spec and where its weights lie, validated where there are any, else imagined from the config."""
    index = CheckpointIndex.open(path)
    spec = read_spec(index.config, index.generation_config, index.dtypes)
    if index.is_store:
        return open_store(index, spec)
    if not index.has_weights:
        return spec, imagined_source(spec.program, spec.lookups, spec.dtype)
    check_weights(index, spec)
    return spec, checkpoint_source(spec.program, spec.lookups, index)


def planning_machine(settings: Settings, source: Source, spec: ModelSpec) -> tuple[Machine, bool]:
    """The machine to plan for, and whether it is this one.

    A device budget without a device here plans for the shipped example of a machine with one, and says so.
    """
    if settings.machine is not None:
        return load_machine(settings.machine), False
    wants_device = settings.device not in ("auto", "cpu") or settings.memory.device != "auto"
    if wants_device and not num_gpus():
        click.echo(
            f"note       no GPU here: planned for the shipped profile {SIM_DEFAULT!r} (--machine names another)",
            err=True,
        )
        return load_machine(SIM_DEFAULT), False
    machine = saved_machine()
    if machine is not None and spec.dtype in machine.host.products:
        return machine, True
    try:
        from zinfer.runtime.probed import probed
    except ModuleNotFoundError:  # a laptop without torch: plans need none
        return load_machine(SIM_DEFAULT), False
    click.echo(
        f"note       no machine profile with {spec.dtype} products is saved: probing for 2 s (zinfer doctor measures "
        "and saves one)",
        err=True,
    )
    machine = probed([file for file in source.files if file.is_file()], spec, exact=settings.exact)
    if machine.skipped:
        click.echo(f"note       no time was left for {'; '.join(machine.skipped)}: guessed", err=True)
    return machine, True


def num_gpus() -> int:
    """NVIDIA devices the system shows; asks no driver and imports no torch."""
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
