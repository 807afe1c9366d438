"""A whole distillation.  In: a teacher's folder, a table, an empty folder.  Out: a folder that Classifier serves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from zinfer.checkpoint.index import CONFIG_FILE, CheckpointIndex
from zinfer.checkpoint.read import read_range, regular_size, sha256_file
from zinfer.config.schema import Settings
from zinfer.errors import MachineError, UsageError
from zinfer.runtime.engine import open_executor
from zinfer.runtime.model import Model, open_model
from zinfer.runtime.stats import Stats
from zinfer.spec.records import Encoder
from zinfer.students.corpus import Corpus, read_corpus
from zinfer.students.distill import Distillation
from zinfer.students.group import MANIFEST, write_group
from zinfer.students.measure import Figures
from zinfer.students.report import write_report
from zinfer.students.settings import DistillSettings, segments
from zinfer.students.student import encoder_of, width_of
from zinfer.students.teacher import TeacherStates, teacher_states
from zinfer.students.tensors import write_whole

WORK = "work"
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Distilled:
    """What came out: the folder, figures per prefix on texts never trained on, and what happened on the way."""

    folder: Path
    figures: list[Figures]
    notes: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The documented JSON form."""
        return {"folder": str(self.folder), "prefixes": [asdict(one) for one in self.figures], **self.notes}


def distill(
    teacher: Path,
    data: Path,
    out: Path,
    *,
    settings: DistillSettings,
    engine: Settings,
    text_column: str = "text",
    pair_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
    resume: bool = False,
    keep_work: bool = False,
    progress: Progress,
    save_every: int = 100,
) -> Distilled:
    """Distil `teacher`, which may be larger than the memory that `engine` grants, into a group of students in `out`.

    `split_column` names what a text is from, and texts are then held out by it (`corpus.read_corpus`).
    With `resume` an interrupted run goes on, and ends in the same bytes.  `keep_work` leaves what the stages wrote in
    `out`/work, the students before the polish among it.  Raises UsageError ZI-1151 to ZI-1161, ZI-1191, ZI-1192,
    CheckpointError for the teacher and the data, MachineError where the disk is too small.
    """
    if resume and (done := _finished(out, settings, keep_work=keep_work)):
        return done
    model = open_model(teacher, engine)
    encoder = _checked(teacher, model, label_column)
    layers = segments(model.spec.num_layers, settings.students, settings.layers)
    corpus = read_corpus(
        data,
        model.need_tokenizer(),
        model.max_text_tokens,
        encoder.labels,
        seed=settings.seed,
        text_column=text_column,
        pair_column=pair_column,
        label_column=label_column,
        split_column=split_column,
    )
    index = CheckpointIndex.open(teacher)
    sizes = [regular_size(path) for path in index.files]
    whose = f"{sha256_file(index.side_files[CONFIG_FILE])} {sizes}"
    _begin(out, f"{settings.fingerprint()} {corpus.digest} {whose}", resume=resume)
    states = _teacher_states(model, corpus, sorted({n for own in layers for n in own}), out, progress)
    torch.set_num_threads(model.resolved.threads)
    run = Distillation(
        model.spec, model.source, corpus, states, settings, out / WORK, progress, save_every=save_every
    )
    group, figures, notes = run.run()
    notes |= {
        "width": asdict(width_of(group.spec)),
        "settings": asdict(settings),
        "texts": {"train": len(corpus.train), "held": len(corpus.held), "dev": len(corpus.dev)},
        "teacher": {
            "architecture": model.spec.architecture,
            "layers": model.spec.num_layers,
            "parameters": model.spec.num_parameters,
        },
    }
    for name, path in index.side_files.items():
        write_whole(out / name, read_range(path, 0, regular_size(path)))
    write_report(out, figures, notes)
    write_group(group, out, notes | {"prefixes": [asdict(one) for one in figures]})
    if not keep_work:
        shutil.rmtree(out / WORK)
    return Distilled(out, figures, notes)


def _checked(teacher: Path, model: Model, label_column: str | None) -> Encoder:
    """The teacher as an encoder that students can be made of.  Raises UsageError ZI-1155, ZI-1156, ZI-1160, ZI-1161."""
    encoder = model.spec.encoder
    if encoder is None:
        raise UsageError(
            "ZI-1155",
            f"{teacher} is a {model.spec.architecture}; a teacher that is an encoder was wanted",
            remedy="--teacher a BERT, RoBERTa, DistilBERT or ELECTRA folder",
        )
    if label_column is not None and not encoder.labels:
        raise UsageError(
            "ZI-1156", f"{teacher} has no classes, so labels mean nothing to it", remedy="no --label-column"
        )
    if model.spec.weights != "published":
        raise UsageError(
            "ZI-1161",
            f"{teacher} holds its matrices as {model.spec.weights}; students begin as copies of published ones",
            remedy="--teacher the folder that the store was made from",
        )
    if encoder.labels and encoder.scoring == "none":
        raise UsageError(
            "ZI-1160",
            f"{teacher} predicts numbers and no classes",
            remedy="a teacher of classes or embeddings",
        )
    return encoder


def _finished(out: Path, settings: DistillSettings, *, keep_work: bool) -> Distilled | None:
    """What an earlier run with these settings ended in, its leftovers removed; None where it has not ended."""
    if not (out / MANIFEST).exists():
        return None
    notes = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    # What an older version did not write down, it did as the defaults say.
    if asdict(DistillSettings()) | notes.get("settings", {}) != asdict(settings):
        return None
    if not keep_work:
        shutil.rmtree(out / WORK, ignore_errors=True)
    return Distilled(out, [Figures(**one) for one in notes.pop("prefixes")], notes)


def _begin(out: Path, key: str, *, resume: bool) -> None:
    """An empty folder, or one that holds an interrupted run with the same settings and texts."""
    key_file = out / WORK / "run.json"
    if (out / MANIFEST).exists():
        raise UsageError(
            "ZI-1157", f"{out} holds a finished group", remedy="--out another folder, or remove this one"
        )
    if key_file.exists():
        held = json.loads(key_file.read_text())
        if resume and held == key:
            return
        what = "with other settings or texts" if resume else "and --resume was not given"
        raise UsageError(
            "ZI-1158",
            f"{out} holds an interrupted distillation {what}",
            remedy="the same command with --resume" if not resume else f"rm -r {out}   # to begin anew",
        )
    try:
        (out / WORK).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(
            "ZI-5934", f"{out} cannot be made: {error.strerror}", remedy="--out another folder"
        ) from error
    write_whole(key_file, json.dumps(key).encode())


def _teacher_states(
    model: Model, corpus: Corpus, layers: list[int], out: Path, progress: Progress
) -> TeacherStates:
    """Through the offload engine, which is closed before the training begins."""
    plan = model.plan()
    encoder_of(model.spec)
    manager, executor = open_executor(model, plan, Stats(plan.forecast))
    try:
        return teacher_states(
            executor,
            corpus,
            layers,
            out / WORK / "teacher",
            max_rows=plan.workload.prefill_rows,
            max_batch=plan.workload.batch,
            progress=progress,
        )
    finally:
        manager.close()
