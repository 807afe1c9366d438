"""Every form of a pass gives what the others give; threads are few, the weights are views, the choice is remembered."""

import threading
from dataclasses import replace

import pytest
import torch
from encoder_oracle import pack
from hypothesis import given, settings
from hypothesis import strategies as st
from student_groups import COUNT, make_group
from text_models import CONFIGS

from zinfer.errors import UsageError
from zinfer.students import forms
from zinfer.students.bank import StudentBank
from zinfer.students.fixed import BUCKETS, ROWS, TEXTS, Bucket, bucket_of, fill_up
from zinfer.students.forms import SIZES, Forms
from zinfer.students.lanes import Lanes
from zinfer.students.serving import MAX_ROWS
from zinfer.students.spread import CopyingCollective, SpreadBank
from zinfer.students.stacked import filled, fused
from zinfer.students.student import answer

LENGTHS = (5, 17, 1, 9, 17, 40, 9)


@pytest.fixture
def two_threads():
    """As on a machine with two cores, whatever this process was told."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bank():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    made = StudentBank(make_group())
    yield made
    made.close()
    torch.set_num_threads(before)


def texts(lengths=LENGTHS):
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(3, 97, (length,), generator=draw).tolist() for length in lengths]


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
def test_forms_agree_for_every_prefix(family, two_threads):
    bank = StudentBank(make_group(family))
    batch = pack(texts())
    assert set(bank.forms.by_name) == {"fused", "in turn", "threaded"}
    for m in range(1, COUNT + 1):
        answers = {name: run(batch, m) for name, run in bank.forms.by_name.items()}
        assert answers["fused"].shape == (m, len(LENGTHS), 64)
        for name, rows in answers.items():
            assert (rows - answers["fused"]).abs().max() <= 1e-5, name
            assert (rows.flip(1) - answers["fused"]).abs().max() > 0.1, (
                "the mutation: other texts are noticed"
            )
        if m > 1:
            assert (answers["fused"][0] - answers["fused"][1]).abs().max() > 0.1, "students differ"
    bank.close()


@pytest.mark.parametrize("form", ["in turn", "threaded"])
def test_what_all_students_read_is_looked_up_once(form, two_threads, monkeypatch):
    bank, seen, own = StudentBank(make_group()), [], forms.embedded
    monkeypatch.setattr(forms, "embedded", lambda *given: seen.append(1) or own(*given))
    batch = pack(texts())
    with torch.no_grad():
        rows = bank.forms.by_name[form](batch, COUNT)
        alone = [
            answer(bank.spec, bank.group.shared, weights, batch) for weights in bank.forms._students[:COUNT]
        ]
    assert seen == [1]
    assert (rows - torch.stack(alone)).abs().max() <= 1e-5, "and is what each of them would have looked up"
    bank.close()


def test_large_passes_have_a_form_of_their_own(bank):
    """What is fastest for hundreds of rows is not for thousands: stacked products fall out of the caches."""
    assert SIZES[-1] == MAX_ROWS, "no pass of a group is larger than what was measured"
    for rows in (SIZES[-2], SIZES[-2] + 1, SIZES[-1]):
        with torch.no_grad():
            bank.forms.run(pack(texts([40] * (rows // 40) + [rows % 40])), 2)
    assert set(bank.forms.chosen) == {(SIZES[-2], 2), (SIZES[-1], 2)}


def test_a_student_per_thread_really_runs_on_other_threads_with_one_core_each(two_threads, monkeypatch):
    seen, bank = [], StudentBank(make_group())
    own = Forms._some

    def noted(self, batch, entered_TM, students):
        seen.append((threading.current_thread().name, list(students), torch.get_num_threads()))
        return own(self, batch, entered_TM, students)

    monkeypatch.setattr(Forms, "_some", noted)
    with torch.no_grad():
        rows = bank.forms.by_name["threaded"](pack(texts()), COUNT)
    assert not rows.requires_grad
    assert sorted(students for _, students, _ in seen) == [[0], [1], [2]]
    assert all(name.startswith("zinfer-student") and cores == 1 for name, _, cores in seen)
    assert torch.get_num_threads() == 2, "the caller's own number is as it was"
    others = []
    thread = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert others == [2], "and that of threads that begin later"
    bank.close()


def test_forms_view_the_stacked_weights(bank):
    for name, tensor in bank.stacked.items():
        for k, student in enumerate(bank.forms._students):
            assert student[name].data_ptr() == tensor[k].data_ptr()


def test_a_failing_student_fails_the_pass_and_the_lanes_live_on():
    lanes = Lanes(2)
    with pytest.raises(ZeroDivisionError):
        lanes.run([lambda: 1, lambda: 1 // 0])
    assert lanes.run([lambda: 1, lambda: 2]) == [1, 2]
    lanes.close()
    lanes.close()


def test_the_form_is_measured_once_per_size_and_remembered(two_threads, monkeypatch):
    asked = []

    def choose(candidates, clock):
        asked.append(sorted(candidates))
        return "threaded"

    monkeypatch.setattr("zinfer.students.forms.fastest", choose)
    monkeypatch.setattr("zinfer.students.forms.remembered", lambda question, is_answer, find: find())
    bank = StudentBank(make_group())
    for lengths in ((5,), (16,), (17,), (64, 1), (40, 40), (60,) * 5):
        bank.answer(pack(texts(lengths)), 2)
    assert bank.forms.chosen == {(size, 2): "threaded" for size in SIZES}
    assert asked == [["fused", "in turn", "threaded"]] * len(SIZES)
    bank.close()
    torch.set_num_threads(1)
    single = StudentBank(make_group())
    assert "threaded" not in single.forms.by_name, "who may use one core starts no threads"
    single.close()


@torch.no_grad()
@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    m=st.integers(1, COUNT),
    more=st.sampled_from([(0, 0), (1, 0), (7, 1), (60, 9)]),
)
@pytest.mark.parametrize("pooling", [("cls",), ("mean", "max"), ("mean_sqrt_len",)])
def test_filled_up_rows_change_nothing(pooling, lengths, m, more):
    """What a CUDA graph records, run as it stands: rows and texts that fill up must leave no trace."""
    group = make_group()
    spec = replace(group.spec, encoder=replace(group.spec.encoder, pooling=pooling))
    width = 64 * len(pooling)
    stacked = {name: torch.stack([one[name] for one in group.students])[:m] for name in group.students[0]}
    stacked["projection.weight"] = torch.randn(m, 64, width) * width**-0.5
    batch = pack(texts(lengths))
    bucket = Bucket(batch.num_rows + more[0], len(lengths) + more[1])
    wanted = fused(spec, group.shared, stacked, batch)
    found = filled(spec, group.shared, stacked, *fill_up(batch, bucket))
    assert found.shape[1] == bucket.texts
    assert torch.isfinite(found).all()
    assert (found[:, : len(lengths)] - wanted).abs().max() <= 1e-5


@torch.no_grad()
def test_another_rows_text_is_noticed():
    """The mutation of the test above: a row that is taken for one of another text."""
    group = make_group()
    stacked = {name: torch.stack([one[name] for one in group.students]) for name in group.students[0]}
    batch = pack(texts((5, 7)))
    rows, text_T, starts_S = fill_up(batch, Bucket(16, 4))
    right = filled(group.spec, group.shared, stacked, rows, text_T, starts_S)
    text_T[4] = 1
    wrong = filled(group.spec, group.shared, stacked, rows, text_T, starts_S)
    assert (right - wrong)[:, :2].abs().max() > 1e-3


@given(st.integers(1, 1300), st.integers(1, 80))
def test_a_bucket_holds_what_it_is_for_and_is_the_smallest(rows, num_texts):
    texts_there = min(rows, num_texts)
    bucket = bucket_of(rows, texts_there)
    if bucket is None:
        assert rows > ROWS[-1] or texts_there > TEXTS[-1]
        return
    assert bucket in BUCKETS
    assert bucket.rows >= rows
    assert bucket.texts >= texts_there
    smaller = [one for one in BUCKETS if one.rows >= rows and one.texts >= texts_there]
    assert bucket == min(smaller, key=lambda one: (one.texts, one.rows))


@torch.no_grad()
def test_replayed_passes_answer_as_their_eager_twin(bank):
    """On a CPU what is recorded runs eagerly on the fixed input: what one pass leaves there must not matter."""
    wanted = {}
    sizes = ((40, 9, 17), (3,), (16,), (1, 2), (40,) * 7)
    for lengths in sizes:
        for m in (1, COUNT):
            wanted[lengths, m] = bank.answer(pack(texts(lengths)), m)
    assert bank.replays.num_replayed == 0
    bank.warm_up((1, COUNT), [one for one in BUCKETS if one.rows <= 128])
    for lengths in sizes:
        for m in (1, COUNT):
            rows, logits = bank.answer(pack(texts(lengths)), m)
            assert (rows - wanted[lengths, m][0]).abs().max() <= 1e-5
            assert (logits - wanted[lengths, m][1]).abs().max() <= 1e-5
    assert bank.replays.num_replayed == 8, "a pass larger than what was recorded ran eagerly"
    bank.answer(pack(texts((3,))), 2)
    assert bank.replays.num_replayed == 8, "and so did another number of students"


class Noted(CopyingCollective):
    """The copying one, and what it was asked."""

    def __init__(self):
        self.asked = []

    def sum(self, parts):
        self.asked.append([tuple(part.shape) for part in parts])
        return super().sum(parts)


@pytest.mark.parametrize("num_devices", [1, 2, 3])
def test_students_spread_over_devices_answer_as_one_bank(bank, num_devices):
    collective = Noted()
    spread = SpreadBank(make_group(), ["cpu"] * num_devices, collective)
    batch = pack(texts())
    for m in range(1, COUNT + 1):
        rows, logits = bank.answer(batch, m)
        ours, our_logits = spread.answer(batch, m)
        assert (ours - rows).abs().max() <= 1e-5
        assert (our_logits - logits).abs().max() <= 1e-5
        assert collective.asked[-1] == [(len(LENGTHS), 64)] * min(num_devices, m), "a row per text, once"
    wrong, _ = spread.answer(batch, 1)
    assert (wrong - rows).abs().max() > 0.1, "the mutation: a part that is left out is noticed"
    assert sum(one.num_students for one in spread.banks) == COUNT
    spread.close()


def test_more_devices_than_students_are_refused():
    with pytest.raises(UsageError, match="ZI-1164"):
        SpreadBank(make_group(), ["cpu"] * 4, CopyingCollective())
