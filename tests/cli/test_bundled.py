"""`zinfer classify` without a model: what is a model, what is a text, and the bundled example's answers."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_models import write_encoder

from zinfer.classifier import DEMO
from zinfer.cli.main import run
from zinfer.cli.texts import model_and_texts

CODE = "loop = asyncio.get_running_loop()\nfuture = loop.create_future()"
is_shipped = pytest.mark.skipif(not DEMO.exists(), reason="the bundled classifier is not here yet")


@pytest.fixture(autouse=True)
def known_machine(monkeypatch):
    """No test measures this machine."""
    monkeypatch.setenv("ZINFER_MACHINE", "sim-default")
    monkeypatch.setenv("ZINFER_DEVICE", "cpu")
    monkeypatch.setenv("ZINFER_RUNTIME_THREADS", "1")


def go(capsys, *argv):
    code = run([str(part) for part in argv])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def test_what_is_a_model_and_what_is_a_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert model_and_texts("model", (), None) == ("model", ())
    assert model_and_texts("model", ("a",), None) == ("model", ("a",))
    assert model_and_texts("modle", ("a",), None) == ("modle", ("a",)), (
        "a mistyped folder is not found, not read"
    )
    assert model_and_texts("import x", (), None) == (None, ("import x",))
    assert model_and_texts("x" * 5000, (), None) == (None, ("x" * 5000,))
    assert model_and_texts("modle", (), tmp_path / "in.csv") == ("modle", ())
    assert model_and_texts(None, (), tmp_path / "in.csv") == (None, ())
    assert model_and_texts("demo", ("a", "b"), None) == (None, ("a", "b"))
    assert model_and_texts("demo", (), None) == (None, ()), "and then there is no text"
    (tmp_path / "demo").mkdir()
    assert model_and_texts("demo", ("a",), None) == ("demo", ("a",)), "a folder of that name comes first"


@given(st.text(max_size=400), st.lists(st.text(max_size=9), max_size=3).map(tuple))
def test_no_argument_is_lost(first, others):
    model, texts = model_and_texts(first, others, None)
    given_texts = (*((first,) if model is None and first != "demo" else ()), *others)
    assert texts == given_texts
    assert model in (None, first)


def test_a_model_that_is_there_wants_texts(tmp_path, capsys):
    folder = write_encoder("bert", tmp_path / "model")
    assert go(capsys, "classify", folder)[2].split()[1] == "ZI-1139"
    assert go(capsys, "classify")[2].split()[1] == "ZI-1139"
    assert go(capsys, "classify", "demo")[2].split()[1] == "ZI-1139"
    assert go(capsys, "classify", tmp_path / "no", "text")[0] == 3


@is_shipped
def test_the_bundled_example_answers(tmp_path, capsys):
    code, out, _ = go(capsys, "classify", CODE)
    assert code == 0
    assert out.split()[0] == "asyncio"
    code, out, _ = go(capsys, "classify", "demo", CODE, "msg = email.message_from_string(text)", "--json")
    record = json.loads(out)
    assert [len(one["labels"]) for one in record["results"]] == [1, 1]
    assert record["students"] == record["of"] == 3
    rows = tmp_path / "in.jsonl"
    rows.write_text(json.dumps({"text": CODE}) + "\n")
    code, out, _ = go(capsys, "classify", "-i", rows, "--students", 1)
    assert code == 0
    assert json.loads(out)["label"] == "asyncio"


@is_shipped
def test_the_bundled_teacher_is_a_model_like_any_other(capsys):
    code, out, _ = go(capsys, "classify", DEMO.parent / "teacher", CODE, "--json")
    assert code == 0
    assert json.loads(out)["plan"]["model"]["architecture"] == "BertForSequenceClassification"
