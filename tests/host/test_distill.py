"""Distillation: the identity of the line search, the same bits after any interruption, refusals."""

import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from text_models import WORDS, write_encoder, write_sentence_files
from tiny_models import write_tiny

from zinfer import Classifier
from zinfer.config.load import load_settings
from zinfer.errors import CheckpointError, IntegrityError, InternalError, UsageError, ZinferError
from zinfer.runtime.model import open_model
from zinfer.students import distill as stages
from zinfer.students.boost import energy, line_search
from zinfer.students.calibrate import calibration, calibration_error
from zinfer.students.group import read_group
from zinfer.students.job import distill
from zinfer.students.measure import check_labels
from zinfer.students.settings import DistillSettings, segments
from zinfer.students.train import Course

QUICK = {"students": 2, "layers": 1, "epochs": 2, "polish": 1, "batch": 16, "lr": 1e-3, "least_gain": 0.0}
ENGINE = {"device": "cpu", "machine": "sim-default", "memory.host": "1GiB", "runtime.threads": 1}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_encoder("bert", tmp_path_factory.mktemp("teacher") / "model")


def write_data(path, count=150, label=None):
    draw = random.Random(3)
    rows = [{"text": " ".join(draw.choices(WORDS, k=draw.randint(2, 9)))} for _ in range(count)]
    if label is not None:
        rows = [row | {"label": label(at)} for at, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "train.jsonl")


def silent(_done, _total, _what):
    """No progress."""


def go(teacher, data, out, *, progress=silent, memory=None, save_every=3, options=None, **more):
    flags = ENGINE | ({"memory.host": memory} if memory else {})
    return distill(
        teacher,
        data,
        out,
        settings=DistillSettings(**(QUICK | (options or {}))),
        engine=load_settings(None, flags=flags).settings,
        progress=progress,
        save_every=save_every,
        **more,
    )


@pytest.fixture(scope="module")
def whole(teacher, data, tmp_path_factory):
    """An uninterrupted run, and what it reported as it went."""
    torch.set_num_threads(1)
    seen = []
    out = tmp_path_factory.mktemp("whole") / "group"
    done = go(teacher, data, out, progress=lambda *step: seen.append(step))
    return out, done, seen


def same_files(one, other):
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    return [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()]


def test_what_a_run_leaves(whole):
    out, done, _ = whole
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "report.md",
        "report.png",
        "students.json",
        "students.safetensors",
        "tokenizer.json",
    ]
    assert [one.students for one in done.figures] == [1, 2]
    assert done.figures[0].residual < 0.9, "a student explains some of its teacher"
    assert done.figures[-1].agreement > 0.5
    assert all(one.accuracy is None for one in done.figures), "there were no labels"
    assert "| 2 |" in (out / "report.md").read_text()


def test_each_round_kept_the_identity_and_lowered_the_residual(whole):
    for one in whole[1].notes["rounds"]:
        before, after = one["held"]
        assert after < before
        assert one["dev"][1] < one["dev"][0]


class KilledError(Exception):
    """Stands for the death of the process."""


def interrupted(at):
    """A progress that dies at its step `at`."""
    left = [at]

    def progress(_done, _total, _what):
        left[0] -= 1
        if left[0] < 0:
            raise KilledError

    return progress


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.75, 0.97])
def test_an_interrupted_run_ends_in_the_same_bytes(whole, teacher, data, tmp_path, share):
    out, _, seen = whole
    at = int(share * len(seen))
    with pytest.raises(KilledError):
        go(teacher, data, tmp_path / "group", progress=interrupted(at))
    assert not (tmp_path / "group" / "students.json").exists()
    with pytest.raises(UsageError, match="ZI-1158"):
        go(teacher, data, tmp_path / "group")
    resumed = []
    go(teacher, data, tmp_path / "group", resume=True, progress=lambda *step: resumed.append(step))
    assert same_files(out, tmp_path / "group") == []
    assert len(resumed) < len(seen) or share < 0.05, "nothing that was done is done again"


def test_killed_when_only_the_tidying_was_left(whole, teacher, data, tmp_path):
    out = shutil.copytree(whole[0], tmp_path / "group")
    (out / "work").mkdir()
    done = go(teacher, data, out, resume=True, progress=lambda *_: pytest.fail("nothing is left to do"))
    assert done.figures == whole[1].figures
    assert same_files(whole[0], out) == []


def test_another_teacher_does_not_resume(whole, teacher, data, tmp_path):
    with pytest.raises(KilledError):
        go(teacher, data, tmp_path / "group", progress=interrupted(9))
    other = write_encoder("bert", tmp_path / "other", num_hidden_layers=4)
    with pytest.raises(UsageError, match="ZI-1158"):
        go(other, data, tmp_path / "group", resume=True)


def test_a_different_seed_is_a_different_group(whole, teacher, data, tmp_path):
    """The mutation of the tests above: bytes do differ where something differs."""
    go(teacher, data, tmp_path / "group", options={"seed": 1})
    assert "students.safetensors" in same_files(whole[0], tmp_path / "group")


def test_a_streamed_teacher_teaches_the_same(whole, teacher, data, tmp_path):
    go(teacher, data, tmp_path / "group", memory="700KiB")
    assert same_files(whole[0], tmp_path / "group") == []


def with_teachers_labels(teacher, path, change=lambda label, at: label):
    """A table whose labels are the teacher's own words, changed."""
    rows = [json.loads(line) for line in write_data(path).read_text().splitlines()]
    with Classifier(teacher, device="cpu", machine="sim-default", threads=1) as model:
        found = model.classify([row["text"] for row in rows])
    labels = [change(one["label"], at) for at, one in enumerate(found)]
    assert len(set(labels)) > 1
    lines = (json.dumps(row | {"label": label}) for row, label in zip(rows, labels, strict=True))
    path.write_text("\n".join(lines))
    return path


NUMBERS = {"calm": 0, "angry": "1", "glad": "glad"}  # by number, its digits, or name
NEXT = {"calm": "angry", "angry": "glad", "glad": "calm"}


def test_labels_are_learnt_and_reported_and_may_be_noisy(teacher, tmp_path):
    table = with_teachers_labels(
        teacher, tmp_path / "d.jsonl", lambda label, at: NEXT[label] if at % 5 < 2 else NUMBERS[label]
    )
    done = go(teacher, table, tmp_path / "group", label_column="label")
    assert all(0 <= one.accuracy <= 1 for one in done.figures)
    assert done.figures[-1].teacher_accuracy == pytest.approx(0.6, abs=0.25)
    assert done.figures[-1].residual < 0.9, "two labels in five are wrong, and the teacher is followed still"


def test_a_head_that_numbers_its_classes_otherwise_is_refused(teacher, tmp_path):
    table = with_teachers_labels(teacher, tmp_path / "d.jsonl", lambda label, _: NEXT[label])
    with pytest.raises(UsageError, match="ZI-1192") as caught:
        go(teacher, table, tmp_path / "group", label_column="label")
    assert "0.0%" in caught.value.message
    assert "calm, angry, glad" in caught.value.message


def test_labels_that_are_noise_are_refused():
    """Exactly as much agreement as chance gives is none; a little more is some."""
    logits = torch.eye(2)[[0, 0, 1, 1] * 9]
    with pytest.raises(UsageError, match="ZI-1192"):
        check_labels(logits, torch.tensor([0, 1, 0, 1] * 9), ["a", "b"])
    with pytest.raises(UsageError, match="ZI-1192"):
        check_labels(logits[:1].repeat(36, 1), torch.tensor([0, 1, 0, 0] * 9), ["a", "b"])
    check_labels(logits, torch.tensor([0, 0, 0, 1] * 9), ["a", "b"])


@pytest.mark.parametrize("value", [float("nan"), 1e9])
def test_a_teacher_that_says_what_is_no_number(tmp_path, data, value):
    folder = write_encoder("bert", tmp_path / "teacher")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("2.output.LayerNorm.weight"))
    weights[name][0] = value
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UsageError, match="ZI-1191") as caught:
        go(folder, data, tmp_path / "group")
    assert "texts 1 to 150" in caught.value.message
    assert not (tmp_path / "group" / "students.json").exists()


def test_a_teacher_of_embeddings(tmp_path, data):
    folder = write_encoder("distilbert", tmp_path / "teacher", architectures=["DistilBertModel"])
    write_sentence_files(folder, max_seq_length=16)
    done = go(folder, data, tmp_path / "group")
    assert done.figures[-1].agreement is None
    assert done.figures[-1].cosine > 0.5
    assert (tmp_path / "group" / "modules.json").exists()


def test_a_round_that_gains_too_little_is_dropped_and_said(teacher, data, tmp_path):
    done = go(teacher, data, tmp_path / "group", options={"least_gain": 0.99, "students": 3})
    assert len(done.figures) == 1
    assert [one["kept"] for one in done.notes["rounds"]] == [True, False]
    assert "dropped" in (tmp_path / "group" / "report.md").read_text()


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"students": 0}, "ZI-1151"),
        ({"lr": -1.0}, "ZI-1151"),
        ({"layers": 3}, "ZI-1152"),
    ],
)
def test_settings_that_cannot_be_meant(teacher, data, tmp_path, options, code):
    with pytest.raises(UsageError) as caught:
        go(teacher, data, tmp_path / "group", options=options)
    assert caught.value.code == code


def test_a_loss_that_is_no_number_ends_the_run(teacher, data, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "hidden_loss", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(UsageError, match="ZI-1154") as caught:
        go(teacher, data, tmp_path / "group")
    assert "step 1" in caught.value.message


def test_data_that_cannot_be_learnt_from(teacher, tmp_path):
    cases = {
        "ZI-4936": write_data(tmp_path / "a.jsonl", label=lambda _: "furious"),
        "ZI-4937": write_data(tmp_path / "b.jsonl", label=lambda _: "calm"),
        "ZI-4938": write_data(tmp_path / "c.jsonl", count=20, label=lambda at: at % 2),
    }
    for code, table in cases.items():
        with pytest.raises(CheckpointError) as caught:
            go(teacher, table, tmp_path / code, label_column="label")
        assert caught.value.code == code
        assert not (tmp_path / code).exists()


def test_teachers_that_cannot_teach(tmp_path, data, teacher, whole):
    with pytest.raises(UsageError, match="ZI-1155"):
        go(write_tiny("llama", tmp_path / "llama"), data, tmp_path / "group")
    bare = write_encoder("bert", tmp_path / "bare", architectures=["BertModel"])
    with pytest.raises(UsageError, match="ZI-1156"):
        go(bare, data, tmp_path / "group", label_column="label")
    numbers = write_encoder("bert", tmp_path / "numbers", problem_type="regression", id2label={"0": "price"})
    with pytest.raises(UsageError, match="ZI-1160"):
        go(numbers, data, tmp_path / "group")
    with pytest.raises(UsageError, match="ZI-1157"):
        go(teacher, data, whole[0])


def test_other_settings_do_not_resume(teacher, data, tmp_path):
    with pytest.raises(KilledError):
        go(teacher, data, tmp_path / "group", progress=interrupted(3))
    with pytest.raises(UsageError, match="other settings"):
        go(teacher, data, tmp_path / "group", resume=True, options={"seed": 5})


def damaged(folder, target, change):
    """A copy of the group whose bytes were changed."""
    shutil.copytree(folder, target)
    change(target)
    return target


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "students.json").write_text("{}"),
        lambda folder: (folder / "students.json").write_text('{"format": 1, "students": 3, "layers": 1}'),
        lambda folder: (folder / "students.json").write_text('{"format": 1, "students": 2, "layers": 2}'),
        lambda folder: os.truncate(folder / "students.safetensors", 5000),
    ],
)
def test_a_damaged_group_is_refused(whole, teacher, tmp_path, change):
    spec = open_model(teacher, load_settings(None, flags=ENGINE).settings).spec
    read_group(whole[0], spec)
    with pytest.raises(ZinferError) as caught:
        read_group(damaged(whole[0], tmp_path / "copy", change), spec)
    assert isinstance(caught.value, IntegrityError | CheckpointError)


matrices = st.integers(0, 2**32 - 1).map(
    lambda seed: torch.randn(2, 30, 7, generator=torch.Generator().manual_seed(seed))
)


@given(matrices, st.floats(1e-3, 1e3))
def test_line_search_is_exact(pair, scale):
    rho, f = pair[0], scale * pair[1]
    found = line_search(rho, f)
    assert found.after <= found.before
    for factor in (found.weight * 0.99, found.weight * 1.01, 0.0):
        assert energy(rho - factor * f.double()) >= found.after - 1e-12
    shrunk = energy(rho.double() - 0.5 * found.weight * f.double())
    gained = found.before - found.after
    assert shrunk == pytest.approx(found.before - 0.75 * gained), "shrinkage nu gains nu(2 - nu)"


def test_a_student_that_answers_nothing_has_no_weight():
    rho = torch.randn(9, 4)
    assert line_search(rho, torch.zeros(9, 4)).weight == 0


def test_a_broken_identity_is_noticed(monkeypatch):
    """The mutation: where the sum and the promise differ, the round must not pass."""
    monkeypatch.setattr("zinfer.students.boost.TOLERANCE", -1.0)
    with pytest.raises(InternalError, match="ZI-1091"):
        line_search(torch.randn(9, 4), torch.randn(9, 4))


@given(st.integers(3, 48), st.integers(1, 12), st.integers(1, 4))
def test_segments_cover_the_depth(depth, students, layers):
    if layers >= depth:
        with pytest.raises(UsageError, match="ZI-1152"):
            segments(depth, students, layers)
        return
    found = segments(depth, students, layers)
    assert len(found) == students
    assert all(1 <= at <= depth for own in found for at in own)
    assert all(own == sorted(own) and len(own) == layers for own in found)
    assert found[0][-1] == depth
    assert found[-1][-1] == depth


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 99))
def test_an_epoch_sees_every_text_once(count, batch, seed):
    course = Course("student 1", 100, batch, 1e-3, seed)
    numbers, lengths = list(range(5, 5 + count)), [7] * (5 + count)
    per_epoch = -(-count // batch)
    for epoch in (0, 3):
        steps = [course.texts(epoch * per_epoch + at, numbers, lengths) for at in range(per_epoch)]
        assert sorted(text for step in steps for text in step) == numbers


def test_calibration_finds_the_temperature_it_was_given():
    logits = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0)) * 2
    wanted = torch.softmax(logits / 3 + torch.tensor([0.0, 0.2, -0.1, 0.0]), -1)
    temperature, bias = calibration(logits, wanted, is_multi_label=False)
    assert temperature.item() == pytest.approx(3, rel=0.02)
    assert (bias[1] - bias[2]).item() == pytest.approx(0.3, abs=0.05)
    sure = torch.tensor([[0.9, 0.1]] * 10)
    assert calibration_error(sure, torch.tensor([0] * 9 + [1])) == pytest.approx(0, abs=1e-6)
    assert calibration_error(sure, torch.ones(10, dtype=torch.long)) == pytest.approx(0.9)
    assert np.isfinite(calibration_error(torch.tensor([[1.0, 0.0]]), torch.tensor([0])))
