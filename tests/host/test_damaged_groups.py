"""A group with a damaged or missing member: refused, or served with its first whole students and announced."""

import json
import shutil

import pytest
import torch
from student_groups import COUNT, make_group, write_group_folder
from text_models import CONFIGS

from zinfer import Classifier
from zinfer.cli.main import run
from zinfer.errors import IntegrityError, ZinferError
from zinfer.spec.read import read_spec
from zinfer.students.group import read_group
from zinfer.students.members import digests, num_whole, part_of
from zinfer.students.tensors import read_tensors, write_tensors

CPU = {"device": "cpu", "machine": "sim-default", "threads": 1}
TEXTS = ["the fox", "a lazy dog"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_group_folder(tmp_path_factory.mktemp("whole") / "group")


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def changed(folder, change):
    """The weights after `change` of the dict of tensors."""
    tensors, _ = read_tensors(folder / "students.safetensors")
    change(tensors)
    write_tensors(folder / "students.safetensors", tensors)


def spoil(name):
    """One value of the first tensor whose name holds `name`."""

    def change(tensors):
        tensor = next(tensor for key, tensor in sorted(tensors.items()) if name in key)
        tensor.view(-1)[0] += 1.0

    return change


def lose(name):
    """All tensors whose name begins so."""

    def change(tensors):
        for key in [key for key in tensors if key.startswith(name)]:
            del tensors[key]

    return change


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (spoil("students/2/"), 2),
        (spoil("students/1/"), 1),
        (lose("students/2/"), 2),
        (lose("students/1/bert.encoder.layer.0.attention.self.query.weight"), 1),
        (lambda tensors: tensors.update({"note": torch.zeros(1)}), 0),
        (spoil("students/0/"), 0),
        (spoil("shared/"), 0),
        (spoil("origin"), 0),
        (lose("temperatures"), 0),
        (lose("head/"), 0),
    ],
)
def test_the_first_whole_students_answer_or_none_do(whole, copy, change, left, caplog):
    changed(copy, change)
    with pytest.raises(IntegrityError, match="ZI-6093") as caught:
        Classifier(copy, **CPU)
    assert "--degraded" in caught.value.remedy
    if not left:
        with pytest.raises(IntegrityError, match="ZI-6093"):
            Classifier(copy, degraded=True, **CPU)
        return
    with (
        Classifier(copy, degraded=True, **CPU) as degraded,
        Classifier(whole, students=left, **CPU) as classifier,
    ):
        assert degraded.classify(TEXTS) == classifier.classify(TEXTS), (
            "they answer as they would in the whole"
        )
        assert {one["students"] for one in degraded.classify(TEXTS)} == {left}
        assert (degraded.about()["students"], degraded.about()["of"]) == (left, COUNT)
    assert f"the first {left} of its {COUNT}" in caplog.text, "it is announced"
    with pytest.raises(ZinferError, match="ZI-1159"):
        Classifier(copy, students=left + 1, degraded=True, **CPU)


def test_a_whole_group_is_not_degraded_and_nothing_is_said(whole, caplog):
    with Classifier(whole, degraded=True, **CPU) as classifier:
        assert classifier.about()["students"] == COUNT
    assert caplog.text == ""


def test_bytes_that_changed_but_mean_the_same_leave_all_students(whole, copy, caplog):
    changed(copy, lambda tensors: None)
    data = (copy / "students.safetensors").read_bytes()
    (copy / "students.safetensors").write_bytes(data.replace(b'"notes"', b'"n0tes"'))
    group, _ = read_group(copy, read_spec(CONFIGS["bert"]), is_degraded=True)
    assert len(group.students) == COUNT
    assert "damaged" in caplog.text


@pytest.mark.parametrize("at", [9, 40, 300, -5])
def test_any_flipped_byte_is_a_typed_error_or_fewer_students(copy, at):
    path = copy / "students.safetensors"
    data = bytearray(path.read_bytes())
    data[at] ^= 0x15
    path.write_bytes(data)
    try:
        with Classifier(copy, degraded=True, **CPU) as classifier:
            assert classifier.classify(TEXTS)[0]["students"] <= COUNT
    except ZinferError as error:
        assert error.remedy


def test_a_group_of_an_older_kind_vouches_for_no_member(copy):
    manifest = json.loads((copy / "students.json").read_text())
    del manifest["members"]
    (copy / "students.json").write_text(json.dumps(manifest))
    with Classifier(copy, **CPU) as classifier:
        assert classifier.about()["students"] == COUNT
    changed(copy, spoil("students/2/"))
    with pytest.raises(IntegrityError, match="ZI-6093"):
        Classifier(copy, degraded=True, **CPU)


def test_digests_see_names_shapes_and_bytes():
    tensors = make_group().tensors()
    manifest = {"members": digests(tensors)}
    assert set(manifest["members"]) == {"common", "0", "1", "2"}
    assert num_whole(tensors, manifest) == COUNT
    assert part_of("students/12/x/y") == "12"
    name = "students/1/projection.bias"
    for other in (tensors[name].view(8, 8), tensors[name].double(), -tensors[name]):
        assert num_whole(tensors | {name: other}, manifest) == 1
    assert num_whole(tensors, {}) == num_whole(tensors, {"members": []}) == 0


def test_the_command_line_says_so(copy, capsys, monkeypatch):
    for key, value in (("DEVICE", "cpu"), ("MACHINE", "sim-default"), ("RUNTIME_THREADS", "1")):
        monkeypatch.setenv(f"ZINFER_{key}", value)
    changed(copy, spoil("students/2/"))
    assert run(["classify", str(copy), "the fox"]) == 6
    assert "--degraded" in capsys.readouterr().err
    assert run(["classify", str(copy), "the fox", "--degraded", "--json"]) == 0
    out, err = capsys.readouterr()
    assert (json.loads(out)["students"], json.loads(out)["of"]) == (2, 3)
    assert json.loads(out)["results"][0]["labels"][0]["students"] == 2
    assert "damaged" in err
    assert run(["embed", str(copy), "the fox", "--degraded"]) == 0
