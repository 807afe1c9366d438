"""A checkpoint's table of contents.  In: a folder or config.json.  Out: name -> file, range, shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zinfer.checkpoint.folder import ModelFolder, open_folder, quoted, refuse_adapter, refuse_without_weights
from zinfer.checkpoint.header import LENGTH_BYTES, MAX_TENSORS, WeightEntry, header_bytes, parse_header
from zinfer.checkpoint.read import opened, read_into, read_range, regular_size
from zinfer.checkpoint.sentence import MODULES_FILE, POOLING_FILE, SENTENCE_FILE, nested_pooling
from zinfer.checkpoint.strict_json import MAX_JSON_BYTES, DuplicateKeyError, parse_object, shown
from zinfer.errors import CheckpointError, IntegrityError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
STORE_FILE = "zinfer.json"
JOURNAL_FILE = "zinfer.journal"
SIDE_FILES = (
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    MODULES_FILE,
    SENTENCE_FILE,
    POOLING_FILE,
)
MAX_SHARDS = 10_000
MAX_ALL_HEADERS_BYTES = 32 * 2**20  # over all shards; 160 shards with 91 000 tensors take 12 MB


@dataclass(frozen=True)
class CheckpointIndex:
    """What a model folder holds, every claim checked against the files; no weight has been read.

    `weights` maps published names to ranges of `files`.  It is empty for a lone config.json (a model can be
    planned from that) and for a finished zinfer store, whose own table says where its slices lie.
    """

    folder: Path
    config: dict[str, Any]
    generation_config: dict[str, Any] = field(default_factory=dict)
    side_files: Mapping[str, Path] = field(default_factory=dict)  # name -> resolved path of those that exist
    files: tuple[Path, ...] = ()  # resolved; `file_names` are what the folder calls them
    file_names: tuple[str, ...] = ()
    file_sizes: tuple[int, ...] = ()
    weights: Mapping[str, WeightEntry] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)  # published name -> dtype; of a store too
    is_store: bool = False

    @property
    def has_weights(self) -> bool:
        """Whether there is something to run; a lone config.json can only be planned."""
        return self.is_store or bool(self.weights)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(entry.nbytes for entry in self.weights.values())

    @classmethod
    def open(cls, path: str | Path) -> CheckpointIndex:
        """Open a model folder, or a lone config.json for planning.

        Reads JSON and headers only.  Raises CheckpointError ZI-4001 to ZI-4019 about the folder and its
        index, ZI-4101 to ZI-4114 about a header, IntegrityError ZI-6001 for an unfinished zinfer store,
        MachineError ZI-5041 where the system will not let a file be read.
        """
        path = Path(path)
        if path.suffix == ".json" and path.is_file():
            real = path.resolve()  # the user named it: a link to it is no trap
            config = _json_file(open_folder(real.parent), real.name)
            return cls(path.parent, config, side_files={CONFIG_FILE: real})
        folder = open_folder(path)
        refuse_unfinished(folder)
        refuse_adapter(folder)
        is_store = STORE_FILE in folder.names
        weight_map = {} if is_store else _weight_map(folder)
        shards = _store_shards(folder) if is_store else _shards(folder, weight_map)
        if not shards:
            refuse_without_weights(folder)
        if CONFIG_FILE not in folder.names:
            raise CheckpointError(
                "ZI-4007",
                f"{path} has weights but no config.json, which says what they mean",
                remedy=f"hf download ORG/NAME config.json --local-dir {quoted(path)}",
            )
        weights = {} if is_store else _weights(folder, shards, weight_map)
        dtypes = {name: entry.dtype for name, entry in weights.items()}
        found = {name: target for name in SIDE_FILES if (target := folder.file(name))}
        if pooling := nested_pooling(folder, found):
            found[POOLING_FILE] = pooling
        has_defaults = "generation_config.json" in found
        return cls(
            folder=path,
            config=_json_file(folder, CONFIG_FILE),
            generation_config=_json_file(folder, "generation_config.json") if has_defaults else {},
            side_files=found,
            files=tuple(shards.values()),
            file_names=tuple(shards),
            file_sizes=tuple(map(regular_size, shards.values())),
            weights=weights,
            dtypes=_store_dtypes(folder) if is_store else dtypes,
            is_store=is_store,
        )


def refuse_unfinished(folder: ModelFolder) -> None:
    """A store that was interrupted must not load (ZI-6001): it has a journal and no manifest yet."""
    if JOURNAL_FILE in folder.names and STORE_FILE not in folder.names:
        raise IntegrityError(
            "ZI-6001",
            f"{folder.path} is an unfinished zinfer store",
            remedy=f"zinfer shard MODEL --out {quoted(folder.path)}   # goes on where it was interrupted",
        )


def _weight_map(folder: ModelFolder) -> dict[str, str]:
    """What the index file says, tensor -> file name; empty where a single file makes it superfluous."""
    if SINGLE_FILE in folder.names or INDEX_FILE not in folder.names:
        return {}
    weight_map = _json_file(folder, INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise _bad_json(folder, INDEX_FILE, "ZI-4009", "its weight_map is not a map from tensor to file name")
    num_files = len(set(weight_map.values()))
    if not weight_map or len(weight_map) > MAX_TENSORS or num_files > MAX_SHARDS:
        sizes = f"its weight_map has {len(weight_map)} tensors in {num_files} files, allowed are 1 to"
        raise _bad_json(folder, INDEX_FILE, "ZI-4009", f"{sizes} {MAX_TENSORS} in {MAX_SHARDS}")
    return weight_map


def _shards(folder: ModelFolder, weight_map: dict[str, str]) -> dict[str, Path]:
    """Weight file names and resolved paths; a single file goes before an index, as upstream."""
    if single := folder.file(SINGLE_FILE):
        return {SINGLE_FILE: single}
    shards = {}
    for name in sorted(set(weight_map.values())):
        target = folder.file(name)
        if target is None:
            raise CheckpointError(
                "ZI-4013",
                f"{folder.path / INDEX_FILE} names the file {shown(name)}, which is not there",
                remedy=f"hf download ORG/NAME {quoted(Path(name))} --local-dir {quoted(folder.path)}",
            )
        shards[name] = target
    return shards


def _store_shards(folder: ModelFolder) -> dict[str, Path]:
    """Weight files of a zinfer store by their looks; whether they are the right ones its manifest says."""
    found = {name: folder.file(name) for name in sorted(folder.names) if name.endswith(".safetensors")}
    return {name: target for name, target in found.items() if target}


def _store_dtypes(folder: ModelFolder) -> dict[str, str]:
    """Published names and dtypes, which a spec needs before the manifest is read in full."""
    dtypes = _json_file(folder, STORE_FILE).get("dtypes")
    if not isinstance(dtypes, dict) or not all(isinstance(dtype, str) for dtype in dtypes.values()):
        raise _bad_json(folder, STORE_FILE, "ZI-4008", "its dtypes are no map from tensor to dtype")
    return dtypes


def _weights(
    folder: ModelFolder, shards: dict[str, Path], weight_map: dict[str, str]
) -> dict[str, WeightEntry]:
    """Every tensor of every shard; where an index exists it and the headers agree both ways."""
    weights: dict[str, WeightEntry] = {}
    headers_bytes = 0
    for file, (name, target) in enumerate(shards.items()):
        raw = _read_header(target, folder.path / name)
        headers_bytes += len(raw)
        if headers_bytes > MAX_ALL_HEADERS_BYTES:
            raise CheckpointError(
                "ZI-4105",
                f"{folder.path}: its headers together are larger than {MAX_ALL_HEADERS_BYTES} bytes",
                remedy="do not use this checkpoint; fetch the model from its publisher again",
            )
        room = MAX_TENSORS - len(weights)
        for entry in parse_header(raw, regular_size(target), str(folder.path / name), file, room):
            if entry.name in weights:
                both = f"{list(shards)[weights[entry.name].file]} and again in {name}"
                raise _disagree(folder, "ZI-4016", f"tensor {shown(entry.name)} is in {both}")
            weights[entry.name] = entry
    if weight_map:
        _check_agreement(folder, weight_map, weights, list(shards))
    return weights


def _read_header(target: Path, shown_path: Path) -> bytes:
    size = regular_size(target)
    with opened(target) as fd:
        first = bytearray(min(LENGTH_BYTES, size))
        read_into(fd, memoryview(first), 0, shown_path)
        raw = bytearray(header_bytes(bytes(first), size, str(shown_path)))
        read_into(fd, memoryview(raw), LENGTH_BYTES, shown_path)
    return bytes(raw)


def _check_agreement(
    folder: ModelFolder, weight_map: dict[str, str], weights: dict[str, WeightEntry], names: list[str]
) -> None:
    for tensor, name in weight_map.items():
        entry = weights.get(tensor)
        if entry is None or names[entry.file] != name:
            found = "no shard has it" if entry is None else f"it is in {names[entry.file]}"
            claim = f"the index puts tensor {shown(tensor)} into {shown(name)}"
            raise _disagree(folder, "ZI-4014", f"{claim}, but {found}")
    for tensor, entry in weights.items():
        if tensor not in weight_map:
            held = f"tensor {shown(tensor)} is in {names[entry.file]}"
            raise _disagree(folder, "ZI-4015", f"{held}, but the index does not list it")


def _disagree(folder: ModelFolder, code: str, what: str) -> CheckpointError:
    return CheckpointError(
        code,
        f"{folder.path}: {what}",
        remedy=f"hf download ORG/NAME --local-dir {quoted(folder.path)} --force-download"
        "   # index and shards of one revision",
    )


def _json_file(folder: ModelFolder, name: str) -> dict[str, Any]:
    target = folder.file(name)
    if target is None:
        raise _bad_json(folder, name, "ZI-4008", "it is not there")
    size = regular_size(target)
    if size > MAX_JSON_BYTES:
        raise _bad_json(folder, name, "ZI-4008", f"it has {size} bytes, the limit is {MAX_JSON_BYTES}")
    try:
        return parse_object(read_range(target, 0, size))
    except DuplicateKeyError as error:
        raise _bad_json(folder, name, "ZI-4017", str(error)) from None
    except ValueError as error:
        raise _bad_json(folder, name, "ZI-4008", f"it is not plain JSON: {error}") from None


def _bad_json(folder: ModelFolder, name: str, code: str, what: str) -> CheckpointError:
    return CheckpointError(
        code,
        f"{folder.path / name}: {what}",
        remedy=f"hf download ORG/NAME {quoted(Path(name))} --local-dir {quoted(folder.path)}"
        " --force-download",
    )
