"""Students first, the teacher where they are not sure: who answered what; a teacher that is slow, full or broken."""

import json
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from student_groups import write_group_folder
from text_models import write_encoder

from zinfer import Classifier
from zinfer.cli.main import run
from zinfer.errors import UsageError
from zinfer.students import report
from zinfer.students.cascade import (
    THRESHOLDS,
    Deferral,
    check_pair,
    confidence,
    deferral_table,
    threshold_for,
)
from zinfer.students.measure import Figures
from zinfer.students.opening import open_scheduler
from zinfer.students.scheduler import TextScheduler
from zinfer.tokenizer import Encoded, encode_texts

CPU = {"device": "cpu", "machine": "sim-default", "threads": 1, "memory": {"host": "64MiB"}}
TEXTS = [
    "the fox",
    "a lazy dog",
    "jumps over",
    "import json",
    "return self",
    "quick brown the",
    "x",
    "def class",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(a group, its teacher): random both, so that they disagree."""
    base = tmp_path_factory.mktemp("cascade")
    return write_group_folder(base / "group"), write_encoder("bert", base / "teacher")


@pytest.fixture
def below(folders):
    """A threshold that cuts the texts in two."""
    with Classifier(folders[0], **CPU) as classifier:
        scores = sorted(one["score"] for one in classifier.classify(TEXTS))
    return (scores[3] + scores[4]) / 2


def test_unsure_texts_get_the_teachers_answer_and_the_others_the_students(folders, below):
    group, teacher = folders
    with Classifier(group, **CPU) as alone, Classifier(teacher, **CPU) as deep:
        students, teachers = alone.classify(TEXTS), deep.classify(TEXTS)
    with Classifier(group, teacher=teacher, defer_below=below, **CPU) as classifier:
        found = classifier.classify(TEXTS)
        about = classifier.about()
    assert [one["unsure"] for one in found] == [one["score"] < below for one in students]
    assert sum(one["unsure"] for one in found) == 4
    for ours, one, other in zip(found, students, teachers, strict=True):
        assert ours["answered_by"] == ("teacher" if ours["unsure"] else "students")
        wanted = other if ours["unsure"] else one
        assert ours["label"] == wanted["label"]
        assert ours["score"] == pytest.approx(wanted["score"], abs=1e-5)
        assert ours["students"] == 3
    assert any(
        abs(one["score"] - other["score"]) > 1e-3 for one, other in zip(students, teachers, strict=True)
    ), "they differ, or nothing was compared"
    assert about["cascade"] == {"defer_below": below, "texts": 8, "unsure": 4}
    assert about["teacher"]["stats"]["peak_bytes"]["host"] > 0


@pytest.mark.parametrize(("below", "count"), [(0.0, 0), (1.0, len(TEXTS))])
def test_a_threshold_at_either_end(folders, below, count):
    with Classifier(folders[0], teacher=folders[1], defer_below=below, **CPU) as classifier:
        assert sum(one["answered_by"] == "teacher" for one in classifier.classify(TEXTS)) == count
        assert classifier.embed(TEXTS).shape == (len(TEXTS), 64), "embeddings are the students' own"


def test_group_and_teacher_share_one_budget(folders):
    with Classifier(folders[0], teacher=folders[1], defer_below=1.0, **CPU) as classifier:
        classifier.classify(TEXTS)
        ledger, plan = classifier.engine.ledger, classifier._teacher.plan
        ledger.check()
        held = sum(ledger.reserved.values())
        assert held > classifier.engine.bank.nbytes
        assert held + plan.budget.host <= 64 * 2**20
        assert classifier._teacher.stats.peak_bytes["host"] <= plan.budget.host
        places = {name: tensor.data_ptr() for name, tensor in classifier.engine.bank.stacked.items()}
        classifier.classify(TEXTS)
        again = {name: tensor.data_ptr() for name, tensor in classifier.engine.bank.stacked.items()}
        assert again == places, "the bank is never evicted"


def test_the_teacher_may_be_streamed(folders):
    """The group is resident; the teacher gets what is left, less than its weights."""
    group, teacher = folders
    with Classifier(group, teacher=teacher, defer_below=1.0, **CPU) as classifier:
        resident = classifier.classify(TEXTS)
        held = sum(classifier.engine.ledger.reserved.values())
        need = classifier._teacher.plan.placement
        assert not need.slots, "the twin is resident"
    with pytest.raises(Exception, match="ZI-2001") as caught:
        Classifier(group, teacher=teacher, defer_below=1.0, **(CPU | {"memory": {"host": held + 4096}}))
    least = int(caught.value.remedy.split("--host-mem ")[1].split("KiB")[0]) * 1024
    with Classifier(
        group, teacher=teacher, defer_below=1.0, **(CPU | {"memory": {"host": held + least}})
    ) as classifier:
        streamed = classifier.classify(TEXTS)
        assert classifier._teacher.plan.placement.slots, "something is streamed"
    assert streamed == resident


def test_a_scheduler_before_a_group_defers_to_its_teacher(folders, below):
    group, teacher = folders
    with Classifier(group, teacher=teacher, defer_below=below, **CPU) as classifier:
        wanted = classifier.classify(TEXTS, top_k=None, raw_scores=True)
        texts = encode_texts(classifier.engine.tokenizer, TEXTS, classifier.engine.max_tokens)
        with open_scheduler(classifier.engine, deferral=classifier.deferral()) as scheduler:
            served = [future.result(60) for future in [scheduler.submit(one) for one in texts]]
    assert [one.is_deferred for one in served] == [one[0]["answered_by"] == "teacher" for one in wanted]
    for one, labels in zip(served, wanted, strict=True):
        assert sorted(one.logits_C.tolist()) == pytest.approx(
            sorted(label["score"] for label in labels), abs=1e-5
        )
    with Classifier(group, defer_below=below, **CPU) as classifier:
        assert classifier.deferral() is None


def test_without_a_teacher_unsure_answers_are_marked(folders, below):
    with Classifier(folders[0], defer_below=below, **CPU) as classifier:
        found = classifier.classify(TEXTS)
    assert sum(one["unsure"] for one in found) == 4
    assert {one["answered_by"] for one in found} == {"students"}


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"defer_below": 1.5}, "ZI-1165"),
        ({"defer_below": float("nan")}, "ZI-1165"),
        ({"teacher": "T"}, "ZI-1165"),
        ({"target_accuracy": 0.9}, "ZI-1168"),
    ],
)
def test_what_cannot_be_meant_is_refused(folders, options, code):
    options = {name: folders[1] if value == "T" else value for name, value in options.items()}
    before = set(threading.enumerate())
    with pytest.raises(UsageError, match=code) as caught:
        Classifier(folders[0], **options, **CPU)
    assert caught.value.remedy
    assert set(threading.enumerate()) <= before


def test_a_teacher_of_other_labels_is_refused(folders, tmp_path):
    other = write_encoder("bert", tmp_path / "other", id2label={"0": "spam", "1": "ham"})
    with pytest.raises(UsageError, match="ZI-1167"):
        Classifier(folders[0], teacher=other, defer_below=0.5, **CPU)
    with pytest.raises(UsageError, match="ZI-1140"):
        Classifier(folders[1], teacher=folders[1], defer_below=0.5, **CPU)


def test_the_command_line_defers_at_once_or_to_a_file(folders, below, tmp_path, capsys, monkeypatch):
    for name, value in (("DEVICE", "cpu"), ("MACHINE", "sim-default"), ("RUNTIME_THREADS", "1")):
        monkeypatch.setenv(f"ZINFER_{name}", value)
    group, teacher = map(str, folders)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"id": at, "text": text}) + "\n" for at, text in enumerate(TEXTS)))
    options = ["--defer-below", str(below)]
    assert run(["classify", group, "-i", str(rows), "--teacher", teacher, *options]) == 0
    at_once = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sum(one["answered_by"] == "teacher" for one in at_once) == 4

    later, out = tmp_path / "later.jsonl", tmp_path / "out.jsonl"
    assert run(["classify", group, "-i", str(rows), *options, "--defer-to", str(later), "-o", str(out)]) == 0
    held = [json.loads(line) for line in later.read_text().splitlines()]
    assert held == [{"id": one["id"], "text": one["text"]} for one in at_once if one["unsure"]]
    assert len(out.read_text().splitlines()) == len(TEXTS), "the file holds copies, nothing is left out"
    capsys.readouterr()
    assert run(["classify", teacher, "-i", str(later)]) == 0
    asked = {one["id"]: one for one in map(json.loads, capsys.readouterr().out.splitlines())}
    for one in at_once:
        if one["unsure"]:
            assert asked[one["id"]]["label"] == one["label"]
            assert asked[one["id"]]["score"] == pytest.approx(one["score"], abs=1e-6)

    table = tmp_path / "out.csv"
    assert run(["classify", group, "-i", str(rows), *options, "-o", str(table)]) == 0
    assert table.read_text().splitlines()[0] == "id,text,label,score,students,unsure,answered_by"
    assert run(["classify", group, "-i", str(rows), "--defer-to", str(later)]) == 2, (
        "no threshold, no deferral"
    )
    assert "ZI-1165" in capsys.readouterr().err
    assert json.loads(later.read_text().splitlines()[0]) == held[0], "the old file is as it was"


@given(st.lists(st.lists(st.floats(-20, 20), min_size=3, max_size=3), min_size=1, max_size=8))
def test_confidence_is_that_of_the_likeliest_label(logits):
    logits_NC = torch.tensor(logits, dtype=torch.float64)
    sure = confidence(logits_NC, "softmax").tolist()
    assert sure == pytest.approx([max(row) for row in torch.softmax(logits_NC, -1).tolist()])
    each = confidence(logits_NC, "sigmoid").tolist()
    wanted = [min(max(p, 1 - p) for p in row) for row in torch.sigmoid(logits_NC).tolist()]
    assert each == pytest.approx(wanted)
    assert all(0.5 <= one <= 1 for one in each)


def test_the_table_counts_as_one_counts_by_hand():
    draw = torch.Generator().manual_seed(0)
    ours, theirs = (3 * torch.randn(200, 4, generator=draw) for _ in range(2))
    wanted = torch.randint(0, 4, (200,), generator=draw)
    rows = deferral_table(ours, theirs, wanted, "softmax")
    assert [row["below"] for row in rows] == list(THRESHOLDS)
    for row in rows:
        kept = right = hits = 0
        for mine, other, label in zip(ours, theirs, wanted.tolist(), strict=True):
            is_sure = torch.softmax(mine, -1).max().item() >= row["below"]
            kept += is_sure
            right += is_sure and mine.argmax().item() == label
            hits += (mine if is_sure else other).argmax().item() == label
        assert row["share"] == pytest.approx(1 - kept / 200)
        assert row["kept"] == pytest.approx(right / kept)
        assert row["accuracy"] == pytest.approx(hits / 200)
    shares = [row["share"] for row in rows]
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] < 1


def test_a_threshold_is_chosen_for_a_target():
    table = [
        {"below": 0.6, "accuracy": 0.9},
        {"below": 0.8, "accuracy": 0.95},
        {"below": 0.9, "accuracy": 0.94},
    ]
    manifest = {
        "prefixes": [
            {"students": 1, "agreement": 0.7, "accuracy": None, "deferral": table},
            {"students": 2, "agreement": 0.99, "accuracy": 0.85, "deferral": table},
            {"students": 3, "agreement": 0.99, "accuracy": 0.85},
        ]
    }
    assert threshold_for(manifest, 1, 0.9) == 0.6
    assert threshold_for(manifest, 1, 0.91) == 0.8
    assert threshold_for(manifest, 1, 0.69) == 0.0
    assert threshold_for(manifest, 2, 0.84) == 0.0, "labels count where there are any"
    assert threshold_for(manifest, 2, 0.9) == 0.6
    with pytest.raises(UsageError, match="ZI-1169") as caught:
        threshold_for(manifest, 1, 0.97)
    assert threshold_for(manifest, 1, float(caught.value.remedy.split()[1])) == 0.8, "the remedy works"
    for students in (3, 4):
        with pytest.raises(UsageError, match="ZI-1168"):
            threshold_for(manifest, students, 0.9)


class Fixed:
    """Answers every text with logits of its first id: certain from 10 on.  Passes wait for a gate."""

    labels = ("a", "b")
    max_tokens = 64
    num_students = 1

    def __init__(self, sign=1.0, *, fails=False):
        self.sign, self.fails, self.gate, self.begun = sign, fails, threading.Event(), threading.Event()
        self.gate.set()
        self.seen = []

    def answer(self, texts, num_students):
        self.begun.set()
        assert self.gate.wait(30)
        self.seen += [one.ids[0] for one in texts]
        if self.fails:
            raise OSError("the teacher is gone")
        sure = torch.tensor([[0.0, self.sign * one.ids[0]] for one in texts])
        return sure, sure


def text(first):
    return Encoded((first,), (0,), is_cut=False)


def cascade(teacher, **options):
    given = {"max_queue_tokens": 100, "pass_tokens": 10} | options
    return TextScheduler(
        Fixed(),
        objective_s=None,
        max_queue_tokens=100,
        pass_tokens=10,
        controller=None,
        deferral=Deferral(teacher, 0.9, "softmax", **given),
    )


def test_a_scheduler_defers_what_is_not_sure():
    teacher = Fixed(sign=-1.0)
    with cascade(teacher) as scheduler:
        futures = {first: scheduler.submit(text(first)) for first in (1, 20, 2, 30)}
        served = {first: future.result(30) for first, future in futures.items()}
        stats = scheduler.stats()
    assert {first: one.is_deferred for first, one in served.items()} == {
        1: True,
        20: False,
        2: True,
        30: False,
    }
    assert {first: one.logits_C[1].item() for first, one in served.items()} == {1: -1, 20: 20, 2: -2, 30: 30}
    assert sorted(teacher.seen) == [1, 2]
    assert (stats.deferred, stats.kept, stats.answers) == (2, 0, {1: 4})
    assert all(one.queue_s >= 0 and one.service_s > 0 for one in served.values())


@pytest.mark.parametrize("kind", ["failing", "full"])
def test_where_the_teacher_gives_none_the_students_answer_stands(kind):
    teacher = Fixed(sign=-1.0, fails=kind == "failing")
    if kind == "full":
        teacher.gate.clear()
    with cascade(teacher, max_queue_tokens=1) as scheduler:
        first = scheduler.submit(text(1))
        if kind == "full":
            assert teacher.begun.wait(30)
            waiting = scheduler.submit(text(2))  # in the teacher's queue, which is now full
            beyond = scheduler.submit(text(1))
            while not scheduler.stats().kept:
                threading.Event().wait(0.001)
            teacher.gate.set()
            served = [one.result(30) for one in (waiting, beyond)]
            assert sorted(one.is_deferred for one in served) == [False, True]
            assert first.result(30).is_deferred
        else:
            served = first.result(30)
            assert (served.is_deferred, served.logits_C[1].item()) == (False, 1)
        assert scheduler.stats().kept == 1


def test_draining_waits_for_the_teacher():
    teacher = Fixed(sign=-1.0)
    teacher.gate.clear()
    with cascade(teacher) as scheduler:
        future = scheduler.submit(text(1))
        assert teacher.begun.wait(30)
        assert not scheduler.drain(0.01)
        assert not future.done()
        teacher.gate.set()
        assert scheduler.drain(30)
        assert future.result(0).is_deferred


def test_closing_lets_deferred_texts_end():
    teacher, before = Fixed(sign=-1.0), set(threading.enumerate())
    teacher.gate.clear()
    scheduler = cascade(teacher)
    future = scheduler.submit(text(1))
    assert teacher.begun.wait(30)
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    teacher.gate.set()
    closing.join(30)
    assert future.result(0).is_deferred
    assert set(threading.enumerate()) <= before


def test_a_group_without_classes_defers_nothing():
    bare = Fixed()
    bare.labels = ()
    with pytest.raises(UsageError, match="ZI-1166"):
        check_pair(bare, None, "softmax")
    with pytest.raises(UsageError, match="ZI-1166"):
        check_pair(Fixed(), None, "none")


def test_a_scheduler_that_cannot_be_opened_closes_its_deferral():
    before = set(threading.enumerate())
    deferral = Deferral(Fixed(), 0.9, "softmax", max_queue_tokens=10, pass_tokens=10)
    with pytest.raises(UsageError, match="ZI-1162"):
        open_scheduler(Fixed(), objective_s=-1.0, deferral=deferral)
    assert set(threading.enumerate()) <= before


def test_the_report_says_what_each_threshold_costs_and_buys():
    draw = torch.Generator().manual_seed(1)
    ours, theirs = (2 * torch.randn(50, 3, generator=draw) for _ in range(2))
    table = deferral_table(ours, theirs, theirs.argmax(-1), "softmax")
    figures = [Figures(1, 0.5, 0.9), Figures(2, 0.4, 0.9, 0.8, deferral=table)]
    notes = {
        "teacher": {"architecture": "Bert", "layers": 3, "parameters": 9},
        "texts": {"train": 1, "held": 1, "dev": 50},
        "settings": {"layers": 1, "students": 2, "seed": 0},
        "width": {"heads": 1, "head_dim": 16, "mlp": 32},
        "rounds": [],
        "polish": "kept",
    }
    lines = list(report._lines(figures, notes, has_picture=False))
    at = lines.index("## Deferring to the teacher (all students)")
    shown = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines[at + 4 : at + 4 + len(table)]
    ]
    assert [float(row[0]) for row in shown] == list(THRESHOLDS)
    assert [row[1] for row in shown] == [f"{row['share']:.1%}" for row in table]
    both = [float(row[3]) for row in shown]
    assert both == sorted(both), "without labels the teacher is right by definition: more of it is better"
    plain = list(report._lines(figures[:1], notes, has_picture=False))
    assert not any("Deferring" in line for line in plain)
