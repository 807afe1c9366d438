"""Students narrower than their teacher: a share of its heads and neurons, in every form, as a folder, and distilled."""

import json
import random

import pytest
import torch
from encoder_oracle import pack
from hypothesis import given
from hypothesis import strategies as st
from student_groups import COUNT, LAYERS, make_group, write_group_folder
from text_models import CONFIGS, WORDS, write_encoder

from zinfer import Classifier
from zinfer.cli.main import run
from zinfer.config.load import load_settings
from zinfer.errors import IntegrityError, UsageError
from zinfer.spec.read import read_spec
from zinfer.students import stacked
from zinfer.students.bank import StudentBank
from zinfer.students.fixed import Bucket, fill_up
from zinfer.students.forms import Forms
from zinfer.students.group import read_group, write_group
from zinfer.students.job import distill
from zinfer.students.narrow import cut, width_for
from zinfer.students.settings import DistillSettings
from zinfer.students.spread import CopyingCollective, SpreadBank
from zinfer.students.student import Width, answer, layer_shapes, source_names, student_spec, width_of

CPU = {"device": "cpu", "machine": "sim-default", "threads": 1}
LENGTHS = (5, 17, 1, 9, 17)
ONE = Width(1, 16, 40)  # of 4 heads and 160 neurons
PART = Width(1, 5, 7)  # .. less than a head

pytestmark = pytest.mark.usefixtures("one_thread")


def texts():
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(3, 97, (length,), generator=draw).tolist() for length in LENGTHS]


def teacher_layers(family="bert", seed=2):
    """(spec of the teacher, its layers' weights by published name, all different)."""
    teacher = read_spec(CONFIGS[family])
    draw = torch.Generator().manual_seed(seed)
    full = student_spec(teacher, LAYERS)
    return teacher, {name: torch.randn(shape, generator=draw) for name, shape in layer_shapes(full).items()}


def matrices(student, kind):
    return [weight.name for op in student.program if op.kind == kind for weight in op.weights[-2:]]


def test_a_student_as_wide_as_its_teacher_is_a_copy():
    teacher, whole = teacher_layers()
    for k in range(COUNT):
        own = cut(student_spec(teacher, LAYERS), teacher, whole, k)
        assert own.keys() == whole.keys()
        assert all(torch.equal(own[name], whole[name]) for name in whole)
        assert all(own[name].data_ptr() != whole[name].data_ptr() for name in whole), "it is trained"


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(("heads", "mlp"), [(1, 40), (2, 80), (4, 160)])
def test_students_share_out_what_the_teacher_has(family, heads, mlp):
    """Each takes others; what they write into the stream adds up to what the teacher's layer writes."""
    teacher, whole = teacher_layers(family)
    student, count = student_spec(teacher, LAYERS, Width(heads, 16, mlp)), 4 // heads
    parts = [cut(student, teacher, whole, k) for k in range(count)]
    for part in parts:
        assert {name: tuple(tensor.shape) for name, tensor in part.items()} == layer_shapes(student)
    x = torch.randn(7, teacher.model_dim, generator=torch.Generator().manual_seed(1))
    for inner, outer in (("v", "o"), ("up", "down")):
        for (into, bias), (out_of, _) in zip(
            *(zip(*[iter(matrices(student, kind))] * 2, strict=True) for kind in (inner, outer)), strict=True
        ):
            written = [(x @ part[into].T + part[bias]) @ part[out_of].T for part in parts]
            wanted = (x @ whole[into].T + whole[bias]) @ whole[out_of].T
            assert (sum(written) - wanted).abs().max() <= 1e-3 * wanted.abs().max()
            if count > 1:
                assert not torch.allclose(written[0], written[1]), "they are not the same"


def test_the_first_student_has_what_writes_most():
    teacher, whole = teacher_layers()
    student = student_spec(teacher, LAYERS, ONE)
    v, o = matrices(student, "v")[0], matrices(student, "o")[0]
    up, down = matrices(student, "up")[0], matrices(student, "down")[0]
    whole[v][32:48] *= 9
    whole[o][:, 16:32] *= 5
    whole[up][3:43] *= 2
    first, second = cut(student, teacher, whole, 0), cut(student, teacher, whole, 1)
    assert torch.equal(first[v], whole[v][32:48])
    assert torch.equal(second[v], whole[v][16:32])
    assert torch.equal(first[up], whole[up][3:43])
    assert torch.equal(first[down], whole[down][:, 3:43])


@given(st.integers(1, 4), st.integers(1, 160), st.integers(0, 9))
def test_no_student_has_a_head_twice(heads, mlp, k):
    teacher, whole = teacher_layers()
    student = student_spec(teacher, LAYERS, Width(heads, 16, mlp))
    own = cut(student, teacher, whole, k)
    for kind in ("q", "k", "v", "up"):
        for name in matrices(student, kind):
            rows = own[name].view(len(own[name]), -1)
            assert len(rows.unique(dim=0)) == len(rows)


@pytest.mark.parametrize(
    ("share", "wanted"),
    [(1.0, (4, 16, 160)), (0.4, (2, 16, 64)), (0.25, (1, 16, 40)), (0.125, (1, 8, 20)), (1e-9, (1, 1, 1))],
)
def test_a_share_is_of_heads_or_of_one_head(share, wanted):
    teacher = read_spec(CONFIGS["bert"])
    assert width_for(teacher, share) == Width(*wanted)
    assert width_for(teacher, share).fits(teacher)
    assert width_for(teacher, share, 0.5) == Width(*wanted[:2], 80), "neurons have a share of their own"
    assert width_for(teacher, share, 1e-9).mlp == 1


def test_a_part_of_a_head_attends_as_loudly():
    """Queries grow by the root of what is missing: where a head's rows are equal, its logits are as they were."""
    teacher, whole = teacher_layers()
    student = student_spec(teacher, LAYERS, Width(1, 4, 40))
    query, key = matrices(student, "q")[0], matrices(student, "k")[0]
    for name in (query, key):
        whole[name][:] = whole[name][:1].clone()
    own = cut(student, teacher, whole, 0)
    x = torch.randn(64, generator=torch.Generator().manual_seed(1))
    wanted = (whole[query][:16] @ x) @ (whole[key][:16] @ x) * teacher.head_dim**-0.5
    assert (own[query] @ x) @ (own[key] @ x) * student.head_dim**-0.5 == pytest.approx(
        wanted.item(), rel=1e-4
    )


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
def test_a_narrow_student_is_a_wide_one_whose_other_heads_are_silent(family):
    """The slow twin: the teacher's own layers, with nothing written by what the student did not take."""
    group = make_group(family)
    wide, narrow = group.spec, student_spec(group.teacher, LAYERS, Width(2, 16, 40))
    layers = layer_shapes(wide)
    batch = pack(texts())
    for k, weights in enumerate(group.students):
        whole = {name: weights[name] for name in layers}
        own = weights | cut(narrow, group.teacher, whole, k)
        silent = dict(weights)
        for outer, inner in (("o", "v"), ("down", "up")):
            for name, (into, _) in zip(
                matrices(wide, outer)[::2], zip(*[iter(matrices(wide, inner))] * 2, strict=True), strict=True
            ):
                is_taken = (whole[into][:, None] == own[into]).all(-1).any(1)
                assert 0 < is_taken.sum() < len(is_taken)
                silent[name] = whole[name] * is_taken
        ours = answer(narrow, group.shared, own, batch)
        assert (ours - answer(wide, group.shared, silent, batch)).abs().max() <= 1e-5
        assert (ours - answer(wide, group.shared, weights, batch)).abs().max() > 0.05, (
            "the mutation: all of them"
        )


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("width", [ONE, PART])
def test_every_form_and_every_prefix_is_the_students_one_by_one(family, width):
    group, bank = make_group(family, width), StudentBank(make_group(family, width))
    batch = pack(texts())
    assert isinstance(bank.forms, Forms)
    for m in range(1, COUNT + 1):
        slow = group.represent(batch, m)
        for form in bank.forms.by_name.values():
            shares = bank.factors[:m, None, None] * form(batch, m)
            assert (group.origin + shares.sum(0) - slow).abs().max() <= 1e-5
        rows, logits = bank.answer(batch, m)
        assert (rows - slow).abs().max() <= 1e-5
        assert (logits - group.calibrated(group.logits(slow), m)).abs().max() <= 1e-5
        other = group.represent(batch, m % COUNT + 1)
        assert (other - rows).abs().max() > 0.1, "the mutation: another prefix"
    bank.close()


@torch.no_grad()
def test_packed_is_one_by_one_is_filled_up():
    group = make_group(width=ONE)
    given, batch = texts(), pack(texts())
    together = group.represent(batch, COUNT)
    alone = torch.cat([group.represent(pack([text]), COUNT) for text in given])
    assert (together - alone).abs().max() <= 1e-5
    whole = {name: torch.stack([own[name] for own in group.students]) for name in group.students[0]}
    rows, text_T, starts_S = fill_up(batch, Bucket(64, 16))
    answers = stacked.filled(group.spec, group.shared, whole, rows, text_T, starts_S)[:, : len(given)]
    shares = torch.stack(group.factors)[:, None, None] * answers
    assert (group.origin + shares.sum(0) - together).abs().max() <= 1e-5


@torch.no_grad()
def test_spread_over_devices_is_one_bank():
    batch = pack(texts())
    spread = SpreadBank(make_group(width=Width(2, 16, 40)), ["cpu", "cpu"], CopyingCollective())
    bank = StudentBank(make_group(width=Width(2, 16, 40)))
    for m in range(1, COUNT + 1):
        assert (spread.answer(batch, m)[0] - bank.answer(batch, m)[0]).abs().max() <= 1e-5
    spread.close()
    bank.close()


def test_the_bank_holds_what_a_narrow_group_needs():
    narrow, wide = StudentBank(make_group(width=ONE)), StudentBank(make_group())
    shared = sum(tensor.nbytes for tensor in (*wide.group.shared.values(), *wide.group.head.values()))
    assert narrow.nbytes - shared < 0.45 * (wide.nbytes - shared)
    narrow.close()
    wide.close()


@pytest.fixture
def folder(tmp_path):
    return write_group_folder(tmp_path / "group", make_group(width=ONE))


def manifest(folder, change):
    """Change what students.json says."""
    path = folder / "students.json"
    held = json.loads(path.read_text())
    change(held)
    path.write_text(json.dumps(held))
    return folder


def test_a_folder_says_how_wide_its_students_are(folder):
    held = json.loads((folder / "students.json").read_text())
    assert (held["layers"], held["width"]) == (LAYERS, {"heads": 1, "head_dim": 16, "mlp": 40})
    group, _ = read_group(folder, read_spec(CONFIGS["bert"]))
    assert width_of(group.spec) == group.width == ONE
    wanted = make_group(width=ONE).represent(pack(texts()), COUNT)
    assert torch.equal(group.represent(pack(texts()), COUNT), wanted)
    with Classifier(folder, **CPU) as classifier:
        assert len(classifier.classify(["the fox", "a lazy dog"])) == 2


def older(held):
    del held["width"]


def but(**other):
    """Another width than was written."""
    return lambda held: held["width"].update(other)


def test_a_group_written_before_there_were_narrow_ones_loads(tmp_path):
    path = manifest(write_group_folder(tmp_path / "old"), older)
    group, _ = read_group(path, read_spec(CONFIGS["bert"]))
    assert width_of(group.spec) == Width(4, 16, 160)
    with Classifier(path, **CPU) as classifier:
        assert classifier.classify("the fox")["label"] in ("calm", "angry", "glad")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (older, "ZI-6092"),
        (but(heads=2), "ZI-6092"),
        (but(head_dim=8), "ZI-6092"),
        (but(mlp=41), "ZI-6092"),
        (but(heads=5), "ZI-6091"),
        (but(head_dim=17), "ZI-6091"),
        (but(mlp=0), "ZI-6091"),
        (but(heads="many"), "ZI-6091"),
        (but(heads=None), "ZI-6091"),
        (but(depth=2), "ZI-6091"),
        (lambda held: held.update(width=3), "ZI-6091"),
        (lambda held: held.update(width={}), "ZI-6091"),
    ],
)
def test_a_manifest_that_does_not_fit_its_weights_is_refused(folder, change, code):
    with pytest.raises(IntegrityError) as caught:
        read_group(manifest(folder, change), read_spec(CONFIGS["bert"]))
    assert caught.value.code == code
    assert caught.value.remedy


def test_a_member_of_another_width_is_refused(tmp_path):
    group = make_group(width=ONE)
    group.students[1] = make_group(width=Width(2, 16, 40)).students[1]
    path = write_group_folder(tmp_path / "group", group)
    with pytest.raises(IntegrityError, match="ZI-6092") as caught:
        read_group(path, read_spec(CONFIGS["bert"]))
    assert "student 1" in caught.value.message


class KilledError(Exception):
    """Stands for the death of the process."""


def table(path):
    draw = random.Random(3)
    rows = [{"text": " ".join(draw.choices(WORDS, k=draw.randint(2, 9)))} for _ in range(120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def go(teacher, data, out, *, progress=lambda *_: None, resume=False, **options):
    flags = {"device": "cpu", "machine": "sim-default", "memory.host": "1GiB", "runtime.threads": 1}
    quick = {"students": 2, "layers": 1, "width": 0.5, "epochs": 1, "polish": 1, "batch": 16, "lr": 1e-3}
    return distill(
        teacher,
        data,
        out,
        settings=DistillSettings(**(quick | {"least_gain": 0.0} | options)),
        engine=load_settings(None, flags=flags).settings,
        progress=progress,
        resume=resume,
        save_every=3,
    )


def dies_at(step):
    left = [step]

    def progress(*_):
        left[0] -= 1
        if left[0] < 0:
            raise KilledError

    return progress


def test_distilled_narrow_resumed_and_said(tmp_path):
    teacher = write_encoder("bert", tmp_path / "teacher")
    data = table(tmp_path / "train.jsonl")
    done = go(teacher, data, tmp_path / "whole")
    with pytest.raises(KilledError):
        go(teacher, data, tmp_path / "group", progress=dies_at(11))
    with pytest.raises(UsageError, match="ZI-1158"):
        go(teacher, data, tmp_path / "group", resume=True, width=1.0)
    go(teacher, data, tmp_path / "group", resume=True)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "group" / path.name).read_bytes(), path.name
    assert done.notes["width"] == {"heads": 2, "head_dim": 16, "mlp": 80}
    assert done.figures[0].residual < 0.95
    assert "Heads 2 of 16 dimensions, 80 neurons" in (tmp_path / "whole" / "report.md").read_text()
    group, _ = read_group(tmp_path / "whole", read_spec(CONFIGS["bert"]))
    assert group.spec.num_heads == 2


def test_the_command_takes_a_width(tmp_path, capsys, monkeypatch):
    for name, value in (("MACHINE", "sim-default"), ("DEVICE", "cpu"), ("RUNTIME_THREADS", "1")):
        monkeypatch.setenv(f"ZINFER_{name}", value)
    teacher, data = write_encoder("bert", tmp_path / "t"), table(tmp_path / "d.jsonl")
    words = [
        "distill",
        "--teacher",
        teacher,
        "--data",
        data,
        "--students",
        "2",
        "--layers",
        "1",
        "--epochs",
        "1",
    ]
    words += ["--polish", "0", "--json", "--out", tmp_path / "out"]
    assert run([*map(str, words), "--width", "0.25", "--mlp-width", "0.5"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["width"] == {"heads": 1, "head_dim": 16, "mlp": 80}
    assert (said["settings"]["width"], said["settings"]["mlp_width"]) == (0.25, 0.5)
    assert run([*map(str, words), "--width", "1.5"]) == 2
    assert "ZI-1151" in capsys.readouterr().err


@pytest.mark.parametrize("width", [0.0, -0.5, 1.01, float("nan"), float("inf")])
def test_widths_that_cannot_be_meant(width):
    for name in ("width", "mlp_width"):
        with pytest.raises(UsageError, match=f"ZI-1151.*{name} = ") as caught:
            DistillSettings(**{name: width})
        assert "--width 1" in caught.value.remedy


def test_a_finished_group_of_an_older_version_is_finished(tmp_path):
    """Its settings say nothing of a width; the same command with --resume has nothing left to do."""
    teacher, data = write_encoder("bert", tmp_path / "t"), table(tmp_path / "d.jsonl")
    out = tmp_path / "out"
    go(teacher, data, out, width=1.0)

    def forget(held):
        older(held)
        del held["settings"]["width"]

    manifest(out, forget)
    done = go(teacher, data, out, width=1.0, resume=True, progress=dies_at(0))
    assert len(done.figures) == len(done.notes["rounds"])
    with pytest.raises(UsageError, match="ZI-1157"):
        go(teacher, data, out, width=0.5, resume=True)


def test_mean_pooling_students_may_be_narrow():
    group = make_group("bert", PART, architectures=["BertModel"])
    assert group.represent(pack(texts()), COUNT).shape == (len(LENGTHS), 64)


def test_published_names_lead_to_the_teachers_layers():
    teacher = read_spec(CONFIGS["bert"])
    wide, narrow = student_spec(teacher, LAYERS), student_spec(teacher, LAYERS, ONE)
    assert source_names(narrow, [1, 3]) == source_names(wide, [1, 3])
    assert [op.index for op in narrow.program] == list(range(len(narrow.program)))
    write = {name: shape for name, shape in layer_shapes(narrow).items() if shape != layer_shapes(wide)[name]}
    assert len(write) == LAYERS * 10, "q, k, v, up and their biases, o, down"


def test_writing_keeps_the_width(tmp_path):
    group = make_group(width=PART)
    (tmp_path / "g").mkdir()
    write_group(group, tmp_path / "g", {})
    again, _ = read_group(tmp_path / "g", read_spec(CONFIGS["bert"]))
    assert again.width == PART
