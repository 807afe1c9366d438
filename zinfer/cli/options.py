"""Options that several commands share.  In: flags.  Out: one frozen Settings object, by the documented precedence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from zinfer.config.load import Loaded, load_settings

F = TypeVar("F", bound=Callable[..., Any])

_ENGINE = (
    click.option("--device", metavar="DEVICE", help="auto, cpu, cuda:0, or sim (a simulated device)."),
    click.option("--device-mem", metavar="SIZE", help="Memory zinfer may use on the device."),
    click.option("--host-mem", metavar="SIZE", help="Host memory zinfer may use."),
    click.option(
        "--objective",
        type=click.Choice(["throughput", "latency"]),
        help="What a plan makes short: the whole job (default), or each request.",
    ),
    click.option("--machine", metavar="FILE", help="Machine profile: a file, or a shipped one's name."),
    click.option("--config", "config_file", type=click.Path(path_type=Path), help="Settings as TOML."),
    click.option(
        "--set", "sets", multiple=True, metavar="PATH=VALUE", help="One setting: memory.device=20GiB."
    ),
)


def engine_options(command: F) -> F:
    """Add the options that choose device, budgets, machine and settings file."""
    for option in reversed(_ENGINE):
        command = option(command)
    return command


def settings_of(
    model: str | None,
    *,
    device: str | None = None,
    device_mem: str | None = None,
    host_mem: str | None = None,
    objective: str | None = None,
    machine: str | None = None,
    config_file: Path | None = None,
    sets: tuple[str, ...] = (),
    exact: bool | None = None,
) -> Loaded:
    """Merge flags, `--set`, environment and file: flag > --set > ZINFER_* > file > default."""
    flags = {
        "model": model,
        "device": device,
        "memory.device": device_mem,
        "memory.host": host_mem,
        "runtime.objective": objective,
        "machine": machine,
        "exact": exact,
    }
    return load_settings(config_file, sets=sets, flags=flags)
