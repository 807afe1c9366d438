"""Are students as good as their teacher?  In: seeds.  Out: one record: accuracy on files never seen, with bounds.

usage: students_quality.py [--seeds 1,2,3] [--work DIR] [--quick] [options of tools/train_demo_classifier.py]

For every seed the bundled classifier is made anew as tools/train_demo_classifier.py makes it: split by file,
tokenizer, teacher, group.  Beside the group stand its own students before any polish (`--polish 1`; what is shipped
has none), and one student of the same depth trained for as many steps as all of them together.  Every difference is
of the same windows and is bootstrapped by file.  What is whole in --work is not made again, so seeds may be run one at
a time; a last run over all of them writes the record.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from harness import RESULTS, ROOT, Record

sys.path.append(str(ROOT / "tools"))

import torch
import train_demo_classifier as tool
from demo_score import Hits, hits_of, paired

from zinfer.config.load import load_settings
from zinfer.runtime.model import open_model
from zinfer.students.group import Group, read_group, write_group
from zinfer.students.student import head_names
from zinfer.students.teacher import read_weights
from zinfer.students.tensors import read_tensors

NEAR, WITHIN, LEAST_GAIN, SURE = -0.01, 0.05, 0.05, 0.05
QUICK = ["--teacher-steps", "20", "--test-files", "60", "--train-windows", "4", "--test-windows", "4"]


def before_the_polish(teacher: Path, group: Path, out: Path) -> Path:
    """A group of the students as their rounds left them, with the teacher's own head and no calibration."""
    engine = load_settings(None, flags={"device": "cpu", "machine": "sim-default"}).settings
    model = open_model(teacher, engine)
    found, _ = read_group(group, model.spec)
    students, factors = [], []
    for k in range(len(found.students)):
        held, _ = read_tensors(group / "work" / f"round-{k + 1}.safetensors")
        held.pop("answers")
        factors.append(held.pop("factor"))
        students.append(held)
    head = read_weights(model.source, head_names(model.spec))
    return written(replace(found, head=head, students=students, factors=factors), group, out)


def written(group: Group, like: Path, out: Path) -> Path:
    """The group as a folder, its logits as the head gives them."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(like, out, ignore=shutil.ignore_patterns("work", "students.*", "report.*"))
    count = len(group.students)
    plain = replace(group, temperatures=torch.ones(count), biases=torch.zeros_like(group.biases))
    write_group(plain, out, {})
    return out


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """One seed: everything made, everything measured."""
    made = tool.make(args, work)
    count, threads = len(made.distilled.figures), args.threads
    long = tool.group_settings(args, students=1, epochs=args.epochs * args.students, polish=0)
    tool.distil(made.teacher, made.rows, work / "control", long, threads, tool.Progress())
    boosted = before_the_polish(made.teacher, made.group, work / "boosted")
    control = before_the_polish(made.teacher, work / "control", work / "plain-control")
    hits: dict[str, Hits] = {
        "teacher": hits_of(made.teacher, made.test, threads=threads),
        "one student, trained as long": hits_of(control, made.test, threads=threads),
    }
    for name, folder in (("boosted", boosted), ("group", made.group)):
        for m in range(1, count + 1):
            hits[f"{name} {m}"] = hits_of(folder, made.test, students=m, threads=threads)
    files = [one.file for one in made.test]
    row = summary(hits, files, count) | {
        "seed": args.seed,
        "files": len(set(files)),
        "windows": len(files),
        "cpu_s": made.cpu_s,
        "corpus_sha256": made.split.sha256,
        "rounds": made.distilled.notes["rounds"],
        "polish": made.distilled.notes["polish"],
        "prefixes_on_dev": [asdict(one) for one in made.distilled.figures],
    }
    (work / "measured.json").write_text(json.dumps(row, indent=1))
    return row


def summary(hits: dict[str, Hits], files: Sequence[str], count: int) -> dict[str, Any]:
    """Accuracies, and the differences that are asked for."""
    pairs = {
        "group_minus_teacher": (f"group {count}", "teacher"),
        "boosted_minus_first": (f"boosted {count}", "boosted 1"),
        "boosted_minus_one_as_long": (f"boosted {count}", "one student, trained as long"),
        "group_minus_boosted": (f"group {count}", f"boosted {count}"),
    }
    return {
        "accuracy": {name: float(found.mean()) for name, found in hits.items()},
        **{name: paired(hits[ours], hits[theirs], files).to_dict() for name, (ours, theirs) in pairs.items()},
    }


def checks(row: dict[str, Any]) -> dict[str, bool]:
    """What was promised of a seed, and whether it holds."""
    accuracy, rounds = row["accuracy"], row["rounds"]
    kept = [one for one in rounds if one["kept"]]
    whole = [accuracy[f"group {m}"] for m in range(1, len(kept) + 1)]
    return {
        "at least 5,000 windows of at least 300 files": row["windows"] >= 5000 and row["files"] >= 300,
        "group - teacher, lower 95 % bound >= -1 point": row["group_minus_teacher"]["low"] >= NEAR,
        "boosted group beats its first student, p < 0.05": row["boosted_minus_first"]["p"] < SURE,
        "boosted group beats one student trained as long, p < 0.05": row["boosted_minus_one_as_long"]["p"]
        < SURE,
        "every prefix within 5 points of the whole": max(whole[-1] - one for one in whole) <= WITHIN,
        "identity of the line search to 1e-5": max(one["identity_error"] for one in rounds) <= 1e-5,
        "residual of unseen texts falls by 5 % in every kept round": min(one["gain"] for one in kept)
        >= LEAST_GAIN,
    }


def said(row: dict[str, Any]) -> list[str]:
    """A seed for people."""
    lines = [f"seed {row['seed']}: " + ", ".join(f"{k} {v:.2%}" for k, v in row["accuracy"].items())]
    for name in ("group_minus_teacher", "boosted_minus_first", "boosted_minus_one_as_long"):
        one = row[name]
        lines.append(
            f"  {name} {one['difference']:+.2%} [{one['low']:+.2%}, {one['high']:+.2%}] p {one['p']:.4f}"
        )
    lines.append("  gain per round: " + ", ".join(f"{one['gain']:.1%}" for one in row["rounds"]))
    lines.append(f"  polish {row['polish']}")
    return lines + [f"  {'holds' if holds else 'FALLS SHORT'}: {name}" for name, holds in checks(row).items()]


def write_record(rows: list[dict[str, Any]], args: argparse.Namespace, results: Path) -> Path:
    """The record of all seeds."""
    names = dict.fromkeys(
        name for row in rows for name in row["accuracy"]
    )  # a seed may have dropped a student
    held = {name: [checks(row)[name] for row in rows] for name in checks(rows[0])}
    values = {name: [row["accuracy"][name] for row in rows if name in row["accuracy"]] for name in names}
    differences = {
        name: [row[name]["difference"] for row in rows] for name in rows[0] if name.count("_minus_")
    }
    return Record(
        bench="students_quality",
        config={
            "group": asdict(tool.group_settings(args, seed=0)),
            "teacher": asdict(tool.teacher_config(args)),
            "seeds": [row["seed"] for row in rows],
            "threads": args.threads,
        },
        repeats=len(rows),
        median={name: fmean(found) for name, found in (values | differences).items()},
        spread={name: (min(found), max(found)) for name, found in (values | differences).items()},
        limit={"group_minus_teacher_low": NEAR, "prefixes_within": WITHIN, "p_below": SURE},
        baseline={"teacher": fmean(values["teacher"])},
        answer_matches=all(all(found) for found in held.values()),
        rows=rows,
        notes=[
            "`median` holds means over seeds here",
            *(f"{sum(found)} of {len(found)} seeds: {name}" for name, found in held.items()),
        ],
    ).write(results)


def main() -> None:
    """Make, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--work", type=Path, default=Path("/tmp/zinfer-bench/students-quality"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--quick", action="store_true", help="does everything run? tiny, and nothing is learnt"
    )
    options, words = parser.parse_known_args()
    rows, args = [], argparse.Namespace()
    for seed in map(int, options.seeds.split(",")):
        work = options.work / f"seed-{seed}"
        work.mkdir(parents=True, exist_ok=True)
        args = tool.parse_arguments(
            [*(QUICK if options.quick else []), *words, "--out", str(work), "--seed", str(seed)]
        )
        rows.append(measure(args, work))
        print("\n".join(said(rows[-1])), flush=True)
    print(write_record(rows, args, options.results))


if __name__ == "__main__":
    main()
