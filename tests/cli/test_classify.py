"""`zinfer classify` and `zinfer embed` as a user meets them: files in and out, exit codes, bad input."""

import csv
import json

import numpy as np
import pytest
from text_models import write_encoder

from zinfer import Classifier
from zinfer.cli.main import run

TEXTS = ["the quick brown fox", "a lazy dog, jumps", 'read "files"', "the\nfox"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_encoder("bert", tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(autouse=True)
def known_machine(monkeypatch):
    """No test measures this machine."""
    monkeypatch.setenv("ZINFER_MACHINE", "sim-default")
    monkeypatch.setenv("ZINFER_DEVICE", "cpu")


@pytest.fixture(scope="module")
def expected(model):
    with Classifier(model, device="cpu", machine="sim-default") as classifier:
        return classifier.classify(TEXTS, top_k=None), classifier.embed(TEXTS)


def go(capsys, *argv):
    """(exit code, stdout, stderr)"""
    code = run([str(part) for part in argv])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def test_texts_as_arguments(model, expected, capsys):
    code, out, _ = go(capsys, "classify", model, *TEXTS)
    assert code == 0
    labels = [line.split()[0] for line in out.splitlines()]
    assert labels == [scores[0]["label"] for scores in expected[0]]
    code, out, _ = go(capsys, "classify", model, TEXTS[0], "--top-k", 0, "--json")
    record = json.loads(out)
    assert record["results"] == [{"text": TEXTS[0], "labels": expected[0][0]}]
    assert record["plan"]["model"]["architecture"] == "BertForSequenceClassification"


def write_rows(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def read_rows(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("source", ["in.csv", "in.tsv", "in.jsonl"])
@pytest.mark.parametrize("target", ["out.csv", "out.jsonl"])
def test_files_in_and_out_keep_their_columns(model, expected, tmp_path, capsys, source, target):
    rows = [{"id": str(i), "body": text} for i, text in enumerate(TEXTS)]
    path = write_rows(tmp_path / source, rows)
    code, _, err = go(capsys, "classify", model, "-i", path, "--text-column", "body", "-o", tmp_path / target)
    assert code == 0
    assert "wrote 4 results" in err
    found = read_rows(tmp_path / target)
    assert [(row["id"], row["body"]) for row in found] == [(row["id"], row["body"]) for row in rows]
    assert [row["label"] for row in found] == [scores[0]["label"] for scores in expected[0]]
    assert [float(row["score"]) for row in found] == [scores[0]["score"] for scores in expected[0]]


def test_several_labels_are_columns(model, tmp_path, capsys):
    path = write_rows(tmp_path / "in.csv", [{"text": text} for text in TEXTS])
    assert go(capsys, "classify", model, "-i", path, "-o", tmp_path / "o.csv", "--top-k", 2)[0] == 0
    found = read_rows(tmp_path / "o.csv")
    assert list(found[0]) == ["text", "label_1", "score_1", "label_2", "score_2"]
    assert all(float(row["score_1"]) >= float(row["score_2"]) for row in found)


def test_pairs(model, tmp_path, capsys):
    path = write_rows(tmp_path / "in.jsonl", [{"a": "the fox", "b": "a dog"}])
    code, out, _ = go(capsys, "classify", model, "-i", path, "--text-column", "a", "--pair-column", "b")
    assert code == 0
    with Classifier(model, device="cpu", machine="sim-default") as classifier:
        assert json.loads(out) == {"a": "the fox", "b": "a dog"} | classifier.classify(("the fox", "a dog"))


def test_embeddings(model, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("zinfer.cli.texts.WINDOW", 3)  # two windows
    path = write_rows(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS])
    assert go(capsys, "embed", model, "-i", path, "-o", tmp_path / "rows.npy")[0] == 0
    rows = np.load(tmp_path / "rows.npy")
    assert rows.dtype == np.float32
    assert np.array_equal(rows, expected[1])
    assert go(capsys, "embed", model, "-i", path, "-o", tmp_path / "rows.jsonl")[0] == 0
    found = [row["embedding"] for row in read_rows(tmp_path / "rows.jsonl")]
    assert np.array_equal(np.array(found, dtype=np.float32), expected[1])
    _, out, _ = go(capsys, "embed", model, TEXTS[0], "--json")
    assert np.array_equal(np.float32(json.loads(out)["results"][0]["embedding"]), expected[1][0])
    assert json.loads(go(capsys, "embed", model, TEXTS[0])[1])["text"] == TEXTS[0]


@pytest.mark.parametrize(
    ("name", "raw", "code", "exit_code"),
    [
        ("in.csv", b"text\ncaf\xe9\n", "ZI-4932", 3),
        ("in.csv", b"body\nx\n", "ZI-4934", 3),
        ("in.csv", b"text,id\nx\n", "ZI-4933", 3),
        ("in.csv", b"text,text\nx,y\n", "ZI-4933", 3),
        ("in.csv", b'text\n"x\n', "ZI-4933", 3),
        ("in.csv", b"text\n", "ZI-4935", 3),
        ("in.csv", b"", "ZI-4935", 3),
        ("in.jsonl", b'{"text": 7}\n', "ZI-4934", 3),
        ("in.jsonl", b"[1]\n", "ZI-4933", 3),
        ("in.jsonl", b'{"text"\n', "ZI-4933", 3),
        ("in.jsonl", b'{"text": "\\ud800"}\n', "ZI-1131", 2),
        ("in.parquet", b"PAR1", "ZI-1138", 2),
    ],
)
def test_files_that_cannot_be_meant(model, tmp_path, capsys, name, raw, code, exit_code):
    path = tmp_path / name
    path.write_bytes(raw)
    target = tmp_path / "out.jsonl"
    found, _, err = go(capsys, "classify", model, "-i", path, "-o", target)
    assert (found, err.split()[1]) == (exit_code, code)
    assert "try:" in err
    assert list(tmp_path.iterdir()) == [path], "nothing half-written is left"


def test_a_failure_in_the_middle_leaves_nothing(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("zinfer.cli.texts.WINDOW", 2)
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "the"}\n{"text": "fox"}\n{"text": "dog"}\nnothing\n')
    for name, command in (("o.jsonl", "classify"), ("o.csv", "classify"), ("o.npy", "embed")):
        code, _, err = go(capsys, command, model, "-i", path, "-o", tmp_path / name)
        assert code == 3
        assert "line 4" in err
    assert list(tmp_path.iterdir()) == [path]


def test_sources_and_targets_are_checked_before_the_work(model, tmp_path, capsys):
    assert go(capsys, "classify", model)[2].split()[1] == "ZI-1139"
    assert go(capsys, "classify", model, "text", "-i", "in.csv")[2].split()[1] == "ZI-1139"
    assert go(capsys, "classify", model, "-i", tmp_path / "no.csv")[2].split()[1] == "ZI-4931"
    assert go(capsys, "embed", model, "text", "-o", "rows.csv")[2].split()[1] == "ZI-1138"
    assert go(capsys, "classify", model, "text", "-o", tmp_path / "no" / "o.csv")[0] == 5
    assert go(capsys, "classify", model, "text", "--top-k", -1)[2].split()[1] == "ZI-1112"


def test_plan_says_where_an_encoder_lives(model, capsys):
    code, out, _ = go(capsys, "plan", model, "--json")
    assert code == 0
    assert json.loads(out)["workload"]["gen_len"] == 1
