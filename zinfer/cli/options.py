"""Options that several commands share.  In: flags.  Out: one frozen Settings object, by the documented precedence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from zinfer.config.load import Loaded, load_settings
from zinfer.errors import UsageError
from zinfer.sampling.params import SamplingParams

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

_SAMPLING = (
    click.option("--max-tokens", default=64, show_default=True, help="Tokens to generate at most."),
    click.option("--temperature", default=0.0, show_default=True, help="0: always the likeliest token."),
    click.option("--top-k", default=0, help="Keep the K likeliest tokens (0: all)."),
    click.option("--top-p", default=1.0, help="Keep the likeliest tokens up to this probability."),
    click.option(
        "--min-p", default=0.0, help="Keep tokens of at least this share of the likeliest one's probability."
    ),
    click.option("--repetition-penalty", default=1.0, help="Above 1 discourages tokens already seen."),
    click.option("--stop", multiple=True, help="End at this text (may be repeated)."),
    click.option("--seed", type=int, help="Makes sampling repeatable."),
    click.option("--logprobs", type=int, help="Report this many likeliest tokens per position."),
    click.option("--ignore-eos", is_flag=True, help="Go on to --max-tokens."),
)
_SAMPLING_NAMES = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
    "logprobs",
    "ignore_eos",
)


def sampling_options(command: F) -> F:
    """Add the options that say how tokens are drawn."""
    for option in reversed(_SAMPLING):
        command = option(command)
    return command


def split_sampling(options: dict[str, Any]) -> tuple[SamplingParams, dict[str, Any]]:
    """What `sampling_options` gave, and the rest."""
    sampling = {name: options.pop(name) for name in _SAMPLING_NAMES}
    stop = options.pop("stop")
    return SamplingParams(**sampling, stop=list(stop) or None), options


def engine_options(command: F) -> F:
    """Add the options that choose device, budgets, machine and settings file."""
    for option in reversed(_ENGINE):
        command = option(command)
    return command


def check_seconds(flag: str, seconds: float, *, may_be_none: bool = False) -> None:
    """Raises UsageError ZI-1119 for what is no duration."""
    if not (0 < seconds < float("inf") or (may_be_none and seconds == 0)):
        raise UsageError(
            "ZI-1119", f"{flag} wants a number of seconds above 0, {seconds} was given", remedy=f"{flag} 5"
        )


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
    more: Mapping[str, Any] | None = None,
) -> Loaded:
    """Merge flags, `--set`, environment and file: flag > --set > ZINFER_* > file > default.

    `more` are flags of one command alone, by setting path.
    """
    flags = {
        "model": model,
        "device": device,
        "memory.device": device_mem,
        "memory.host": host_mem,
        "runtime.objective": objective,
        "machine": machine,
        "exact": exact,
        **(more or {}),
    }
    return load_settings(config_file, sets=sets, flags=flags)
