"""A group of students as a service.  In: its folder, a budget.  Out: representations and logits of encoded texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zinfer.checkpoint.folder import open_folder
from zinfer.checkpoint.index import CONFIG_FILE, SIDE_FILES
from zinfer.checkpoint.read import regular_size
from zinfer.checkpoint.sentence import read_object, sentence_files
from zinfer.config.limits import memory_limits
from zinfer.config.profiles import SIM_DEFAULT, load_machine
from zinfer.config.resolve import resolve
from zinfer.config.schema import Settings
from zinfer.errors import CheckpointError, UsageError
from zinfer.memory.ledger import Ledger
from zinfer.plan.records import Tier
from zinfer.runtime.texts import group_texts, in_order, pack_texts
from zinfer.spec.encoder import with_sentence_files
from zinfer.spec.read import read_spec
from zinfer.students.bank import StudentBank
from zinfer.students.group import MANIFEST, read_group
from zinfer.students.student import encoder_of
from zinfer.students.tensors import read_tensors
from zinfer.tokenizer import Encoded, Tokenizer, load_tokenizer

MAX_ROWS, MAX_BATCH = 2048, 64
_ALIVE = 12  # activations of a pass are at most so many times rows x MLP width, per student


class _Files:
    """The folder's small files, as the tokenizer asks for them."""

    def __init__(self, side_files: dict[str, Path]) -> None:
        self.side_files = side_files


def is_group(path: Path) -> bool:
    """Whether a folder holds a group of students and not a model."""
    return (path / MANIFEST).is_file()


class GroupService:
    """A group resident for good: its bytes are in the host ledger before it is built, and nothing is ever evicted.

    Raises IntegrityError ZI-6091, ZI-6092 for a damaged group, BudgetError ZI-2401 where it does not fit, UsageError
    ZI-1159 for more students than it has.
    """

    def __init__(self, path: Path, settings: Settings, num_students: int | None = None) -> None:
        folder = open_folder(path)
        side_files = {name: found for name in SIDE_FILES if (found := folder.file(name))}
        if CONFIG_FILE not in side_files or (weights := folder.file("students.safetensors")) is None:
            raise CheckpointError(
                "ZI-4939", f"{path} lacks config.json or students.safetensors", remedy=f"copy {path} again"
            )
        # The published names say whether the teacher's checkpoint left its prefix out.
        names = [name.removeprefix("shared/") for name in read_tensors(weights)[0]]
        teacher = read_spec(read_object(side_files[CONFIG_FILE]), None, dict.fromkeys(names, "F32"))
        teacher = with_sentence_files(teacher, *sentence_files(side_files))
        resolved = resolve(settings, load_machine(SIM_DEFAULT), limits=memory_limits())
        torch.set_num_threads(resolved.threads)
        self.folder, self.spec, self.encoder = path, teacher, encoder_of(teacher)
        self.max_tokens = self.encoder.max_tokens or teacher.max_context
        self.ledger = Ledger(Tier.HOST, resolved.host_bytes)
        self.ledger.reserve("students", regular_size(weights))
        group, self.manifest = read_group(path, teacher)
        self.ledger.reserve("activations", _ALIVE * 4 * MAX_ROWS * teacher.mlp_dim * len(group.students))
        self.bank = StudentBank(group)
        self.num_students = self.checked(num_students)
        tokenizer = load_tokenizer(_Files(side_files))
        if tokenizer is None:
            raise CheckpointError("ZI-4601", f"{path} has no tokenizer.json", remedy=f"copy {path} again")
        self.tokenizer: Tokenizer = tokenizer

    def checked(self, num_students: int | None) -> int:
        """How many students answer: as many as were asked for, by default all."""
        most = self.bank.num_students
        if num_students is not None and not 1 <= num_students <= most:
            raise UsageError(
                "ZI-1159",
                f"{num_students} students were asked for, {self.folder} has {most}",
                remedy=f"--students {most}",
            )
        return num_students or most

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes; empty for a group of embeddings."""
        return self.encoder.labels

    def passes(
        self, texts: Sequence[Encoded], num_students: int | None = None
    ) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
        """(numbers of texts, representations [n, D], calibrated logits [n, C] or None) of each pass."""
        for numbers in group_texts([len(text.ids) for text in texts], MAX_ROWS, MAX_BATCH):
            batch = pack_texts([texts[number] for number in numbers])
            batch = batch if self.encoder.num_segments > 1 else batch.without_segments()
            yield (numbers, *self.bank.answer(batch, num_students or self.num_students))

    def answer(self, texts: Sequence[Encoded], num_students: int) -> tuple[Tensor, Tensor | None]:
        """(representations [S, D], calibrated logits [S, C] or None) in the order of the texts."""
        return in_order(self.passes(texts, num_students))

    def about(self) -> dict[str, Any]:
        """What a JSON result says of who answered."""
        return {
            "students": self.num_students,
            "of": self.bank.num_students,
            "bytes": self.bank.nbytes,
            "prefixes": self.manifest.get("prefixes", []),
        }

    def close(self) -> None:
        """End the threads; what remains is memory."""
        self.bank.close()
