"""Machine profiles on disk.  In: a name, a file, this machine.  Out: a Machine, declared, shipped or measured."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from zinfer.config.load import cache_folder, read_toml
from zinfer.config.machine import Machine
from zinfer.config.schema import closest
from zinfer.errors import UsageError
from zinfer.whole import refuse_unwritable, unwritable, written_whole

SIM_DEFAULT = "sim-default"  # what device="sim" uses when no machine is named
_KERNELS = resources.files("zinfer") / "kernels" / "native"
_SHIPPED = resources.files("zinfer.config") / "data"


def load_machine(name: str) -> Machine:
    """A shipped profile by name, or a .toml or .json file.

    Raises UsageError ZI-1007 when there is neither, ZI-1008 when its content is no machine.
    """
    shipped = _SHIPPED / f"{name}.toml"
    if shipped.is_file():
        with resources.as_file(shipped) as path:
            return _machine(read_toml(path), name)
    if not Path(name).is_file():
        names = sorted(entry.name.removesuffix(".toml") for entry in _SHIPPED.iterdir())
        raise UsageError(
            "ZI-1007",
            f"no machine profile {name!r}: neither a file nor one of {', '.join(names)}",
            remedy=f"--machine {closest(name, names) or SIM_DEFAULT}",
        )
    if Path(name).suffix == ".json":
        return _machine(_read_json(Path(name)), name)
    return _machine(read_toml(Path(name)), name)


def profile_path() -> Path:
    """Where `zinfer doctor` saves what it measured here."""
    return cache_folder() / "machine.json"


def saved_machine() -> Machine | None:
    """What `zinfer doctor` measured here; None when nothing was saved, or hardware and software changed since."""
    if not profile_path().is_file():
        return None
    try:
        machine = _machine(_read_json(profile_path()), str(profile_path()))
    except UsageError:  # written by another version: as good as none
        return None
    return machine if machine.fingerprint == fingerprint() else None


def writable_profile() -> Path:
    """Where `saved_machine` looks, its folder made.  Raises MachineError ZI-5931 where nothing can be saved there."""
    path = profile_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
    refuse_unwritable(path)
    return path


def save_machine(machine: Machine) -> Path:
    """Write the profile where `saved_machine` finds it.  Raises MachineError ZI-5931."""
    path = writable_profile()
    with written_whole(path) as file:
        file.write(machine.model_dump_json(indent=1).encode() + b"\n")
    return path


def fingerprint() -> str:
    """What a measurement depends on: processor, cores we may use, kernel, torch, kernels, GPUs.  Imports no torch."""
    parts = [
        _cpu_name(),
        f"{len(os.sched_getaffinity(0))} cores",
        platform.release(),
        f"torch {_torch_version()}",
        f"kernels {_kernels_version()}",
    ]
    return " | ".join([*parts, *_gpu_names()])


@cache
def _torch_version() -> str:
    """Its metadata is a long text: milliseconds each time."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "none"


@cache
def _kernels_version() -> str:
    """By what is compiled: a profile of slower kernels foretells a slower machine and chooses for it."""
    digest = hashlib.sha256()
    for entry in sorted(_KERNELS.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith((".c", ".h")):
            digest.update(entry.read_bytes())
    return digest.hexdigest()[:8]


def _cpu_name() -> str:
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _gpu_names() -> list[str]:
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    lines = [line for gpu in gpus for line in _lines(gpu) if line.startswith(("Model", "GPU UUID"))]
    return [line.partition(":")[2].strip() for line in lines]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            "ZI-1008", f"{path} holds no machine profile: {error}", remedy="zinfer doctor"
        ) from error


def _machine(tree: Any, origin: str) -> Machine:
    try:
        return Machine.model_validate(tree)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise UsageError(
            "ZI-1008",
            f"{origin} holds no machine profile: {where}: {fault['msg']}",
            remedy=f"--machine {SIM_DEFAULT}, or write one with: zinfer doctor",
        ) from error
