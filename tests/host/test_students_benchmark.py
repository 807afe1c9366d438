"""The benchmark of students: what it makes can be served, and what it searches it finds.  Nothing here is timed."""

import importlib
import json
import random
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from student_groups import COUNT, LAYERS, make_group, write_group_folder

from zinfer import Classifier
from zinfer.students.student import Width, student_spec

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # scripts, no package
latency, made = (importlib.import_module(name) for name in ("students_latency", "made_group"))
sys.path.pop()


def test_what_is_made_is_a_teacher_and_a_group_of_its_layers(tmp_path):
    teacher = made.write_teacher(tmp_path / "teacher", 32, 4, 2)
    group = made.write_students(tmp_path / "group", teacher, 2)
    before = {path.name: path.read_bytes() for path in group.iterdir()}
    assert made.write_students(tmp_path / "group", teacher, 2) == group
    assert before == {path.name: path.read_bytes() for path in group.iterdir()}, "what is there is kept"
    options = {"device": "cpu", "machine": "sim-default", "threads": 1}
    with (
        Classifier(group, **options) as students,
        Classifier(teacher, **options) as deep,
    ):
        assert students.labels == deep.labels
        assert students.about()["of"] == 2
        assert {one["students"] for one in students.classify(["w10 w11", "w99"])} == {2}
        difference = latency.largest_difference(students.engine, group, deep.engine, 2000)
        assert difference <= 1e-4


@pytest.mark.parametrize("width", [None, Width(1, 16, 40)])
def test_the_wide_student_has_as_many_weights_as_the_group(tmp_path, width):
    teacher = made.write_teacher(tmp_path / "teacher", 32, 4, 2)
    group = write_group_folder(tmp_path / "group", make_group(width=width))
    where = latency.folders(Namespace(group=group, teacher=teacher, work=tmp_path, threads=1))
    spec = made.read_spec(json.loads((where.wide / "config.json").read_text()))
    wanted = COUNT * latency.num_weights(make_group(width=width).spec)
    assert latency.num_weights(student_spec(spec, LAYERS)) == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("true", [3.0, 55.0, 800.0])
def test_the_highest_rate_that_holds_is_found(true):
    asked = []

    def run(rate):
        asked.append(rate)
        return [0.01 if rate <= true else 9.0] * 100, {1: 100}

    row = latency.capacity("x", run, 0.1, 50.0, 12)
    assert row["texts_per_s"] <= true
    assert row["texts_per_s"] >= 0.9 * true
    assert len(asked) == len(row["tried"]) <= 12


def test_ratios_are_of_batch_one_and_of_short_texts():
    rows = [
        {"part": "model", "engine": engine, "batch": batch, "tokens": tokens, "p50_s": seconds * batch}
        for engine, seconds in (("teacher", 6.0), ("1 student", 2.0))
        for batch in (1, 4)
        for tokens in (16, 64, 256)
    ]
    rows[2]["p50_s"] = 1e9
    rows += [
        {"part": "served", "engine": name, "texts_per_s": rate}
        for name, rate in (("teacher", 10.0), ("all students", 12.0), ("controller", 25.0))
    ]
    found = latency.ratios(rows)
    assert found["teacher / 1 student, least"] == found["teacher / 1 student, most"] == 3.0
    assert found["served controller / teacher"] == 2.5
    assert found["served all students / teacher"] == 1.2


def test_texts_hold_no_special_tokens():
    texts = latency.drawn(4, 7, 50, random.Random(1))
    ids = torch.tensor([one.ids for one in texts])
    assert ids.shape == (4, 7)
    assert ids.min() >= 4
    assert ids.max() < 50
