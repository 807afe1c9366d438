"""Train the bundled classifier, teacher and students, on the standard library's source, on two CPU cores.

Enters: the standard library of the running interpreter.  Leaves: `teacher`, a BERT folder; `group`, what
`zinfer distill` makes of it; `test.jsonl`, 64 KiB of windows from files never trained on; and `RECORD.json`, which says
what was trained on what, for how long, and how good it is.

    python tools/train_demo_classifier.py --out zinfer/assets/classifier

Deterministic from --seed on one machine with one number of threads.  What a broken run had finished is taken up again
from --work; the distillation goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from demo_score import hits_of, paired
from demo_teacher import TeacherConfig, export_folder, token_ids, train_teacher
from demo_windows import (
    LABELS,
    Source,
    Split,
    Window,
    load_split,
    spliced,
    train_tokenizer,
    windows_of,
    write_rows,
)

from zinfer.config.load import load_settings
from zinfer.students.job import Distilled, distill
from zinfer.students.settings import DistillSettings

SLICE_BYTES = 65536
GROUP = DistillSettings(
    students=3,
    layers=2,
    width=3 / 64,
    mlp_width=1 / 4,
    epochs=0.75,
    polish=2,
    batch=32,
    lr=2e-3,
    polish_lr=0.75,
)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line (or `words`); the defaults are the settings of what is shipped."""
    parser = argparse.ArgumentParser(description="Train the bundled classifier.")
    parser.add_argument("--out", type=Path, required=True, help="folder of teacher, group and record")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "zinfer-demo-classifier")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--test-files", type=int, default=310)
    parser.add_argument("--test-windows", type=int, default=48, help="of a file at most")
    parser.add_argument("--train-windows", type=int, default=96, help="of a file at most, half overlapping")
    parser.add_argument("--spliced", type=float, default=0.5, help="share of the group's windows that are")
    parser.add_argument("--group-windows", type=int, default=18000, help="that the group learns from")
    parser.add_argument("--stdlib", type=Path, help="another folder of sources, for trials")
    for one in fields(TeacherConfig):
        name = "--teacher-" + one.name.replace("_", "-")
        parser.add_argument(name, type=type(one.default), default=one.default)
    for name in ("width", "mlp_width", "epochs", "polish", "lr", "polish_lr", "hidden"):
        parser.add_argument("--" + name.replace("_", "-"), type=float, default=getattr(GROUP, name))
    parser.add_argument("--students", type=int, default=GROUP.students)
    return parser.parse_args(words)


@dataclass(frozen=True)
class Made:
    """What a seed gave: where teacher and group lie, the group's own report, texts, seconds per stage."""

    teacher: Path
    group: Path
    distilled: Distilled
    rows: Path
    split: Split
    train: list[Window]
    test: list[Window]
    cpu_s: dict[str, float]


class Progress:
    """Lines with rate and ETA, at most one every few seconds."""

    def __init__(self, every_s: float = 10.0) -> None:
        self.every_s, self.stage, self.began, self.said, self.first = every_s, "", 0.0, 0.0, 0

    def __call__(self, done: int, total: int, stage: str, remark: str = "") -> None:
        """`done` of `total` steps of a stage."""
        now = time.monotonic()
        if stage != self.stage:
            self.stage, self.began, self.said, self.first = stage, now, now, done
        if now - self.said < self.every_s and done < total:
            return
        self.said = now
        rate = (done - self.first) / max(now - self.began, 1e-9)
        left = f"ETA {(total - done) / rate:.0f} s" if rate else "ETA unknown"
        print(f"{stage} {done}/{total} {rate:.1f}/s {left} {remark}", flush=True)


def teacher_config(args: argparse.Namespace) -> TeacherConfig:
    """The teacher's part of the command line."""
    return TeacherConfig(**{one.name: getattr(args, "teacher_" + one.name) for one in fields(TeacherConfig)})


def group_settings(args: argparse.Namespace, **changes: Any) -> DistillSettings:
    """The group's part of the command line."""
    names = ("students", "width", "mlp_width", "epochs", "polish", "lr", "polish_lr", "hidden", "seed")
    return DistillSettings(**(asdict(GROUP) | {name: getattr(args, name) for name in names} | changes))


def distil(
    teacher: Path, rows: Path, out: Path, settings: DistillSettings, threads: int, progress: Progress
) -> Distilled:
    """As `zinfer distill --resume` does; what the stages wrote stays."""
    flags = {"device": "cpu", "machine": "sim-default", "memory.host": "2GiB", "runtime.threads": threads}
    return distill(
        teacher,
        rows,
        out,
        settings=settings,
        engine=load_settings(None, flags=flags).settings,
        split_column="part",
        resume=True,
        keep_work=True,
        progress=progress,
    )


def make(args: argparse.Namespace, work: Path) -> Made:
    """Texts, teacher and group of one seed, in `work`; stages that are whole there are not done again."""
    progress = Progress()
    cpu_s: dict[str, float] = {}

    work.mkdir(parents=True, exist_ok=True)
    clock = work / "cpu_seconds.json"
    if clock.exists():  # of stages that an earlier run has done
        cpu_s |= json.loads(clock.read_text(encoding="utf-8"))

    def timed(name: str, stage: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = stage()
        cpu_s[name] = max(round(time.process_time() - began, 1), cpu_s.get(name, 0.0))
        clock.write_text(json.dumps(cpu_s), encoding="utf-8")
        print(f"{name}: {cpu_s[name]} CPU seconds", flush=True)
        return result

    torch.set_num_threads(args.threads)
    config, seed = teacher_config(args), args.seed
    split = load_split(seed, args.test_files, args.stdlib)
    tokenizer = train_tokenizer([one.text for one in split.train], config.vocab_size)

    def cut(files: list[Source], stride: int, most: int) -> list[Window]:
        return [w for one in files for w in windows_of(tokenizer, one, stride=stride, most=most, seed=seed)]

    def cut_all() -> tuple[list[Window], list[Window], list[Window]]:
        train = cut(split.train, 31, args.train_windows)
        return train, cut(split.test, 62, args.test_windows), cut(split.other, 31, args.train_windows)

    train, test, other = timed("windows", cut_all)
    rows, teacher, group = work / "train.jsonl", work / "teacher", work / "group"
    write_rows(rows, taught(train, other, args), with_part=True)
    key = json.dumps([asdict(config), seed, args.threads, split.sha256, len(train)])
    key_file = work / "teacher.key"

    def teach() -> None:
        ids = token_ids(tokenizer, [one.text for one in train])
        labels = [LABELS.index(one.label) for one in train]
        found = train_teacher(
            ids,
            labels,
            config,
            seed,
            lambda done, total, loss: progress(done, total, "teacher", f"{loss:.3f}"),
        )
        export_folder(found, tokenizer, teacher)
        key_file.write_text(key, encoding="utf-8")

    if not key_file.exists() or key_file.read_text(encoding="utf-8") != key:
        timed("teacher", teach)
    settings = group_settings(args)
    distilled = timed("group", lambda: distil(teacher, rows, group, settings, args.threads, progress))
    return Made(teacher, group, distilled, rows, split, train, test, cpu_s)


def taught(train: list[Window], other: list[Window], args: argparse.Namespace) -> list[Window]:
    """What the group learns from: the teacher's own windows, others that it has not seen, and spliced ones."""
    num_spliced = round(args.spliced * args.group_windows)
    mixed = spliced([*train, *other], num_spliced, args.seed)
    plain = [*train, *other]
    kept = random.Random(args.seed).sample(plain, min(args.group_windows - num_spliced, len(plain)))
    return [*kept, *mixed]


def make_record(args: argparse.Namespace, made: Made) -> dict[str, Any]:
    """What RECORD.json says of the corpus, the run, and the accuracy on files never seen."""
    files = [one.file for one in made.test]
    teacher = hits_of(made.teacher, made.test, threads=args.threads)
    count = len(made.distilled.figures)
    prefixes = [hits_of(made.group, made.test, students=m, threads=args.threads) for m in range(1, count + 1)]
    per_label = {
        label: round(float(prefixes[-1][[one.label == label for one in made.test]].mean()), 4)
        for label in LABELS
        if any(one.label == label for one in made.test)
    }
    return {
        "task": "which package of the standard library a window of 64 tokens is from",
        "corpus": {
            "source": "the standard library of the Python below, without its tests, split by file",
            "train_files": len(made.split.train),
            "test_files": len(set(files)),
            "train_windows": len(made.train),
            "test_windows": len(made.test),
            "train_files_per_label": dict(Counter(one.label for one in made.split.train)),
            "sha256_of_sorted_path_sha256_lines": made.split.sha256,
            "licence": "test.jsonl: CPython, Copyright (c) Python Software Foundation, PSF-2.0",
        },
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seed": args.seed,
        "teacher": asdict(teacher_config(args)),
        "group": asdict(group_settings(args)),
        "cpu_seconds": made.cpu_s,
        "test_accuracy": {
            "teacher": round(float(teacher.mean()), 4),
            **{f"students {m}": round(float(hits.mean()), 4) for m, hits in enumerate(prefixes, 1)},
        },
        "all_students_per_label": per_label,
        "all_students_minus_teacher": paired(prefixes[-1], teacher, files).to_dict(),
        "command": "python tools/train_demo_classifier.py --out OUT" + changed_arguments(args),
    }


def changed_arguments(args: argparse.Namespace) -> str:
    """The arguments that bear on the result and are not at their default, as on a command line."""
    usual = vars(parse_arguments(["--out", "OUT"]))
    changed = {k: v for k, v in vars(args).items() if k not in ("out", "work", "stdlib") and v != usual[k]}
    return "".join(f" --{name.replace('_', '-')} {value}" for name, value in changed.items())


def test_slice(windows: list[Window], seed: int) -> list[Window]:
    """Windows drawn from all test files, at most 64 KiB as JSON lines."""
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed)).tolist()
    kept, size = [], 0
    for number in order:
        size += len(json.dumps(windows[number].to_row(), ensure_ascii=False).encode()) + 1
        if size > SLICE_BYTES:
            break
        kept.append(windows[number])
    return kept


def export(made: Made, record: dict[str, Any], out: Path, seed: int) -> None:
    """The folder that is shipped."""
    out.mkdir(parents=True, exist_ok=True)
    for part in (made.teacher, made.group):
        shutil.rmtree(out / part.name, ignore_errors=True)
        shutil.copytree(part, out / part.name, ignore=shutil.ignore_patterns("work"))
    write_rows(out / "test.jsonl", test_slice(made.test, seed))
    (out / "RECORD.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train, measure, export."""
    args = parse_arguments()
    made = make(args, args.work)
    record = make_record(args, made)
    export(made, record, args.out, args.seed)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
