"""The face of encoders: results against transformers pipelines, every placement the same bits, bad input refused."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import transformers
from text_models import CONFIGS, write_encoder, write_sentence_files
from tiny_models import write_tiny

from zinfer import LLM, Classifier
from zinfer.chunks.pack import assemble
from zinfer.chunks.store import shard
from zinfer.cli.main import run
from zinfer.errors import CheckpointError, UsageError
from zinfer.plan.place import smallest_budget
from zinfer.plan.records import Tier

FIXED = {"machine": "sim-default", "max_rows": 96, "max_batch": 3, "threads": 1}  # only placement differs
TEXTS = [
    "the quick brown fox",
    ("a lazy dog", "jumps over the fox"),
    "",
    "read files!",
    "the " * 90,
    ("def class", "return self " * 40),
    "x",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(family):
        if family not in made:
            made[family] = write_encoder(family, tmp_path_factory.mktemp(family) / "model")
        return made[family]

    return folder


def open_on_cpu(folder, **options):
    return Classifier(folder, **({"device": "cpu", "memory": {"host": "1GiB"}} | FIXED | options))


def upstream(folder, texts):
    """Logits and mean-pooled rows by transformers' own tokenizer and model, each text by itself."""
    config = json.loads((folder / "config.json").read_text())
    model = getattr(transformers, config["architectures"][0]).from_pretrained(folder).eval()
    # The same tokenizer.json through transformers; a BERT's token types are those of the file.
    words = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    logits, pooled = [], []
    for text in texts:
        parts = [text] if isinstance(text, str) else list(text)
        given = words(*parts, truncation=True, max_length=64, return_tensors="pt", return_token_type_ids=True)
        if model.config.model_type == "distilbert" or getattr(model.config, "type_vocab_size", 0) < 2:
            given.pop("token_type_ids", None)
        with torch.no_grad():
            result = model(**given, output_hidden_states=True)
        logits.append(result.logits[0])
        pooled.append(result.hidden_states[-1][0].mean(0))
    return torch.stack(logits), torch.stack(pooled)


@pytest.mark.parametrize("family", CONFIGS)
def test_texts_and_pairs_as_transformers(family, folders):
    logits, pooled = upstream(folders(family), TEXTS)
    with open_on_cpu(folders(family)) as classifier:
        results = classifier.classify(TEXTS, top_k=None, raw_scores=True)
        ours = [[score["score"] for score in sorted(r, key=label_number)] for r in results]
        assert np.abs(np.array(ours) - logits.numpy()).max() <= 1e-4
        assert np.abs(classifier.embed(TEXTS) - pooled.numpy()).max() <= 1e-4
        assert np.abs(classifier.embed(TEXTS[1:2]) - pooled.numpy()[3:4]).max() > 1e-3, "the test can fail"


def label_number(score):
    return ["calm", "angry", "glad"].index(score["label"])


def test_shapes_of_results(folders):
    with open_on_cpu(folders("bert")) as classifier:
        one = classifier.classify("the fox")
        assert set(one) == {"label", "score"}
        assert classifier.classify(["the fox"]) == [one]
        assert classifier.classify([{"text": "the fox"}]) == [one]
        assert classifier.classify(("a", "dog")) == classifier.classify({"text": "a", "text_pair": "dog"})
        ranked = classifier.classify("the fox", top_k=2)
        assert [len(ranked), ranked[0]] == [2, one]
        assert sum(score["score"] for score in classifier.classify("the fox", top_k=None)) == pytest.approx(1)
        assert classifier.embed("the fox").shape == (1, 64)
        assert classifier.embed(["the fox"] * 5).dtype == np.float32


@pytest.mark.parametrize(
    "changes", [{"problem_type": "multi_label_classification"}, {"id2label": {"0": "spam"}}]
)
def test_sigmoid_where_labels_do_not_exclude_each_other(tmp_path, changes):
    with open_on_cpu(write_encoder("bert", tmp_path / "model", **changes)) as classifier:
        raw = classifier.classify("the fox", top_k=None, raw_scores=True)
        scores = classifier.classify("the fox", top_k=None)
        assert [s["score"] for s in scores] == pytest.approx([1 / (1 + np.exp(-r["score"])) for r in raw])


def placements(*folders):
    """Options under which the folders stream: the smallest budgets of both kinds of machine, and one between."""
    least = {}
    for folder in folders:
        with open_on_cpu(folder) as classifier:
            table, reserve = assemble(classifier.engine.model.source, 1), classifier.engine.plan.reserve
        for tier in (Tier.HOST, Tier.DEVICE):
            need = smallest_budget(table, compute_tier=tier, reserve=reserve, lookahead=1)
            nbytes = need.host if tier is Tier.HOST else need.device
            least[tier] = max(nbytes, least.get(tier, 0))
        full = reserve.total + table.total_bytes
    yield {"memory": {"host": least[Tier.HOST]}}
    yield {"memory": {"host": least[Tier.HOST]}, "lookahead": 0}
    yield {"memory": {"host": (least[Tier.HOST] + full) // 2}}
    yield {"device": "sim", "memory": {"device": least[Tier.DEVICE], "host": 2 * full}}
    yield {"device": "sim", "memory": {"device": least[Tier.DEVICE], "host": least[Tier.DEVICE]}}


def answers(folder, **options):
    """Logits and embeddings, and bytes that steady passes moved."""
    with open_on_cpu(folder, **options) as classifier:
        classifier.embed(TEXTS)  # loads
        loaded = len(classifier.engine.stats.passes)
        scores = classifier.classify(TEXTS, top_k=None, raw_scores=True)
        rows = classifier.embed(TEXTS)
        moved = sum(sum(done.num_bytes.values()) for done in classifier.engine.stats.passes[loaded:])
        assert classifier.engine.stats.surprises == 0
        return scores, rows.tobytes(), moved if classifier.engine.plan.placement.slots else 0


@pytest.mark.parametrize("family", CONFIGS)
def test_every_placement_gives_the_same_bits(family, folders, tmp_path):
    store = tmp_path / "store"
    shard(folders(family), store)
    reference = answers(folders(family))
    assert reference[2] == 0, "the reference must be resident"
    for options in placements(folders(family), store):
        for source in (folders(family), store):
            other = answers(source, **options)
            assert other[2] > 0, f"nothing was streamed with {options}"
            assert other[:2] == reference[:2]


def test_exact_answers_do_not_depend_on_the_batch(folders):
    with open_on_cpu(folders("bert")) as classifier:
        together = classifier.embed(TEXTS)
        assert all(
            np.array_equal(classifier.embed([text])[0], row)
            for text, row in zip(TEXTS, together, strict=True)
        )
    with open_on_cpu(folders("bert"), exact=False) as classifier:
        assert np.abs(classifier.embed(TEXTS) - together).max() <= 1e-5


def test_a_changed_bit_is_seen(tmp_path):
    folder = write_encoder("bert", tmp_path / "model")
    reference = answers(folder)
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1002] ^= 0x20
    file.write_bytes(data)
    assert answers(folder)[:2] != reference[:2]


def test_sentence_folders_say_pooling_norm_and_length(tmp_path):
    plain = write_encoder("bert", tmp_path / "plain")
    folder = write_sentence_files(shutil.copytree(plain, tmp_path / "sentence"), max_seq_length=16)
    store = tmp_path / "store"
    shard(folder, store)
    with open_on_cpu(plain, context=16) as classifier:
        rows = classifier.embed(TEXTS)
    for source in (folder, store):
        with open_on_cpu(source) as classifier:
            assert classifier.engine.max_tokens == 16
            ours = classifier.embed(TEXTS)
        assert np.allclose(ours, rows / np.linalg.norm(rows, axis=1, keepdims=True), atol=1e-6)
    cls = write_sentence_files(shutil.copytree(plain, tmp_path / "cls"), pooling="cls_token", normalise=False)
    with open_on_cpu(cls) as classifier:
        assert np.abs(classifier.embed(TEXTS) - classifier.embed(TEXTS[::-1])[::-1]).max() == 0
        assert classifier.encoder.pooling == ("cls",)
        assert not classifier.encoder.is_normalised


@pytest.mark.parametrize(
    ("file", "text", "code"),
    [
        ("modules.json", "{}", "ZI-4020"),
        ("modules.json", "[{", "ZI-4020"),
        ("modules.json", '[{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]', "ZI-4205"),
        ("modules.json", '[{"type": "sentence_transformers.models.Transformer", "path": "0_T"}]', "ZI-4205"),
        ("modules.json", '[{"type": "s.Pooling", "path": "../../etc"}]', "ZI-4010"),
        ("modules.json", '[{"type": "s.Pooling", "path": "9_Pooling"}]', "ZI-4202"),
        ("modules.json", "[7]", "ZI-4203"),
        ("1_Pooling/config.json", '{"pooling_mode_lasttoken": true}', "ZI-4205"),
        ("1_Pooling/config.json", '{"pooling_mode": []}', "ZI-4205"),
        ("sentence_bert_config.json", '{"max_seq_length": "long"}', "ZI-4203"),
    ],
)
def test_sentence_files_that_cannot_be_meant(tmp_path, file, text, code):
    folder = write_sentence_files(write_encoder("bert", tmp_path / "model"))
    (folder / file).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        open_on_cpu(folder)
    assert caught.value.code == code


def test_a_pooling_that_leaves_the_folder_is_not_followed(tmp_path):
    folder = write_sentence_files(write_encoder("bert", tmp_path / "model"))
    (tmp_path / "secret.json").write_text('{"pooling_mode": "max"}')
    (folder / "1_Pooling" / "config.json").unlink()
    (folder / "1_Pooling" / "config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError) as caught:
        open_on_cpu(folder)
    assert caught.value.code == "ZI-4011"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, "ZI-4203"),
        ({"id2label": []}, "ZI-4203"),
        ({"position_embedding_type": "relative_key"}, "ZI-4205"),
        ({"is_decoder": True}, "ZI-4205"),
        ({"type_vocab_size": 0}, "ZI-4204"),
        ({"num_attention_heads": 7}, "ZI-4204"),
        ({"architectures": ["BertForMaskedLM"]}, "ZI-4201"),
    ],
)
def test_configs_that_cannot_be_meant(tmp_path, changes, code):
    folder = write_encoder("bert", tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(CONFIGS["bert"] | changes))
    with pytest.raises(CheckpointError) as caught:
        open_on_cpu(folder)
    assert caught.value.code == code


def test_roberta_needs_room_behind_its_padding(tmp_path):
    folder = write_encoder("roberta", tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(CONFIGS["roberta"] | {"pad_token_id": 90}))
    with pytest.raises(CheckpointError, match="leaves no position"):
        open_on_cpu(folder)


@pytest.mark.parametrize(
    ("texts", "code"),
    [
        ([], "ZI-1136"),
        (7, "ZI-1136"),
        ([["a"]], "ZI-1136"),
        ([{"txt": "a"}], "ZI-1136"),
        (["ok", "\ud800"], "ZI-1131"),
    ],
)
def test_texts_that_cannot_be_meant(folders, texts, code):
    with open_on_cpu(folders("bert")) as classifier, pytest.raises(UsageError) as caught:
        classifier.classify(texts)
    assert caught.value.code == code
    assert "text 1" in str(caught.value) or code == "ZI-1136"


def test_a_huge_text_is_cut_and_a_boundless_one_refused(folders, monkeypatch):
    with open_on_cpu(folders("bert")) as classifier:
        assert np.array_equal(classifier.embed("the " * 10_000), classifier.embed("the " * 100))
        monkeypatch.setattr("zinfer.tokenizer.pairs.MAX_CHARS", 50)
        with pytest.raises(UsageError, match="ZI-1131"):
            classifier.embed("the " * 20)


def test_each_face_refuses_the_other_kind_of_model(folders, tmp_path):
    decoder = write_tiny("llama", tmp_path / "llama")
    with pytest.raises(UsageError, match="ZI-1134") as caught:
        open_on_cpu(decoder)
    assert "zinfer generate" in caught.value.remedy
    with LLM(folders("bert"), **FIXED, device="cpu") as llm, pytest.raises(UsageError, match="ZI-1133"):
        llm.generate([[5, 6]])
    bare = write_encoder("bert", tmp_path / "bare", architectures=["BertModel"])
    with open_on_cpu(bare) as classifier, pytest.raises(UsageError, match="ZI-1135"):
        classifier.classify("the fox")


def test_a_small_budget_is_refused_with_one_that_works(folders):
    with pytest.raises(Exception, match="ZI-2001") as caught:
        open_on_cpu(folders("bert"), memory={"host": "64KiB"})
    wanted = re.search(r"--host-mem (\S+)", str(caught.value))[1]
    with open_on_cpu(folders("bert"), memory={"host": wanted}) as classifier:
        assert classifier.classify("the fox")["label"]
        assert classifier.engine.stats.peak_bytes["host"] <= classifier.engine.plan.budget.host


@pytest.mark.parametrize(("weights", "limit"), [("int8", 0.06), ("int4", 0.5)])
def test_a_quantised_store_answers_nearly_the_same(folders, tmp_path, weights, limit):
    folder, store = folders("bert"), tmp_path / "store"
    assert run(["shard", str(folder), "--out", str(store), "--weights", weights]) == 0
    with open_on_cpu(folder) as classifier:
        rows = classifier.embed(TEXTS)
    with open_on_cpu(store) as classifier:
        assert classifier.engine.spec.weights == weights
        ours = classifier.embed(TEXTS)
    far = np.abs(ours - rows).max()
    assert 0 < far <= limit, "close, and not the published weights by mistake"
