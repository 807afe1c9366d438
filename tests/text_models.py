"""Tiny encoders as folders: weights, a tokenizer of each kind, and the files of a sentence-transformers model."""

import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from zinfer.checkpoint.synthetic import write_checkpoint
from zinfer.spec.read import read_spec

WORDS = [
    *("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"),
    *("import", "json", "def", "class", "return", "self", "files", "read"),
]
LETTERS = "abcdefghijklmnopqrstuvwxyz.,!?0123456789é"
_BERT = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 160,
    "max_position_embeddings": 64,
    "id2label": {"0": "calm", "1": "angry", "2": "glad"},
    "torch_dtype": "float32",
}
_ROBERTA = _BERT | {"pad_token_id": 1, "type_vocab_size": 1, "max_position_embeddings": 66}
CONFIGS = {
    "bert": _BERT | {"architectures": ["BertForSequenceClassification"]},
    "roberta": _ROBERTA | {"architectures": ["RobertaForSequenceClassification"]},
    "xlm-roberta": _ROBERTA | {"architectures": ["XLMRobertaForSequenceClassification"]},
    "distilbert": {
        "architectures": ["DistilBertForSequenceClassification"],
        "dim": 64,
        "hidden_dim": 160,
        "n_layers": 3,
        "n_heads": 4,
        "vocab_size": 160,
        "max_position_embeddings": 64,
        "id2label": {"0": "calm", "1": "angry", "2": "glad"},
        "torch_dtype": "float32",
    },
    "electra": _BERT | {"architectures": ["ElectraForSequenceClassification"], "embedding_size": 32},
}
KINDS = {"bert": "wordpiece", "roberta": "bpe", "xlm-roberta": "unigram"}


def tokenizer(kind="wordpiece"):
    """A tokenizer of at most 160 entries that knows every letter, with the special tokens of its model family."""
    if kind == "wordpiece":
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        entries = special + WORDS + list(LETTERS) + [f"##{letter}" for letter in LETTERS]
        vocab = {word: number for number, word in enumerate(dict.fromkeys(entries))}
        core = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
        core.normalizer = normalizers.BertNormalizer(lowercase=True)
        core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        core.decoder = decoders.WordPiece()
        ends = [("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
        )
        return core
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    if kind == "bpe":
        vocab = {
            word: number for number, word in enumerate(special + list(LETTERS) + ["Ġ", "th", "the", "Ġthe"])
        }
        merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
        core = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
        return core
    pieces = [(word, 0.0) for word in special] + [(f"▁{word}", -5.0) for word in WORDS]
    pieces += [(letter, -9.0) for letter in [*LETTERS, "▁"]]
    core = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=3))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return core


def write_encoder(family, folder, **changes):
    """A classifier with random weights and a tokenizer; returns the folder."""
    config = CONFIGS[family] | changes
    dtype = {"float32": "F32", "bfloat16": "BF16"}[config["torch_dtype"]]
    write_checkpoint(read_spec(config, None), config, folder, seed=7, dtype=dtype)
    tokenizer(KINDS.get(family, "wordpiece")).save(str(folder / "tokenizer.json"))
    return folder


def write_sentence_files(folder, *, pooling="mean_tokens", normalise=True, max_seq_length=None, **more):
    """Make a sentence-transformers folder of one that holds an encoder."""
    kinds = ["Transformer", "Pooling"] + ["Normalize"] * normalise
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=False))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    flags = {f"pooling_mode_{mode}": mode == pooling for mode in ("cls_token", "max_tokens", "mean_tokens")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64} | flags))
    limits = {"max_seq_length": max_seq_length, "do_lower_case": False} | more
    (folder / "sentence_bert_config.json").write_text(json.dumps(limits))
    return folder
