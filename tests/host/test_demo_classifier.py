"""The bundled classifier: its files and its record, and the tools that made it on a library of a few small files.

Enters: `zinfer/assets/classifier` as shipped.  Leaves: nothing.
"""

import json
import random
import shutil
from pathlib import Path

import demo_score
import demo_teacher
import demo_windows
import numpy as np
import pytest
import torch
import train_demo_classifier as tool
import transformers
from demo_windows import LABELS, WINDOW, Source
from hypothesis import given, settings
from hypothesis import strategies as st

from zinfer import Classifier
from zinfer.classifier import DEMO

FOLDER = DEMO.parent
CALM = {"device": "cpu", "machine": "sim-default", "threads": 1}
is_shipped = pytest.mark.skipif(not DEMO.exists(), reason="the bundled classifier is not here yet")


pytestmark = pytest.mark.usefixtures("one_thread")


def write_library(root, num_files=6):
    """A standard library in which every package has a word of its own."""
    draw = random.Random(4)
    for label in LABELS:
        folder = root if label == demo_windows.TOP else root / label
        word = label.split("-", 1)[0]
        for number in range(num_files):
            lines = [f"{word}{draw.randint(0, 9)} = {draw.choice('abcdef')}({number})" for _ in range(40)]
            path = folder / f"{word}_{number}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines) + "\n")
    (root / "xml" / "tests").mkdir()
    (root / "xml" / "tests" / "anything.py").write_text("x = 1\n" * 99)
    (root / "xml" / "test_x.py").write_text("x = 1\n" * 99)
    (root / "email" / "broken.py").write_bytes(b"# coding: utf-8\n\xff\xfe" + b"x = 1\n" * 99)
    (root / "email" / "short.py").write_text("x = 1\n")
    (root / "json").mkdir()
    (root / "json" / "other.py").write_text("x = 1\n" * 99)
    return root


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return write_library(tmp_path_factory.mktemp("stdlib"))


def arguments(library, tmp_path, *more):
    shape = ["vocab-size 300", "hidden-size 32", "intermediate-size 64", "num-hidden-layers 3"]
    words = [word for one in shape for word in f"--teacher-{one}".split()]
    words += [
        "--teacher-steps",
        "60",
        "--teacher-lr",
        "0.005",
        "--epochs",
        "2",
        "--students",
        "2",
        *("--test-files", "24", "--group-windows", "240"),
        *("--width", "1", "--mlp-width", "1", "--polish", "0", "--lr", "0.001"),
    ]
    words += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--stdlib", str(library)]
    return tool.parse_arguments([*words, *more])


@pytest.fixture(scope="module")
def made(library, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("made")
    args = arguments(library, folder)
    made = tool.make(args, args.work)
    record = tool.make_record(args, made)
    tool.export(made, record, args.out, args.seed)
    return args, made, record


def test_the_split_is_by_file_and_leaves_tests_and_other_packages_out(library):
    split = demo_windows.load_split(3, 24, library)
    train, test = ({one.name for one in part} for part in (split.train, split.test))
    assert len(test) == 24
    assert not train & test
    assert len(train | test) == 12 * 6
    assert [one.name for one in split.other] == ["json/other.py"], "a package that is no class"
    assert {one.label for one in split.test} == set(LABELS), "every class has its share"
    assert not any("test" in name or "json" in name for name in train | test)
    again, other = demo_windows.load_split(3, 24, library), demo_windows.load_split(4, 24, library)
    assert again == split
    assert other.test != split.test
    assert other.sha256 == split.sha256


def test_another_byte_is_another_corpus(library, tmp_path):
    copy = shutil.copytree(library, tmp_path / "copy")
    path = copy / "xml" / "xml_0.py"
    path.write_text(path.read_text() + "#\n")
    assert demo_windows.load_split(3, 24, copy).sha256 != demo_windows.load_split(3, 24, library).sha256


lines = st.lists(st.text("abz_ =(\n\t'é🙂", min_size=1, max_size=12), min_size=40, max_size=120)


@settings(deadline=None, max_examples=40)
@given(lines, st.sampled_from([7, 31, 62]), st.integers(1, 9))
def test_windows_are_pieces_of_their_file_and_full(parts, stride, most):
    text = " ".join(parts)
    tokenizer = demo_windows.train_tokenizer([text], 300)
    found = demo_windows.windows_of(tokenizer, Source("a.py", "xml", text), stride=stride, most=most, seed=1)
    assert len(found) <= most
    for one in found:
        assert one.text in text
        ids = demo_teacher.token_ids(tokenizer, [one.text])[0]
        assert len(ids) <= WINDOW
        assert ids[0] == demo_windows.SPECIAL.index("[CLS]")
        assert ids[-1] == demo_windows.SPECIAL.index("[SEP]")
        assert len(ids) > 0.7 * WINDOW or text.endswith(one.text), "only the last windows of a file are short"


def test_spliced_windows_begin_as_one_and_end_as_another(monkeypatch):
    monkeypatch.setattr(demo_windows, "PARTS", 1)
    windows = [demo_windows.Window(letter * 100, letter, f"{letter}.py") for letter in "abc"]
    found = demo_windows.spliced(windows, 50, seed=1)
    assert len(found) == 50
    assert demo_windows.spliced(windows, 50, seed=1) == found
    for one in found:
        first, last = one.text[0], one.text[-1]
        assert one.label == "", "no label is true of it"
        assert one.file == f"{first}.py {last}.py"
        assert 20 <= len(one.text) - 100 <= 80
        assert one.text == first * (len(one.text) - 100) + last * 100
    assert len({one.text[0] + one.text[-1] for one in found}) > 6


def test_windows_are_spliced_within_a_part():
    """So that what is held out of a distillation is of files that nothing was learnt from, not even a half."""
    windows = [demo_windows.Window(f"{at} " * 20, "xml", f"xml/{at}.py") for at in range(300)]
    found = demo_windows.spliced(windows, 300, seed=1)
    for one in found:
        begins, ends = one.file.split()
        assert demo_windows.part_of(begins) == demo_windows.part_of(ends) == demo_windows.part_of(one.file)
    assert len({demo_windows.part_of(one.file) for one in found}) > demo_windows.PARTS / 2
    assert sum(len(set(one.file.split())) == 2 for one in found) > 150, "mostly of two files"


def test_what_the_group_is_taught(made):
    args, found, _ = made
    taught = [json.loads(line) for line in found.rows.read_text().splitlines()]
    assert sum(not row["label"] for row in taught) >= round(args.spliced * args.group_windows)
    assert all(row["part"] == demo_windows.part_of(row["file"]) for row in taught)
    tests = {one.name for one in found.split.test}
    assert not any(set(row["file"].split()) & tests for row in taught), (
        "no file of the test set, not even a part"
    )


def test_what_the_tool_leaves(made):
    args, found, record = made
    assert sorted(path.name for path in args.out.iterdir()) == [
        "RECORD.json",
        "group",
        "teacher",
        "test.jsonl",
    ]
    assert not (args.out / "group" / "work").exists()
    assert json.loads((args.out / "RECORD.json").read_text()) == record
    assert (args.out / "test.jsonl").stat().st_size <= tool.SLICE_BYTES
    assert record["test_accuracy"]["teacher"] > 0.5, "a word per package can be learnt"
    assert len(found.distilled.figures) >= 1
    assert "--students 2" in record["command"]
    assert "--work" not in record["command"]


def test_what_is_done_is_not_done_again(made, monkeypatch):
    args, found, _ = made
    monkeypatch.setattr(tool, "train_teacher", lambda *_: pytest.fail("the teacher is there"))
    again = tool.make(args, args.work)
    assert again.distilled.figures == found.distilled.figures


def test_words_are_learnt_before_layers():
    """Windows whose words alone say the class: the table's words part ways, and nothing else of the teacher moves."""
    torch.manual_seed(3)
    config = demo_teacher.TeacherConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2
    )
    labels = torch.arange(96) % 2
    ids = torch.randint(0, 10, (96, WINDOW)) + 10 * (1 + labels[:, None])
    teacher = demo_teacher.Teacher(config)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    demo_teacher.learn_words(teacher, ids, labels, 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    demo_teacher.learn_words(teacher, ids, labels, 30)
    moved = {name for name, tensor in teacher.state_dict().items() if not torch.equal(before[name], tensor)}
    assert moved == {"bert.embeddings.word_embeddings.weight"}

    def apart(state):
        words = torch.nn.functional.normalize(state["bert.embeddings.word_embeddings.weight"][10:30], dim=-1)
        return (words[:10] @ words[:10].T).mean() - (words[:10] @ words[10:].T).mean()

    assert apart(teacher.state_dict()) > apart(before) + 0.1, "words of a class are nearer than those of two"


def test_a_spliced_window_has_as_much_of_a_class_as_of_its_text():
    torch.manual_seed(3)
    labels = torch.arange(8) % 4
    ids = (labels + 20)[:, None].expand(8, 64)  # every token of a window is its class
    mixed, shares = demo_teacher.spliced_windows(ids, labels, 4)
    for row, share in zip(mixed, shares, strict=True):
        assert torch.equal(torch.bincount(row - 20, minlength=4) / 64, share)
    assert (mixed != ids).any(), "some go on as others"
    assert torch.equal(mixed[:, :8], ids[:, :8]), "and all begin as themselves"


def test_an_averaged_teacher_lags_behind_the_last_weights():
    """Averaged from the first step on, after it: nothing else is drawn, so steps are those of the plain teacher."""
    small = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "batch": 8}
    plain = {"bag": 0, "mixed": 0.0, "averaged": 0.0}
    ids = torch.randint(5, 40, (16, WINDOW), generator=torch.Generator().manual_seed(1)).tolist()

    def trained(steps, **more):
        config = demo_teacher.TeacherConfig(**small, steps=steps, **(plain | more))
        teacher = demo_teacher.train_teacher(ids, [at % 12 for at in range(16)], config, 1, lambda *_: None)
        return teacher.classifier.weight.detach()

    last, mean, mixed = trained(6), trained(6, averaged=0.5), trained(6, mixed=1.0)
    begin = demo_teacher.TeacherConfig(**small, steps=0, **plain)
    first = demo_teacher.train_teacher(ids, [0] * 16, begin, 1, lambda *_: None).classifier.weight.detach()
    assert 0 < (mean - first).norm() < (last - first).norm()
    assert not torch.equal(mixed, last)
    assert torch.equal(trained(6), last)


def test_the_exported_teacher_is_the_trained_one(made):
    """Transformers reads the folder, and zinfer answers as it does; a changed matrix is noticed."""
    _, found, _ = made
    model = transformers.AutoModelForSequenceClassification.from_pretrained(found.teacher).eval()
    windows = found.test[:5]
    with Classifier(found.teacher, **CALM) as classifier:
        ours = [
            {one["label"]: one["score"] for one in scores}
            for scores in classifier.classify([window.text for window in windows], top_k=None)
        ]
    tokenizer = demo_windows.Tokenizer.from_file(str(found.teacher / "tokenizer.json"))
    for is_broken in (False, True):
        if is_broken:
            torch.nn.init.zeros_(model.bert.encoder.layer[1].output.dense.weight)
        for window, scores in zip(windows, ours, strict=True):
            ids = torch.tensor(demo_teacher.token_ids(tokenizer, [window.text]))
            with torch.no_grad():
                theirs = torch.softmax(model(ids).logits[0], -1)
            gap = max(abs(scores[label] - theirs[at].item()) for at, label in enumerate(LABELS))
            assert (gap > 1e-4) == is_broken


def test_hits_are_right_answers(made):
    _, found, record = made
    hits = demo_score.hits_of(found.group, found.test, students=1)
    assert round(float(hits.mean()), 4) == record["test_accuracy"]["students 1"]


def test_the_bootstrap_draws_files_and_not_windows():
    """A gain that one large file has is not significant; the same gain in many files is."""
    ours = np.array([True] * 50 + [False] * 50)
    theirs = np.zeros(100, dtype=bool)
    one_file = demo_score.paired(ours, theirs, ["a"] * 50 + [f"b{at}" for at in range(50)], draws=2000)
    many = demo_score.paired(ours, theirs, [f"{at}" for at in range(100)], draws=2000)
    assert one_file.difference == many.difference == 0.5
    assert one_file.p > 0.2
    assert many.p < 0.001
    assert many.low == pytest.approx(0.4, abs=0.03)
    assert many.high == pytest.approx(0.6, abs=0.03)
    same = demo_score.paired(ours, ours, ["a", "b"] * 50, draws=100)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)


def record():
    return json.loads((FOLDER / "RECORD.json").read_text())


@is_shipped
def test_the_shipped_folder_is_small_and_whole():
    sizes = [path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(sizes) <= 12 * 2**20
    assert (FOLDER / "test.jsonl").stat().st_size <= 2**16
    assert not (DEMO / "work").exists()
    found = record()
    assert found["corpus"]["test_windows"] >= 5000
    assert found["corpus"]["test_files"] >= 300
    assert found["group"]["students"] * found["group"]["layers"] <= found["teacher"]["num_hidden_layers"]


@is_shipped
def test_the_shipped_models_are_as_good_as_the_record_says():
    """On the shipped slice, drawn from all test files, each is near its recorded accuracy."""
    rows = [json.loads(line) for line in (FOLDER / "test.jsonl").read_text().splitlines()]
    windows = [demo_windows.Window(**row) for row in rows]
    wanted = record()["test_accuracy"]
    assert demo_score.hits_of(FOLDER / "teacher", windows).mean() == pytest.approx(
        wanted["teacher"], abs=0.08
    )
    for count in (1, record()["group"]["students"]):
        hits = demo_score.hits_of(DEMO, windows, students=count)
        assert hits.mean() == pytest.approx(wanted[f"students {count}"], abs=0.08)


@is_shipped
def test_the_default_of_the_class_is_the_bundled_group():
    with Classifier(**CALM) as classifier:
        assert set(classifier.labels) == set(LABELS)
        found = classifier.classify("loop = asyncio.get_running_loop()\nfuture = loop.create_future()\n" * 4)
    assert found["label"] == "asyncio"
    assert Path(classifier.engine.folder) == DEMO
