"""A distillation for people.  In: figures per prefix, notes.  Out: report.md and, with matplotlib, report.png."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from zinfer.log import logger
from zinfer.students.measure import Figures
from zinfer.students.tensors import write_whole

REPORT, PICTURE = "report.md", "report.png"
COLUMNS = {
    "residual": "residual energy",
    "cosine": "cosine",
    "agreement": "agreement with the teacher",
    "accuracy": "accuracy",
    "teacher_accuracy": "the teacher's",
    "calibration": "calibration error",
}


def write_report(folder: Path, figures: Sequence[Figures], notes: Mapping[str, Any]) -> None:
    """Markdown always; the picture where matplotlib is installed, else the log says that it is not."""
    picture = _picture(figures)
    text = "\n".join(_lines(figures, notes, has_picture=picture is not None)) + "\n"
    write_whole(folder / REPORT, text.encode())
    if picture is not None:
        write_whole(folder / PICTURE, picture)


def _lines(figures: Sequence[Figures], notes: Mapping[str, Any], *, has_picture: bool) -> Iterator[str]:
    teacher, texts, settings = notes["teacher"], notes["texts"], notes["settings"]
    width = notes["width"]
    yield "# A group of students"
    yield ""
    yield (
        f"Teacher: {teacher['architecture']}, {teacher['layers']} layers, {teacher['parameters']} parameters. "
        f"Students: {len(figures)} of {settings['layers']} layers; {settings['students']} were asked for. "
        f"Heads {width['heads']} of {width['head_dim']} dimensions, {width['mlp']} neurons in a layer."
    )
    yield (
        f"Trained on {texts['train']} texts; weights and calibration found on {texts['held']} others; every figure "
        f"below is of {texts['dev']} texts that nothing was fitted to. Seed {settings['seed']}."
    )
    yield ""
    used = [name for name in COLUMNS if getattr(figures[0], name) is not None]
    yield "| students | " + " | ".join(COLUMNS[name] for name in used) + " |"
    yield "|--:|" + "--:|" * len(used)
    for one in figures:
        yield f"| {one.students} | " + " | ".join(f"{getattr(one, name):.4f}" for name in used) + " |"
    yield ""
    yield "Residual energy is what is left of the teacher's representation, 1 with no student at all."
    yield ""
    yield from _deferral_lines(figures)
    yield "## Rounds (before the polish)"
    yield ""
    yield "| student | taught by layers | factor | held-out residual before | after | gain | |"
    yield "|--:|---|--:|--:|--:|--:|---|"
    for one_round in notes["rounds"]:
        before, after = one_round["dev"]
        taught = ", ".join(map(str, one_round["layers"]))
        word = "kept" if one_round["kept"] else "dropped: it gains too little"
        yield (
            f"| {one_round['student']} | {taught} | {one_round['factor']:.4f} | {before:.5g} | {after:.5g} | "
            f"{one_round['gain']:.1%} | {word} |"
        )
    yield ""
    yield f"Polish: {notes['polish']}."
    if has_picture:
        yield ""
        yield f"![Figures per prefix]({PICTURE})"


def _deferral_lines(figures: Sequence[Figures]) -> Iterator[str]:
    """What a teacher behind all students buys."""
    table = figures[-1].deferral
    if table is None:
        return
    yield "## Deferring to the teacher (all students)"
    yield ""
    yield "| confidence below | share deferred | accuracy of the rest | of both together |"
    yield "|--:|--:|--:|--:|"
    for row in table:
        yield f"| {row['below']:.2f} | {row['share']:.1%} | {row['kept']:.4f} | {row['accuracy']:.4f} |"
    yield ""


def _picture(figures: Sequence[Figures]) -> bytes | None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        logger.warning("no %s: matplotlib is not installed (pip install 'zinfer[plots]')", PICTURE)
        return None
    drawn = Figure(figsize=(7, 3.2), layout="constrained")
    left, right = drawn.subplots(1, 2)
    students = [one.students for one in figures]
    left.plot(students, [one.residual for one in figures], "o-")
    left.set(xlabel="students", ylabel="residual energy", ylim=(0, None), xticks=students)
    for name in ("cosine", "agreement", "accuracy", "teacher_accuracy", "calibration"):
        values = [getattr(one, name) for one in figures]
        if values[0] is not None:
            right.plot(students, values, "o-", label=COLUMNS[name])
    right.set(xlabel="students", ylim=(0, 1.02), xticks=students)
    right.legend(fontsize=7)
    file = io.BytesIO()
    drawn.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()
