"""Encoders in compiled code give what torch's operations give; where they cannot, or are wrong, torch serves."""

import os
import threading
from itertools import pairwise

import pytest
import torch
from encoder_oracle import pack
from hypothesis import given, settings
from hypothesis import strategies as st
from student_groups import COUNT, make_group, write_group_folder
from text_models import CONFIGS, WORDS, write_encoder, write_sentence_files

from zinfer import Classifier
from zinfer.kernels.native import build, encoder
from zinfer.kernels.native.encoder import EncoderLayers, packed_bytes, serves
from zinfer.runtime import compiled
from zinfer.spec.read import read_spec
from zinfer.students import forms
from zinfer.students import serving as group_serving
from zinfer.students.bank import StudentBank
from zinfer.students.opening import sample_texts
from zinfer.students.student import Width

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="there is no C compiler")
pytestmark = [needs_compiler, pytest.mark.usefixtures("one_thread")]
CPU = {"device": "cpu", "machine": "sim-default", "threads": 1}
LENGTHS = (5, 17, 1, 9, 40, 17, 33, 16, 64, 2)


@pytest.fixture
def always(monkeypatch):
    """The compiled way wherever it serves, whatever a clock says."""
    monkeypatch.setattr(compiled, "fastest", lambda runs, clock: list(runs)[-1])
    monkeypatch.setattr(compiled, "remembered", lambda question, is_answer, find: find())


def texts(lengths=LENGTHS):
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(3, 97, (length,), generator=draw).tolist() for length in lengths]


def layers_of(bank):
    return EncoderLayers(bank.spec, bank.forms._students)


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
def test_students_in_compiled_code_answer_as_their_twin(family, activation):
    name = "activation" if family == "distilbert" else "hidden_act"
    bank, batch = StudentBank(make_group(family, **{name: activation})), pack(texts())
    assert serves(bank.spec)
    bank.forms.compile(lanes=2)
    run = bank.forms.by_name["compiled"]
    for m in range(1, COUNT + 1):
        wanted, found = bank.forms.by_name["fused"](batch, m), run(batch, m)
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        assert (found.flip(1) - wanted).abs().max() > 0.1, "the mutation: other texts are noticed"
        if m > 1:
            assert (found.flip(0) - wanted).abs().max() > 0.1, "and other students"
    bank.close()


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize(
    "width", [Width(1, 3, 64), Width(1, 16, 32), Width(3, 5, 40), Width(2, 16, 168), Width(4, 8, 7)], ids=str
)
def test_so_do_narrow_students_whose_heads_fill_no_vector(family, width):
    """Heads and neurons are filled up with zeros, which change nothing."""
    sizes = {"hidden_dim": 192} if family == "distilbert" else {"intermediate_size": 192}
    bank, batch = StudentBank(make_group(family, width, **sizes)), pack(texts())
    assert serves(bank.spec)
    bank.forms.compile(lanes=2)
    assert bank.forms._compiled.nbytes <= COUNT * packed_bytes(bank.spec)
    for m in range(1, COUNT + 1):
        wanted, found = (bank.forms.by_name[name](batch, m) for name in ("fused", "compiled"))
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        assert (found.flip(1) - wanted).abs().max() > 0.05, "the mutation: other texts are noticed"
    bank.close()


@torch.no_grad()
@pytest.mark.parametrize("lanes", [1, 2, 5])
def test_first_rows_alone_are_those_of_all_rows_whoever_computes_them(lanes):
    bank = StudentBank(make_group())
    layers, batch = layers_of(bank), pack(texts(LENGTHS * 5))
    entered = bank.forms._entered(batch)
    alone = layers.run(entered, batch.bounds, COUNT, first_only=False, lanes=1)
    rows = layers.run(entered, batch.bounds, COUNT, first_only=False, lanes=lanes)
    first = layers.run(entered, batch.bounds, COUNT, first_only=True, lanes=lanes)
    assert rows.shape == (COUNT, batch.num_rows, 64)
    assert torch.equal(rows, alone), "a text's bits do not depend on who computes it"
    assert (first - rows[:, batch.bounds[:-1]]).abs().max() <= 1e-5
    bank.close()


@settings(max_examples=25)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=20), st.integers(1, COUNT))
def test_a_text_is_the_same_alone_and_among_others(lengths, m):
    bank = StudentBank(make_group())
    layers, given_texts = layers_of(bank), texts(lengths)
    with torch.no_grad():
        batch = pack(given_texts)
        together = layers.run(bank.forms._entered(batch), batch.bounds, m, first_only=True, lanes=2)
        for at in {0, len(lengths) - 1}:
            own = pack([given_texts[at]])
            alone = layers.run(bank.forms._entered(own), own.bounds, m, first_only=True, lanes=1)
            assert (alone[:, 0] - together[:, at]).abs().max() <= 1e-5
    bank.close()


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60))
def test_pieces_are_all_texts_once_and_large_only_where_a_text_is(lengths):
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    pieces = encoder._pieces(bounds)
    assert (pieces[0], pieces[-1]) == (0, len(lengths))
    for begin, end in pairwise(pieces):
        assert begin < end
        assert end == begin + 1 or bounds[end] - bounds[begin] <= encoder._PIECE_ROWS
    for (begin, _), (_, end) in pairwise(pairwise(pieces)):
        assert bounds[end] - bounds[begin] > encoder._PIECE_ROWS or end == pieces[-1], (
            "none is needlessly small"
        )


@torch.no_grad()
def test_several_callers_at_once_get_their_own():
    bank = StudentBank(make_group())
    layers = layers_of(bank)
    batches = [pack(texts(LENGTHS[at:] * 4)) for at in range(4)]
    entered = [bank.forms._entered(batch) for batch in batches]
    wanted = [
        layers.run(x, batch.bounds, COUNT, first_only=True, lanes=1)
        for x, batch in zip(entered, batches, strict=True)
    ]
    wrong = []

    def call(at):
        for _ in range(30):
            found = layers.run(entered[at], batches[at].bounds, COUNT, first_only=True, lanes=3)
            if not torch.equal(found, wanted[at]):
                wrong.append(at)

    threads = [threading.Thread(target=call, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    bank.close()


@torch.no_grad()
def test_a_forked_child_computes_without_its_parents_threads():
    bank = StudentBank(make_group())
    layers, batch = layers_of(bank), pack(texts(LENGTHS * 4))
    entered = bank.forms._entered(batch)
    wanted = layers.run(entered, batch.bounds, COUNT, first_only=True, lanes=2)
    child = os.fork()
    if not child:
        found = layers.run(entered, batch.bounds, COUNT, first_only=True, lanes=2)
        os._exit(0 if torch.equal(found, wanted) else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    bank.close()


def test_what_is_not_known_is_left_to_torch():
    spec = read_spec(CONFIGS["bert"])
    assert serves(spec)
    for changes in (
        {"hidden_size": 72, "num_attention_heads": 9},  # a row is no whole number of vectors
        {"hidden_act": "quick_gelu"},
        {"torch_dtype": "bfloat16"},
    ):
        assert not serves(read_spec(CONFIGS["bert"] | changes)), changes
    assert not serves(read_spec({"architectures": ["LlamaForCausalLM"]} | _LLAMA))


_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 160,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}


@pytest.mark.parametrize("family", CONFIGS)
def test_packed_bytes_are_what_is_packed(family):
    bank = StudentBank(make_group(family))
    told = packed_bytes(bank.spec) * COUNT
    assert 0.98 * told <= layers_of(bank).nbytes <= told
    bank.close()


@pytest.mark.parametrize("family", CONFIGS)
def test_one_model_answers_in_compiled_code_as_op_by_op(family, tmp_path, always):
    folder = write_encoder(family, tmp_path / family)
    given_texts = [" ".join(WORDS[: 1 + at % 12]) for at in range(30)]
    with Classifier(folder, exact=False, **CPU) as classifier:
        engine, encoded = classifier.engine, classifier.encode(given_texts)
        slow = engine.answer(encoded)
        shortcut = engine._open[1].shortcut
        assert isinstance(shortcut, compiled.CompiledEncoder), "it is taken after the first pass"
        fast = engine.answer(encoded)
        for wanted, found in zip(slow, fast, strict=True):
            assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
            assert (found.flip(0) - wanted).abs().max() > 1e-3, "the mutation: other texts are noticed"
        assert len(engine.stats.passes) == 2, "what was tried is in nobody's books"
        engine._open[0].check()


def test_means_over_all_rows_are_pooled_from_compiled_code(tmp_path, always):
    folder = write_sentence_files(write_encoder("bert", tmp_path / "mean"))
    with Classifier(folder, exact=False, **CPU) as classifier:
        encoded = sample_texts(200, 40)
        slow, _ = classifier.engine.answer(encoded)
        assert classifier.engine._open[1].shortcut is not None
        fast, _ = classifier.engine.answer(encoded)
    assert (fast - slow).abs().max() <= 1e-5 * slow.abs().max()


@pytest.mark.parametrize("why", ["exact", "streamed", "wrong", "slower", "no compiler"])
def test_one_model_stays_with_torch_where_it_has_to(why, tmp_path, always, monkeypatch):
    folder, options = write_encoder("bert", tmp_path / "bert"), {"exact": why == "exact"}
    if why == "wrong":
        own = EncoderLayers.run
        monkeypatch.setattr(EncoderLayers, "run", lambda *given, **more: own(*given, **more) + 0.01)
    if why == "slower":
        monkeypatch.setattr(compiled, "fastest", lambda runs, clock: next(iter(runs)))
    if why == "no compiler":
        monkeypatch.setattr(encoder, "_code", lambda: None)
    if why == "streamed":
        monkeypatch.setattr("zinfer.plan.records.Placement.resident", lambda self, chunk: chunk != 2)
    with Classifier(folder, **CPU, **options) as classifier:
        encoded = sample_texts(60, 40)
        first, again = (classifier.engine.answer(encoded)[0] for _ in range(2))
        manager, executor = classifier.engine._open
        assert executor.shortcut is None
        assert torch.equal(first, again)
        assert not manager.ledger().reserved.get("packed layers"), "and nothing is set aside for it"
        manager.check()


def test_a_group_is_packed_where_its_budget_has_room(tmp_path):
    folder = write_group_folder(tmp_path / "group")
    with Classifier(folder, **CPU, memory={"host": "1GiB"}) as classifier:
        ledger, bank = classifier.engine.ledger, classifier.engine.bank
        assert "compiled" in bank.forms.by_name
        assert ledger.reserved["packed students"] == COUNT * packed_bytes(bank.spec)
        used = ledger.capacity_bytes - ledger.free_bytes - ledger.reserved["packed students"]
    with Classifier(folder, **CPU, memory={"host": used + 1000}) as classifier:
        assert "compiled" not in classifier.engine.bank.forms.by_name
        assert "packed students" not in classifier.engine.ledger.reserved


def test_a_form_that_computes_wrongly_is_not_offered(monkeypatch):
    own = EncoderLayers.run
    monkeypatch.setattr(EncoderLayers, "run", lambda *given, **more: own(*given, **more).flip(1))
    bank = StudentBank(make_group())
    bank.forms.compile(lanes=1)
    assert "compiled" in bank.forms.by_name, "texts that are alike do not show whose answer is whose"
    monkeypatch.setattr(EncoderLayers, "run", lambda *given, **more: own(*given, **more) * 1.01)
    bank.forms.compile(lanes=1)
    assert bank.forms._compiled is None
    bank.close()


def test_for_one_student_the_compiled_form_is_a_choice_of_two(monkeypatch):
    seen = []
    monkeypatch.setattr(forms, "fastest", lambda runs, clock: seen.append(sorted(runs)) or "compiled")
    monkeypatch.setattr(forms, "remembered", lambda question, is_answer, find: find())
    bank, batch = StudentBank(make_group()), pack(texts())
    bank.forms.compile(lanes=1)
    with torch.no_grad():
        for m in (1, 2):
            wanted = bank.forms.by_name["fused"](batch, m)
            assert (bank.forms.run(batch, m) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert seen == [["compiled", "fused"], ["compiled", "fused", "in turn"]]
    bank.close()


def test_without_a_compiler_a_group_has_the_other_forms(tmp_path, monkeypatch):
    monkeypatch.setattr(group_serving, "serves", lambda spec: False)
    with Classifier(write_group_folder(tmp_path / "group"), **CPU) as classifier:
        assert set(classifier.engine.bank.forms.by_name) == {"fused", "in turn"}
        assert len(classifier.classify(["the fox", "a dog"])) == 2


def test_what_is_compiled_is_kept_under_a_name_of_all_it_depends_on(tmp_path):
    first = build.library(("encoder.c",), ("-ffp-contract=fast",), tmp_path)
    made_ns = first.stat().st_mtime_ns
    assert build.library(("encoder.c",), ("-ffp-contract=fast",), tmp_path) == first
    assert first.stat().st_mtime_ns == made_ns, "not compiled twice"
    assert build.library(("encoder.c",), ("-ffp-contract=off",), tmp_path) != first
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".so", ".so"], "and nothing else is left"


def test_a_compiler_that_cannot_is_not_asked_twice(tmp_path, monkeypatch, caplog):
    asked = []
    own = build.subprocess.run
    monkeypatch.setattr(
        build.subprocess, "run", lambda *given, **more: asked.append(1) or own(*given, **more)
    )
    for _ in range(2):
        assert build.library(("encoder.c",), ("-no-such-flag",), tmp_path) is None
    assert len(asked) == 1
    assert "cannot compile" in caplog.text


def test_code_that_others_could_have_written_is_not_run(tmp_path):
    tmp_path.chmod(0o777)
    assert build.library(("encoder.c",), ("-ffp-contract=fast",), tmp_path) is None
    assert not list(tmp_path.iterdir())
