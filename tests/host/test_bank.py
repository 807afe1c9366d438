"""The bank against the students one by one, against transformers on a padded batch, and behind the Classifier."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
import transformers
from encoder_oracle import pack
from hypothesis import given
from hypothesis import strategies as st
from student_groups import COUNT, LAYERS, make_group, write_group_folder
from text_models import CONFIGS, tokenizer

from zinfer import Classifier
from zinfer.cli.main import run
from zinfer.errors import BudgetError, MachineError, UsageError, ZinferError
from zinfer.spec.read import read_spec
from zinfer.students.bank import StudentBank
from zinfer.students.group import read_group, write_group
from zinfer.students.student import OFFSET, PROJECTION

LENGTHS = (5, 17, 1, 9, 17, 40, 9)
CPU = {"device": "cpu", "machine": "sim-default", "threads": 1}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_group_folder(tmp_path_factory.mktemp("group") / "group")


def texts(lengths=LENGTHS):
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(3, 97, (length,), generator=draw).tolist() for length in lengths]


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
def test_every_prefix_is_the_students_one_by_one(family):
    group, bank = make_group(family), StudentBank(make_group(family))
    batch = pack(texts())
    prefixes = bank.prefixes(batch, COUNT)
    for m in range(1, COUNT + 1):
        slow = group.represent(batch, m)
        assert slow.std() > 0.3
        assert (prefixes[m - 1] - slow).abs().max() <= 1e-5
        rows, logits = bank.answer(batch, m)
        assert (rows - slow).abs().max() <= 1e-5
        assert (logits - group.calibrated(group.logits(slow), m)).abs().max() <= 1e-5
    assert (prefixes[0] - prefixes[1]).abs().max() > 0.1, "prefixes differ, or nothing was compared"


@torch.no_grad()
def test_a_slice_is_the_group_rebuilt_from_the_first(folder):
    whole = StudentBank(make_group())
    for m in range(1, COUNT + 1):
        part = make_group()
        part.students, part.factors = part.students[:m], part.factors[:m]
        rebuilt = StudentBank(part)
        rows, logits = whole.answer(pack(texts()), m)
        again, again_logits = rebuilt.answer(pack(texts()), m)
        assert (rows - again).abs().max() <= 1e-5
        assert (logits - again_logits).abs().max() <= 1e-5
        wrong, _ = whole.answer(pack(texts()), m % COUNT + 1)
        assert (wrong - again).abs().max() > 0.1, "the mutation: another prefix must be noticed"


@torch.no_grad()
def test_packed_equals_padded_equals_one_by_one():
    """The padded twin is transformers' own model, a copy per student, with an attention mask."""
    group, bank = make_group(), StudentBank(make_group())
    given = texts()
    longest = max(map(len, given))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in given])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in given])
    config = transformers.BertConfig(
        **(CONFIGS["bert"] | {"num_hidden_layers": LAYERS, "architectures": None})
    )
    padded = group.origin.expand(len(given), -1)
    for factor, weights in zip(group.factors, group.students, strict=True):
        model = transformers.BertModel(config, add_pooling_layer=False).eval()
        named = {name.removeprefix("bert."): tensor for name, tensor in (group.shared | weights).items()}
        strange = model.load_state_dict(named, strict=False)
        assert set(strange.unexpected_keys) == {PROJECTION, OFFSET}
        assert strange.missing_keys == []
        first = model(ids, attention_mask=mask).last_hidden_state[:, 0]
        padded = padded + factor * torch.nn.functional.linear(first, weights[PROJECTION], weights[OFFSET])
    packed, _ = bank.answer(pack(given), COUNT)
    alone = torch.cat([bank.answer(pack([text]), COUNT)[0] for text in given])
    assert (packed - padded).abs().max() <= 1e-5
    assert (packed - alone).abs().max() <= 1e-5
    without_mask = model(ids).last_hidden_state[:, 0]
    assert (without_mask - first).abs().max() > 1e-3, "the mutation: padding that is seen must be noticed"


@torch.no_grad()
@given(st.permutations(range(len(LENGTHS))))
def test_order_in_a_pack_does_not_matter(order):
    bank, given_texts = StudentBank(make_group()), texts()
    straight, _ = bank.answer(pack(given_texts), COUNT)
    turned, _ = bank.answer(pack([given_texts[at] for at in order]), COUNT)
    assert (turned - straight[list(order)]).abs().max() <= 1e-5


def test_no_weight_moves_while_it_serves(folder):
    with Classifier(folder, **CPU) as classifier:
        bank = classifier.engine.bank
        places = {name: tensor.data_ptr() for name, tensor in bank.stacked.items()}
        before = {name: tensor.clone() for name, tensor in bank.stacked.items()}
        for m in (3, 1, 2):
            classifier.engine.num_students = m
            classifier.classify(["the fox", ("a", "dog")])
            classifier.embed("the fox")
        assert {name: tensor.data_ptr() for name, tensor in bank.stacked.items()} == places
        assert all(torch.equal(tensor, before[name]) for name, tensor in bank.stacked.items())


def test_a_group_is_written_and_read_as_it_is(folder):
    group, other = make_group(), read_group(folder, read_spec(CONFIGS["bert"]))[0]
    one, two = group.tensors(), other.tensors()
    assert set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("students", [1, 2, 3, None])
def test_the_classifier_serves_a_group(folder, students):
    group = make_group()
    with Classifier(folder, students=students, **CPU) as classifier:
        found = classifier.classify(["the fox", "a lazy dog"], top_k=None, raw_scores=True)
        rows = classifier.embed(["the fox", "a lazy dog"])
        assert classifier.about()["students"] == (students or 3)
    words = tokenizer()
    batch = pack([words.encode("the fox").ids, words.encode("a lazy dog").ids])
    with torch.no_grad():
        slow = group.represent(batch, students or 3)
        logits = group.calibrated(group.logits(slow), students or 3)
    ours = [{score["label"]: score["score"] for score in one} for one in found]
    theirs = [dict(zip(group.teacher.encoder.labels, row.tolist(), strict=True)) for row in logits]
    assert ours == [pytest.approx(one, abs=1e-5) for one in theirs]
    assert np.abs(rows - slow.numpy()).max() <= 1e-5


def test_a_group_that_does_not_fit_is_refused_with_what_does(folder):
    with pytest.raises(BudgetError, match="ZI-2401") as caught:
        Classifier(folder, memory={"host": "64KiB"}, **CPU)
    assert "--host-mem" in caught.value.remedy


def test_a_group_spread_over_devices_is_served_and_each_device_counts_its_own(folder):
    with Classifier(folder, **CPU) as one, Classifier(folder, spread=("cpu", "cpu"), **CPU) as two:
        given = ["the fox", ("a", "dog"), "x"]
        assert np.abs(one.embed(given) - two.embed(given)).max() <= 1e-5
        whole, shared = one.engine.ledger.reserved["students"], two.engine.ledger.reserved["students"]
        students = sum(one.engine.bank.stacked[name][0].nbytes for name in one.engine.bank.stacked)
        assert whole - shared == students, "of three students the first device holds two"
        assert whole >= one.engine.bank.nbytes
    with pytest.raises(UsageError, match="ZI-1164"):
        Classifier(folder, spread=("cpu",) * 4, **CPU)
    with pytest.raises(MachineError, match="ZI-5342"):
        Classifier(folder, spread=("cpu", "cuda:63"), **CPU)


def test_students_that_are_not_there(folder, tmp_path):
    for students in (0, 4):
        with pytest.raises(UsageError, match="ZI-1159"):
            Classifier(folder, students=students, **CPU)
    plain = tmp_path / "plain"
    plain.mkdir()
    with pytest.raises(UsageError, match="ZI-1140"):
        Classifier(plain, students=1, **CPU)


def remade(path, **changes):
    """The manifest with other claims."""
    manifest = json.loads((path / "students.json").read_text())
    (path / "students.json").write_text(json.dumps(manifest | changes))


def flip(path):
    """One bit of a weight."""
    data = bytearray(path.read_bytes())
    data[-1002] ^= 0x20
    path.write_bytes(data)


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: (path / "students.safetensors").unlink(),
        lambda path: (path / "config.json").unlink(),
        lambda path: (path / "tokenizer.json").unlink(),
        lambda path: (path / "config.json").write_text("{"),
        lambda path: (path / "students.json").write_text("[]"),
        lambda path: remade(path, students=4),
        lambda path: remade(path, layers=1),
        lambda path: flip(path / "students.safetensors"),
        lambda path: os.truncate(path / "students.safetensors", 9000),
    ],
)
def test_a_damaged_group_is_refused(folder, tmp_path, harm):
    copy = shutil.copytree(folder, tmp_path / "copy")
    with Classifier(copy, **CPU):
        harm(copy)
    with pytest.raises(ZinferError):
        Classifier(copy, **CPU)


def test_the_command_line(folder, capsys, monkeypatch):
    monkeypatch.setenv("ZINFER_DEVICE", "cpu")
    assert run(["classify", str(folder), "the fox", "--students", "2", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["students"], record["of"]) == (2, 3)
    assert run(["embed", str(folder), "the fox", "--students", "9"]) == 2


def test_a_group_of_a_teacher_that_left_its_prefix_out(folder, tmp_path):
    """The published MiniLM names its tensors without "bert.": what was distilled from it must be served."""
    teacher = read_spec(CONFIGS["bert"])
    bare = {row.name.removeprefix("bert."): "F32" for row in teacher.lookups}
    spec = read_spec(CONFIGS["bert"], None, bare)
    group = make_group()
    plain = {name.removeprefix("bert."): tensor for name, tensor in group.shared.items()}
    students = [{name.removeprefix("bert."): x for name, x in own.items()} for own in group.students]
    group.teacher, group.shared, group.students = spec, plain, students
    copy = shutil.copytree(folder, tmp_path / "copy")
    write_group(group, copy, {"prefixes": []})
    with Classifier(copy, **CPU) as other, Classifier(folder, **CPU) as classifier:
        assert np.array_equal(other.embed("the fox"), classifier.embed("the fox"))
