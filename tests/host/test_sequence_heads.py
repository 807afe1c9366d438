"""Classification heads on decoders against transformers: every family, ragged batches, labels in pipelines' shape.

fp32: no logit differs by more than 2e-5 at logits of order 1.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
import transformers
from fakes import DenseKv, run_pass
from safetensors.torch import load_file

import zinfer
from zinfer import LLM
from zinfer.errors import BudgetError, CheckpointError, UsageError
from zinfer.spec.families import CLASSIFIERS
from zinfer.spec.read import read_spec

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
LIMIT = 2e-5
NAMES = {0: "calm", 1: "cross", 2: "glad", 3: "sad", 4: "none"}
SHAPES = {
    "GPT2": oracle.GPT2_SHAPE | {"pad_token_id": 0},
    "OPT": oracle.OPT_SHAPE | {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "Mistral": oracle.SHAPE | {"sliding_window": 6, "num_key_value_heads": 1},
    "Qwen2": oracle.SHAPE | {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "Qwen3": oracle.SHAPE | {"head_dim": 24, "num_key_value_heads": 1},
    "GPTNeoX": oracle.SHAPE | {"num_attention_heads": 2},
}
ENGINE = {"machine": "sim-default", "device": "cpu", "threads": 1, "max_rows": 8, "max_batch": 3}


def tokens(count, seed):
    return torch.randint(3, 97, (count,), generator=torch.Generator().manual_seed(seed))


PROMPTS = [tokens(5, 1), tokens(17, 2), tokens(1, 3), tokens(9, 4)]


def save(family, folder, **options):
    config = getattr(transformers, f"{family}Config")(
        **(SHAPES.get(family, oracle.SHAPE) | {"id2label": NAMES, "label2id": {}} | options)
    )
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            oracle.randomise(key, weight, model)
        model.score.weight.normal_(0.0, model.score.weight.shape[1] ** -0.5)
    model.save_pretrained(folder)
    return model


@pytest.fixture(
    scope="module", params=[name.removesuffix("ForSequenceClassification") for name in CLASSIFIERS]
)
def case(request, tmp_path_factory):
    """(folder, transformers' model, its logits of PROMPTS as one padded batch)."""
    folder = tmp_path_factory.mktemp(request.param)
    model = save(request.param, folder)
    ids = torch.nn.utils.rnn.pad_sequence(PROMPTS, batch_first=True)
    with torch.no_grad():
        logits = model(ids, attention_mask=(ids != 0).long()).logits
    assert 0.2 < logits.std() < 5, "logits should be of order 1"
    return folder, model, logits


def ours(folder, *, shift=0, spoil=lambda tensors: tensors):
    """Logits of PROMPTS in one packed pass; `shift` reads rows other than the last."""
    config = oracle.json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    spec = read_spec(config, None, dict.fromkeys(tensors, "F32"))
    ends = torch.tensor([len(prompt) for prompt in PROMPTS]).cumsum(0) - 1
    kv = DenseKv(spec.num_layers, len(PROMPTS))
    rows = [max(int(end) - shift, 0) for end in ends]
    return run_pass(spec, spoil(tensors), kv, PROMPTS, logit_rows=rows)


@torch.no_grad()
def test_a_packed_ragged_batch_equals_a_padded_one(case):
    folder, _, theirs = case
    assert (ours(folder) - theirs).abs().max() <= LIMIT


@torch.no_grad()
def test_mutations_are_noticed(case):
    folder, _, theirs = case
    swapped = ours(folder, spoil=lambda t: t | {"score.weight": t["score.weight"].roll(1, 0)})
    assert (swapped - theirs).abs().max() > 10 * LIMIT
    assert (ours(folder, shift=1) - theirs).abs().max() > 10 * LIMIT


def smallest_budget(folder):
    """What the refusals say would do."""
    budget = "1KiB"
    while True:
        try:
            with LLM(folder, **ENGINE, memory={"host": budget}) as llm:
                llm.classify([prompt.tolist() for prompt in PROMPTS])
                return budget
        except BudgetError as error:
            budget = error.remedy.removeprefix("--host-mem ")


def test_the_engine_streams_and_labels_as_a_pipeline_does(case):
    """The whole way: small budget, several passes, softmax and names."""
    folder, _, theirs = case
    with LLM(folder, **ENGINE, memory={"host": smallest_budget(folder)}) as llm:
        found = llm.classify([prompt.tolist() for prompt in PROMPTS], top_k=None)
        assert llm.plan.placement.slots > 0, "weights were streamed"
        assert len(llm.stats.passes) > 1
    with LLM(folder, **ENGINE) as llm:
        assert llm.classify([prompt.tolist() for prompt in PROMPTS], top_k=None) == found, "bit for bit"
        assert max(done.sequences for done in llm.stats.passes) > 1, "texts shared passes"
        best = llm.classify(PROMPTS[0].tolist())
        with pytest.raises(UsageError, match="ZI-1115"):
            llm.generate([[1, 2]])
    assert best == found[0][0]
    for labels, row in zip(found, theirs.softmax(-1), strict=True):
        assert [each["label"] for each in labels] == [
            NAMES[at] for at in row.argsort(descending=True).tolist()
        ]
        expected = sorted(row.tolist(), reverse=True)
        assert [each["score"] for each in labels] == pytest.approx(expected, abs=LIMIT)


def test_padding_at_a_texts_end_is_not_what_the_head_reads(tmp_path):
    model = save("Llama", tmp_path)
    ids = [5, 9, 31, 0, 0]
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].softmax(-1)
    with LLM(tmp_path, **ENGINE) as llm:
        found = llm.classify([ids, [0]], top_k=5)
    assert found[0][0]["score"] == pytest.approx(theirs.max().item(), abs=LIMIT)


@pytest.mark.parametrize(
    ("options", "function"),
    [
        ({"problem_type": "multi_label_classification"}, torch.sigmoid),
        ({"problem_type": "regression"}, lambda x: x),
    ],
)
def test_texts_labels_and_scores_are_those_of_a_pipeline(tmp_path, options, function):
    demo = Path(zinfer.__file__).parent / "assets" / "demo"
    model = save("Llama", tmp_path, vocab_size=5120, **options)
    shutil.copy(demo / "tokenizer.json", tmp_path)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(demo / "tokenizer.json"))
    pipe = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    texts = ["import os", "def f(x):"]
    with LLM(tmp_path, **ENGINE) as llm:
        for given, top_k in ((texts, 1), (texts, 3), (texts[0], 3), (texts, None)):
            theirs = pipe(given) if top_k == 1 else pipe(given, top_k=top_k)
            found = llm.classify(given, top_k=top_k)
            flat, expected = ([found], [theirs]) if isinstance(given, str) else (found, theirs)
            for own, their in zip(flat, expected, strict=True):
                mine, other = ([own], [their]) if isinstance(their, dict) else (own, their)
                assert [x["label"] for x in mine] == [x["label"] for x in other]
                assert [x["score"] for x in mine] == pytest.approx([x["score"] for x in other], abs=LIMIT)
        assert set(llm.classify("import os")) == {"label", "score"}
        with pytest.raises(UsageError, match="ZI-1112"):
            llm.classify("import os", top_k=0)
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.encode(texts[0])])).logits[0]
    assert sorted(function(logits).tolist())[-1] == pytest.approx(
        max(x["score"] for x in pipe(texts[0], top_k=None)), abs=LIMIT
    )


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, "ZI-4203"),
        ({"id2label": {"0": 5}}, "ZI-4203"),
        ({"id2label": []}, "ZI-4203"),
        ({"id2label": {}}, "ZI-4203"),
        ({"id2label": None, "num_labels": 0}, "ZI-4204"),
    ],
)
def test_labels_that_make_no_sense_are_refused(changes, code):
    from tiny_models import CONFIGS

    config = CONFIGS["llama"] | {"architectures": ["LlamaForSequenceClassification"]} | changes
    with pytest.raises(CheckpointError, match=code):
        read_spec(config)


def test_labels_have_upstreams_names_where_a_config_has_none():
    from tiny_models import CONFIGS

    spec = read_spec(
        CONFIGS["llama"] | {"architectures": ["LlamaForSequenceClassification"], "num_labels": 3}
    )
    assert spec.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert spec.program[-1].matrix.shape == (3, 64)
    assert replace(spec, labels=()).labels == ()
