"""Gather settings.  In: a TOML file, `ZINFER_*`, `--set path=value`, flags.  Out: Settings and where each came from."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zinfer.config.schema import Settings, closest, parse_settings, setting_paths, unknown_setting
from zinfer.errors import UsageError

_RESERVED = ("ZINFER_CACHE", "ZINFER_CONFIG")


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, and for each key that is not at its default who set it ("flag", "file x.toml", ...)."""

    settings: Settings
    origins: dict[str, str]


def load_settings(
    file: str | Path | None = None,
    *,
    sets: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Loaded:
    """Merge all sources; precedence flag > --set > ZINFER_* > file > default.

    `flags` maps paths such as "memory.device" to values, None meaning not given.  `file` defaults to ZINFER_CONFIG.
    Relative `model`, `memory.disk` and machine files in a file count from that file's folder.
    Raises UsageError ZI-1002 to ZI-1006.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    file = file or environ.get("ZINFER_CONFIG")
    layers = [
        (_from_file(Path(file)), f"file {file}") if file else ({}, ""),
        (_from_environment(environ), "environment"),
        (dict(_assignment(text) for text in sets), "--set"),
        ({path: value for path, value in (flags or {}).items() if value is not None}, "flag"),
    ]
    for layer, origin in layers:
        values |= layer
        origins |= dict.fromkeys(layer, origin)
    known = {name for path in setting_paths() for name in (path, path.partition(".")[0])}
    for path in values:
        if path not in known:
            raise unknown_setting(path, f" (from {origins[path]})")
    return Loaded(parse_settings(_nested(values), origins), origins)


def cache_folder(environ: Mapping[str, str] | None = None) -> Path:
    """Where zinfer keeps machine profiles: ZINFER_CACHE, else XDG_CACHE_HOME/zinfer, else ~/.cache/zinfer."""
    environ = os.environ if environ is None else environ
    if chosen := environ.get("ZINFER_CACHE"):
        return Path(chosen)
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zinfer"


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a tree.  Raises UsageError ZI-1004 when it cannot be read, ZI-1005 when it is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            "ZI-1004", f"{path} cannot be read: {error.strerror}", remedy=f"ls -l {path.parent}"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            "ZI-1005", f"{path} is not TOML: {error}", remedy='keys look like: device = "cpu"'
        ) from error


def _from_file(path: Path) -> dict[str, Any]:
    values = _flat(read_toml(path))
    for key in ("model", "memory.disk", "machine"):
        value = values.get(key)
        if isinstance(value, str) and (key != "machine" or Path(value).suffix):
            values[key] = str(path.parent / value)
    return values


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    paths = {f"ZINFER_{path.upper().replace('.', '_')}": path for path in setting_paths()}
    values = {}
    for name, value in environ.items():
        if name.startswith("ZINFER_") and name not in _RESERVED:
            if name not in paths:
                guess = closest(name, [*paths, *_RESERVED])
                raise UsageError(
                    "ZI-1002",
                    f"unknown setting {name!r} in the environment"
                    + (f": did you mean {guess!r}?" if guess else ""),
                    remedy=f"unset {name}",
                )
            values[paths[name]] = value
    return values


def _assignment(text: str) -> tuple[str, str]:
    path, equals, value = text.partition("=")
    if not equals:
        raise UsageError(
            "ZI-1006", f"--set wants path=value, {text!r} was given", remedy="--set memory.host=80%"
        )
    return path.strip(), value.strip()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in tree.items():
        values |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return values


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *groups, name = path.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
            if not isinstance(node, dict):
                raise UsageError(
                    "ZI-1003",
                    f"{group} is set both to a value and to a table",
                    remedy="--set memory.host=80%",
                )
        node[name] = value
    return tree
