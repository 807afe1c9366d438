"""The students' benchmarks: their measures, verdicts, and texts.  Nothing here is trained or timed."""

import json

import numpy as np
import pytest
from bench_modules import load
from hypothesis import given
from hypothesis import strategies as st

minilm, quality = load("students_minilm"), load("students_quality")


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_the_measures_are_one_for_the_teacher_itself_and_for_its_rotation():
    rows = unit(np.random.default_rng(0).normal(size=(40, 9)))
    turned = rows @ np.linalg.qr(np.random.default_rng(1).normal(size=(9, 9)))[0]
    assert minilm.compare(rows, rows) == pytest.approx({"cosine": 1, "spearman": 1, "top1": 1})
    found = minilm.compare(turned, rows)
    assert found["spearman"] == pytest.approx(1)
    assert found["top1"] == 1
    assert found["cosine"] < 0.9, "similarities survive a rotation, vectors do not"


def test_the_measures_of_chance_are_near_nothing():
    draw = np.random.default_rng(3)
    found = minilm.compare(unit(draw.normal(size=(200, 30))), unit(draw.normal(size=(200, 30))))
    assert abs(found["spearman"]) < 0.05
    assert found["top1"] < 0.05


@given(st.lists(st.integers(-99, 99), min_size=2, max_size=40, unique=True))
def test_ranks(values):
    found = minilm.ranks(np.array(values, dtype=float))
    assert [sorted(values)[int(rank)] for rank in found] == values


def test_sentences_are_of_docstrings_and_of_words(tmp_path):
    (tmp_path / "test").mkdir()
    body = '"""Read every line of the file. Nothing more.\n\n>>> a b c d e\n\nReturn 1, 2, 3, 4 or 5."""\n'
    (tmp_path / "a.py").write_text(body + 'x = "not a docstring of any kind"\n')
    (tmp_path / "b.py").write_text("def broken(:\n")
    (tmp_path / "test" / "c.py").write_text(body)
    found = list(minilm.sentences(tmp_path))
    assert found == [("a.py", "Read every line of the file.")]


@given(st.integers(0, 99))
def test_no_sentence_is_learnt_from_and_measured(seed):
    found = [(f"{at % 7}.py", f"sentence {at % 50}") for at in range(90)]
    train, test = minilm.drawn(found, 40, seed)
    assert not set(train) & set(test)
    assert len(set(train)) == len(train)
    assert len(set(test)) == len(test)
    assert len(train) + len(test) <= 40
    files = {text: {file for file, one in found if one == text} for _, text in found}
    held = set.intersection(*(files[text] for text in test)) if test else set()
    assert all(not held & files[text] or len(files[text]) > 1 for text in train)


def row(**changed):
    names = {f"group {m}": 0.7 + m / 100 for m in (1, 2, 3)}
    pair = {"difference": 0.02, "low": 0.001, "high": 0.04, "p": 0.01}
    return {
        "seed": 1,
        "windows": 5000,
        "files": 300,
        "accuracy": {"teacher": 0.73} | names,
        "rounds": [
            {"kept": True, "gain": 0.6, "identity_error": 1e-12},
            {"kept": True, "gain": 0.05, "identity_error": 1e-6},
            {"kept": True, "gain": 0.07, "identity_error": 0.0},
            {"kept": False, "gain": 0.01, "identity_error": 0.0},
        ],
        "group_minus_teacher": pair,
        "boosted_minus_first": pair,
        "boosted_minus_one_as_long": pair,
        "polish": "kept",
    } | changed


def test_what_holds_is_said_to_hold():
    assert all(quality.checks(row()).values())
    assert "FALLS SHORT" not in "\n".join(quality.said(row()))


@pytest.mark.parametrize(
    "changed",
    [
        {"windows": 4999},
        {"files": 299},
        {"group_minus_teacher": {"difference": 0.0, "low": -0.0101, "high": 0.01, "p": 0.5}},
        {"boosted_minus_first": {"difference": 0.01, "low": 0.0, "high": 0.01, "p": 0.05}},
        {"boosted_minus_one_as_long": {"difference": 0.01, "low": 0.0, "high": 0.01, "p": 0.06}},
        {"accuracy": {"teacher": 0.7, "group 1": 0.64, "group 2": 0.7, "group 3": 0.7}},
        {"rounds": [{"kept": True, "gain": 0.04, "identity_error": 0.0}]},
        {"rounds": [{"kept": True, "gain": 0.4, "identity_error": 2e-5}]},
    ],
)
def test_what_falls_short_is_said_to(changed):
    changed = row(**changed)
    if len(changed["rounds"]) == 1:
        changed["accuracy"] = {"teacher": 0.7, "group 1": 0.7}
    assert list(quality.checks(changed).values()).count(False) == 1
    assert "FALLS SHORT" in "\n".join(quality.said(changed))


def test_differences_are_of_the_same_windows():
    files = [f"{at % 40}.py" for at in range(400)]
    draw = np.random.default_rng(0)
    hits = {name: draw.random(400) < share for name, share in (("teacher", 0.7), ("boosted 1", 0.5))}
    hits |= {f"{kind} 2": draw.random(400) < 0.8 for kind in ("boosted", "group")}
    hits |= {"one student, trained as long": hits["boosted 1"], "group 1": hits["boosted 1"]}
    found = quality.summary(hits, files, 2)
    for name, ours, theirs in (
        ("group_minus_teacher", "group 2", "teacher"),
        ("boosted_minus_first", "boosted 2", "boosted 1"),
    ):
        assert found[name]["difference"] == pytest.approx(hits[ours].mean() - hits[theirs].mean(), abs=1e-5)
    assert found["boosted_minus_one_as_long"] == found["boosted_minus_first"]


def test_a_seed_that_dropped_a_student_has_its_place_in_the_record(tmp_path):
    whole, short = row(seed=1), row(seed=2)
    del short["accuracy"]["group 3"]
    short["rounds"] = short["rounds"][:2]
    args = quality.tool.parse_arguments(["--out", str(tmp_path), "--seed", "1"])
    record = json.loads(quality.write_record([whole, short], args, tmp_path).read_text())
    assert record["median"]["group 3"] == whole["accuracy"]["group 3"]
