"""Files of a sentence-transformers folder.  In: a folder, resolved side files.  Out: their parsed contents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zinfer.checkpoint.folder import ModelFolder, quoted
from zinfer.checkpoint.read import read_range, regular_size
from zinfer.checkpoint.strict_json import MAX_JSON_BYTES, parse_object
from zinfer.errors import CheckpointError

MODULES_FILE = "modules.json"
SENTENCE_FILE = "sentence_bert_config.json"
POOLING_FILE = (
    "pooling.json"  # our own name for the pooling module's config.json: a store has no folders inside
)


def nested_pooling(folder: ModelFolder, found: Mapping[str, Path]) -> Path | None:
    """The config of the pooling module that modules.json names; None where there is none, or a store has it already.

    Raises CheckpointError ZI-4020 for a modules.json that is no list, ZI-4010 to ZI-4012 for where it leads.
    """
    if MODULES_FILE not in found or POOLING_FILE in found:
        return None
    for module in _list(found[MODULES_FILE]):
        if isinstance(module, dict) and str(module.get("type")).endswith(".Pooling"):
            return folder.nested(str(module.get("path")), "config.json")
    return None


def sentence_files(side_files: Mapping[str, Path]) -> tuple[list[Any] | None, dict[str, Any], dict[str, Any]]:
    """(modules.json, the pooling's config, sentence_bert_config.json); None and empty where they are not there.

    Raises CheckpointError ZI-4020 for one that is not JSON of the right kind.
    """
    modules = _list(side_files[MODULES_FILE]) if MODULES_FILE in side_files else None
    pooling, sentence = (
        read_object(side_files[name]) if name in side_files else {} for name in (POOLING_FILE, SENTENCE_FILE)
    )
    return modules, pooling, sentence


def _list(path: Path) -> list[Any]:
    value = read_object(path, b'{"modules":', b"}").get("modules")
    if not isinstance(value, list):
        raise _bad(path, f"a list was wanted at the top, it is a {type(value).__name__}")
    return value


def read_object(path: Path, before: bytes = b"", after: bytes = b"") -> dict[str, Any]:
    """The JSON object in a small file, with what is put around it first.  Raises CheckpointError ZI-4020."""
    size = regular_size(path)
    if size > MAX_JSON_BYTES:
        raise _bad(path, f"it has {size} bytes, the limit is {MAX_JSON_BYTES}")
    try:
        return parse_object(before + read_range(path, 0, size) + after)
    except ValueError as error:
        raise _bad(path, f"it is not plain JSON: {error}") from None


def _bad(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        "ZI-4020",
        f"{path}: {what}",
        remedy=f"hf download ORG/NAME --local-dir {quoted(path.parent)} --force-download",
    )
