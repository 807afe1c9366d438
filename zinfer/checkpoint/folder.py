"""A model folder as hostile ground.  In: a path.  Out: names of regular files inside it, or a refusal."""

from __future__ import annotations

import difflib
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from zinfer.checkpoint.read import regular_size, unreadable
from zinfer.checkpoint.strict_json import shown
from zinfer.errors import CheckpointError

PICKLES = (".bin", ".pth", ".pt", ".pkl", ".ckpt")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder whose files are looked up by plain name; links may lead inside it or to its own cache's blobs.

    `real` is the folder with all links resolved, `blobs` the sibling folder of a Hugging Face cache entry
    (models--X--Y/{blobs,snapshots/<revision>}), None elsewhere.
    """

    path: Path
    real: Path
    blobs: Path | None
    names: frozenset[str]

    def file(self, name: str) -> Path | None:
        """The resolved path of a regular file, None where there is no such name.

        Raises CheckpointError ZI-4010 (no plain name), ZI-4011 (a link that leaves), ZI-4012 (not regular).
        """
        self._refuse_path(name)
        return self._inside(name) if name in self.names else None

    def nested(self, folder: str, name: str) -> Path | None:
        """As `file`, for a file in a folder directly inside this one."""
        self._refuse_path(folder)
        self._refuse_path(name)
        is_there = folder in self.names and os.path.lexists(self.real / folder / name)
        return self._inside(f"{folder}/{name}") if is_there else None

    def _refuse_path(self, name: str) -> None:
        if not is_plain_name(name):
            raise CheckpointError(
                "ZI-4010",
                f"{self.path}: {shown(name)} is no plain name of a file in this folder, so it was not opened",
                remedy="do not use this checkpoint; fetch the model from its publisher again",
            )

    def _inside(self, name: str) -> Path:
        target = Path(os.path.realpath(self.real / name))
        roots = [self.real] if self.blobs is None else [self.real, self.blobs]
        if not any(target.is_relative_to(root) for root in roots):
            raise CheckpointError(
                "ZI-4011",
                f"{self.path / name} is a link that leaves the model folder, so it was not followed",
                remedy=f"cp --remove-destination {quoted(target)} {quoted(self.path / name)}"
                "   # if you trust what it leads to",
            )
        regular_size(target)
        return target


def open_folder(path: Path) -> ModelFolder:
    """Look a model folder over by its names alone; nothing in it is opened.

    Raises CheckpointError ZI-4001 to ZI-4007, ZI-4019 and ZI-4022: what the path is instead, and what to do.
    """
    if not os.path.lexists(path):
        raise _missing(path)
    if not path.is_dir():
        raise _not_a_folder(path)
    real = Path(os.path.realpath(path))
    try:
        names = frozenset(os.listdir(real))
    except OSError as error:
        raise unreadable(path, error) from error
    cache = real.parent.parent
    in_cache = real.parent.name == "snapshots" and cache.name.startswith("models--")
    return ModelFolder(path, real, cache / "blobs" if in_cache else None, names)


def is_plain_name(name: str) -> bool:
    """Whether `name` can only be a file directly inside a folder."""
    return (
        0 < len(name.encode("utf-8", "surrogatepass")) <= 255
        and name.isprintable()
        and name not in {".", ".."}
        and "/" not in name
        and "\\" not in name
    )


def refuse_without_weights(folder: ModelFolder) -> None:
    """Say what a folder without safetensors is: LoRA, GGUF, pickles, a cache entry, or nothing."""
    where, names = folder.path, sorted(folder.names)
    refuse_adapter(folder)
    if ggufs := [name for name in names if name.lower().endswith(".gguf")]:
        raise _gguf(where / ggufs[0])
    if pickles := [name for name in names if name.lower().endswith(PICKLES)]:
        raise CheckpointError(
            "ZI-4004",
            f"{where} holds its weights only as pickles ({shown(pickles[0])}); opening one can run code",
            remedy="fetch the safetensors form: hf download ORG/NAME --include '*.safetensors*' '*.json'"
            f" --local-dir {quoted(where)}",
        )
    if "snapshots" in folder.names and "blobs" in folder.names:
        raise _cache_entry(folder)
    if "students.json" in folder.names:
        raise CheckpointError(
            "ZI-4022",
            f"{where} is a group of students, which labels texts or turns them into vectors",
            remedy=f"zinfer classify {quoted(where)} 'a text'",
        )
    if any(name.endswith(".safetensors") for name in names):
        raise CheckpointError(
            "ZI-4019",
            f"{where} has weight shards but neither model.safetensors nor model.safetensors.index.json",
            remedy=f"hf download ORG/NAME model.safetensors.index.json --local-dir {quoted(where)}",
        )
    if "config.json" not in folder.names:
        held = f"holds {len(names)} files, none of them" if names else "is empty: there is no"
        raise CheckpointError(
            "ZI-4006",
            f"{where} {held} config.json or model.safetensors",
            remedy=f"hf download ORG/NAME --local-dir {quoted(where)}",
        )


def refuse_adapter(folder: ModelFolder) -> None:
    """A LoRA is a difference to a model, not a model (ZI-4003)."""
    if "adapter_config.json" in folder.names and "config.json" not in folder.names:
        raise CheckpointError(
            "ZI-4003",
            f"{folder.path} holds a LoRA adapter (adapter_config.json), not a whole model",
            remedy="merge it into its base model (peft: merge_and_unload, save_pretrained), give that folder",
        )


def quoted(path: Path) -> str:
    """The path as a shell takes it."""
    return shlex.quote(str(path))


def _missing(path: Path) -> CheckpointError:
    parent = path.parent
    siblings = os.listdir(parent) if parent.is_dir() and os.access(parent, os.R_OK) else []
    close = difflib.get_close_matches(path.name, siblings, n=3, cutoff=0.5)
    if close:
        nearest = ", ".join(shown(name) for name in close)
        return CheckpointError(
            "ZI-4001",
            f"there is no {path}; beside it there is {nearest}",
            remedy=f"zinfer inspect {quoted(parent / close[0])}",
        )
    if not path.is_absolute() and len(path.parts) == 2:
        return CheckpointError(
            "ZI-4001",
            f"there is no folder {path}; zinfer reads folders and fetches nothing",
            remedy=f"hf download {quoted(path)} --local-dir {quoted(Path(path.name))}",
        )
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    return CheckpointError("ZI-4001", f"there is no {path}", remedy=f"ls {quoted(parent)}")


def _not_a_folder(path: Path) -> CheckpointError:
    if path.name.lower().endswith(".gguf"):
        return _gguf(path)
    regular_size(Path(os.path.realpath(path)))
    return CheckpointError(
        "ZI-4002",
        f"{path} is a file; the folder that holds config.json and the weights was wanted",
        remedy=f"zinfer inspect {quoted(path.parent)}",
    )


def _gguf(path: Path) -> CheckpointError:
    return CheckpointError(
        "ZI-4005",
        f"{path} is GGUF; zinfer reads safetensors in Hugging Face layout",
        remedy="fetch the model that it was made from: hf download ORG/NAME --local-dir NAME",
    )


def _cache_entry(folder: ModelFolder) -> CheckpointError:
    snapshots = folder.path / "snapshots"
    revisions = sorted(os.listdir(snapshots)) if snapshots.is_dir() else []
    newest = snapshots / revisions[-1] if revisions else snapshots
    return CheckpointError(
        "ZI-4018",
        f"{folder.path} is an entry of the Hugging Face cache; the model is one of its snapshots",
        remedy=f"zinfer inspect {quoted(newest)}",
    )
