"""`zinfer distill` as a user meets it."""

import json
import random
import re
import shlex

import pytest
from text_models import WORDS, write_encoder

from zinfer.cli.main import run


@pytest.fixture(autouse=True)
def known_machine(monkeypatch):
    """No test measures this machine."""
    monkeypatch.setenv("ZINFER_MACHINE", "sim-default")
    monkeypatch.setenv("ZINFER_DEVICE", "cpu")
    monkeypatch.setenv("ZINFER_RUNTIME_THREADS", "1")


def command(folder, *more):
    draw = random.Random(1)
    data = folder / "train.csv"
    if not data.exists():
        lines = [" ".join(draw.choices(WORDS, k=6)) for _ in range(120)]
        data.write_text("text\n" + "\n".join(lines) + "\n")
    options = ["--students", "2", "--layers", "1", "--epochs", "1", "--polish", "1", "--lr", "1e-3"]
    return ["distill", "--teacher", folder / "t", "--data", data, "--out", folder / "out", *options, *more]


def go(capsys, argv):
    code = run([str(part) for part in argv])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def test_from_a_teacher_to_answers(tmp_path, capsys, monkeypatch):
    write_encoder("bert", tmp_path / "t")
    with monkeypatch.context() as patch:
        patch.setattr("zinfer.students.distill.Distillation._polish", interrupt)
        code, _, err = go(capsys, command(tmp_path))
    assert code == 130
    assert "run the same command to go on" in err
    code, _, err = go(capsys, command(tmp_path))
    assert code == 2
    assert "--resume" in re.search(r"try: (.*)", err)[1]
    code, out, _ = go(capsys, command(tmp_path, "--resume"))
    assert code == 0
    assert "| students |" in out
    code, again, _ = go(capsys, command(tmp_path, "--resume"))
    assert (code, again) == (0, out), "what is done is not done again"
    code, _, err = go(capsys, command(tmp_path))
    assert (code, err.split()[1]) == (2, "ZI-1157")
    code, out, _ = go(capsys, ["classify", tmp_path / "out", "the fox", "--students", "1"])
    assert code == 0
    assert out.split()[0] in ("calm", "angry", "glad")


def interrupt(*_):
    raise KeyboardInterrupt


def test_json_says_what_each_prefix_is_worth(tmp_path, capsys):
    write_encoder("bert", tmp_path / "t")
    code, out, _ = go(capsys, command(tmp_path, "--json"))
    assert code == 0
    record = json.loads(out)
    assert [one["students"] for one in record["prefixes"]] == list(range(1, len(record["prefixes"]) + 1))
    assert record["rounds"][0]["kept"]


def test_a_teacher_that_is_not_there(tmp_path, capsys):
    (tmp_path / "train.csv").write_text("text\nx\n")
    code, _, err = go(capsys, command(tmp_path))
    assert code == 3
    assert shlex.split(re.search(r"try: (.*)", err)[1].partition("#")[0])
