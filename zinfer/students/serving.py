"""A group of students as a service.  In: its folder, a budget.  Out: representations and logits of encoded texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zinfer.checkpoint.folder import open_folder
from zinfer.checkpoint.index import CONFIG_FILE, SIDE_FILES
from zinfer.checkpoint.sentence import read_object, sentence_files
from zinfer.config.limits import memory_limits
from zinfer.config.profiles import SIM_DEFAULT, load_machine
from zinfer.config.resolve import Resolved, resolve
from zinfer.config.schema import Settings
from zinfer.errors import CheckpointError, MachineError, UsageError
from zinfer.kernels.native.encoder import packed_bytes, serves
from zinfer.layers.packed import Packed
from zinfer.memory.ledger import Ledger
from zinfer.plan.records import Tier
from zinfer.runtime.texts import group_texts, in_order, pack_texts
from zinfer.spec.encoder import with_sentence_files
from zinfer.spec.read import read_spec
from zinfer.students.bank import StudentBank
from zinfer.students.group import MANIFEST, read_group
from zinfer.students.members import COMMON, part_of
from zinfer.students.spread import Collective, CopyingCollective, SpreadBank
from zinfer.students.student import encoder_of
from zinfer.students.tensors import read_sizes
from zinfer.tokenizer import Encoded, Tokenizer, load_tokenizer

MAX_ROWS, MAX_BATCH = 1024, 64  # larger passes fall out of the caches: a token costs up to half as much again
_ALIVE = 12  # activations of a pass are at most so many times rows x MLP width, per student


class _Files:
    """The folder's small files, as the tokenizer asks for them."""

    def __init__(self, side_files: dict[str, Path]) -> None:
        self.side_files = side_files


def is_group(path: Path) -> bool:
    """Whether a folder holds a group of students and not a model."""
    return (path / MANIFEST).is_file()


class GroupService:
    """A group resident for good: its bytes are in the ledgers before it is built, and nothing is ever evicted.

    It lives in host memory, or on the device of the settings and then counts against the device's budget; `devices`
    spreads the students over several, whose results `collective` adds up.  `is_degraded`: a damaged group serves with
    its first whole students.  Safe to call from several threads.

    Raises IntegrityError ZI-6091 to ZI-6093 for a damaged group, BudgetError ZI-2401 where it does not fit, UsageError
    ZI-1159 for more students than it has, ZI-1164 for fewer than devices, MachineError ZI-5001, ZI-5342 for a device
    that is not there.
    """

    def __init__(
        self,
        path: Path,
        settings: Settings,
        num_students: int | None = None,
        *,
        devices: Sequence[str] = (),
        collective: Collective | None = None,
        is_degraded: bool = False,
    ) -> None:
        folder = open_folder(path)
        side_files = {name: found for name in SIDE_FILES if (found := folder.file(name))}
        if CONFIG_FILE not in side_files or (weights := folder.file("students.safetensors")) is None:
            raise CheckpointError(
                "ZI-4939", f"{path} lacks config.json or students.safetensors", remedy=f"copy {path} again"
            )
        tokenizer = load_tokenizer(_Files(side_files))
        if tokenizer is None:
            raise CheckpointError("ZI-4601", f"{path} has no tokenizer.json", remedy=f"copy {path} again")
        # The published names say whether the teacher's checkpoint left its prefix out.
        sizes = read_sizes(weights)
        names = [name.removeprefix("shared/") for name in sizes]
        teacher = read_spec(read_object(side_files[CONFIG_FILE]), None, dict.fromkeys(names, "F32"))
        teacher = with_sentence_files(teacher, *sentence_files(side_files))
        self.resolved = resolved_for(settings)
        torch.set_num_threads(self.resolved.threads)
        self.folder, self.spec, self.encoder, self.settings = path, teacher, encoder_of(teacher), settings
        self.tokenizer: Tokenizer = tokenizer
        self.max_tokens = self.encoder.max_tokens or teacher.max_context
        self.devices = tuple(devices) or (
            self.resolved.device if self.resolved.device.startswith("cuda") else "cpu",
        )
        _check_devices(self.devices)
        self.ledger = self._ledger(sizes)
        group, self.manifest = read_group(path, teacher, is_degraded=is_degraded)
        self.written = int(self.manifest["students"])
        rows_bytes = _ALIVE * 4 * MAX_ROWS * teacher.mlp_dim
        self.ledger.reserve("activations", rows_bytes * -(-len(group.students) // len(self.devices)))
        self.bank: StudentBank | SpreadBank
        if len(self.devices) > 1:
            self.bank = SpreadBank(group, self.devices, collective or CopyingCollective())
        else:
            self.bank = bank = StudentBank(group, self.devices[0])
            self._compile(bank)
        self.num_students = self.checked(num_students)

    def _compile(self, bank: StudentBank) -> None:
        """Pack the students for compiled code, where that is to be had and the budget has room for a second copy."""
        nbytes = bank.num_students * packed_bytes(bank.spec)
        if bank.forms is None or not serves(bank.spec) or nbytes > self.ledger.free_bytes:
            return
        self.ledger.reserve("packed students", nbytes)
        bank.forms.compile(self.resolved.lanes)

    def _ledger(self, sizes: Mapping[str, int]) -> Ledger:
        """Of the memory that the students live in; with several devices of the one that holds most."""
        parts: Counter[str] = Counter()
        for name, nbytes in sizes.items():
            parts[part_of(name)] += nbytes
        common = parts.pop(COMMON, 0)
        weights_bytes = common + sum(list(parts.values())[:: len(self.devices)])
        if self.devices[0].startswith("cuda"):
            ledger = Ledger(Tier.DEVICE, self.resolved.device_bytes)
        else:
            ledger = Ledger(Tier.HOST, self.resolved.host_bytes)
        ledger.reserve("students", weights_bytes)
        return ledger

    def warm_up(self) -> None:
        """On a device: record passes of every size for every number of students; they replay from then on."""
        if any(device.startswith("cuda") for device in self.devices):
            self.bank.warm_up(range(1, self.num_students + 1))

    def beside(self, settings: Settings) -> Settings:
        """The same settings for an engine that runs beside the group: what the group holds is taken off its budget."""
        tier = "device" if self.ledger.tier is Tier.DEVICE else "host"
        memory = settings.memory.model_copy(update={tier: self.ledger.free_bytes})
        return settings.model_copy(update={"memory": memory})

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
            batch = self._packed([texts[number] for number in numbers])
            yield (numbers, *self.bank.answer(batch, num_students or self.num_students))

    def answer(self, texts: Sequence[Encoded], num_students: int) -> tuple[Tensor, Tensor | None]:
        """(representations [S, D], calibrated logits [S, C] or None) in the order of the texts."""
        if len(texts) <= MAX_BATCH and sum(len(text.ids) for text in texts) <= MAX_ROWS:
            # One pass needs no sorting and no way back.
            return self.bank.answer(self._packed(texts), num_students)
        return in_order(self.passes(texts, num_students))

    def _packed(self, texts: Sequence[Encoded]) -> Packed:
        batch = pack_texts(texts, has_segments=self.encoder.num_segments > 1)
        assert batch.num_rows == sum(len(text.ids) for text in texts), "no row is padding"
        return batch

    def about(self) -> dict[str, Any]:
        """What a JSON result says of who answered."""
        return {
            "students": self.num_students,
            "of": self.written,
            "bytes": self.bank.nbytes,
            "prefixes": self.manifest.get("prefixes", []),
        }

    def close(self) -> None:
        """End the threads; what remains is memory."""
        self.bank.close()


def resolved_for(settings: Settings) -> Resolved:
    """Device, budgets and threads; a group needs no rates, so nothing is measured."""
    machine, free = load_machine(SIM_DEFAULT), None
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_gpus and settings.device not in ("cpu", "sim"):
        at = settings.device.partition(":")[2]
        free, total = torch.cuda.mem_get_info(int(at) if at and int(at) < num_gpus else 0)
        machine = machine.model_copy(update={"device_bytes": total})
    return resolve(settings, machine, limits=memory_limits(), num_gpus=num_gpus, free_device_bytes=free)


def _check_devices(devices: Sequence[str]) -> None:
    """Raises MachineError ZI-5342 for a device that is not there."""
    there = {"cpu", *(f"cuda:{at}" for at in range(torch.cuda.device_count()))}
    missing = [device for device in devices if device not in there]
    if missing:
        raise MachineError(
            "ZI-5342",
            f"students were to live on {missing[0]}, there are {', '.join(sorted(there))}",
            remedy="--device cpu",
        )
