"""The literal table of encoder families: what each calls its keys and tensors.  Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from zinfer.spec.families import Family, Flag


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderFamily(Family):
    """One encoder architecture as a row of data.

    `head_names` maps the ops of a classification head to stems that carry no prefix; empty: the bare model.  `unread`
    are stems that checkpoints of the family may hold beside what is read (heads of other tasks).
    """

    head_names: Mapping[str, str] = field(default_factory=dict)
    head_activation: Literal["tanh", "relu", "gelu"] = "tanh"
    has_segments: bool = True
    positions_follow_pad: bool = False  # RoBERTa counts positions from the padding id + 1
    unread: tuple[str, ...] = ()


ENCODER_BIASED = ("embed", "q", "k", "v", "o", "up", "down", "dense", "classify")
BERT_NAMES = {
    "embed": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "segments": "embeddings.token_type_embeddings",
    "embed_norm": "embeddings.LayerNorm",
    "q": "encoder.layer.{}.attention.self.query",
    "k": "encoder.layer.{}.attention.self.key",
    "v": "encoder.layer.{}.attention.self.value",
    "o": "encoder.layer.{}.attention.output.dense",
    "attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "up": "encoder.layer.{}.intermediate.dense",
    "down": "encoder.layer.{}.output.dense",
    "mlp_norm": "encoder.layer.{}.output.LayerNorm",
}
BERT_DEFAULTS: dict[str, object] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "norm_eps": 1e-12,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}
ROBERTA_DEFAULTS = BERT_DEFAULTS | {"pad_token_id": 1, "vocab_size": 50265}
BERT_KEYS = {"norm_eps": "layer_norm_eps"}
ONE_WAY = (
    Flag("is_decoder", False, True, is_refused=True),
    Flag("add_cross_attention", False, True, is_refused=True),
)
ELECTRA_NAMES = BERT_NAMES | {"project_in": "embeddings_project"}
ELECTRA_KEYS = BERT_KEYS | {"word_embed_proj_dim": "embedding_size"}
ELECTRA_DEFAULTS = BERT_DEFAULTS | {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "word_embed_proj_dim": 128,
}
DISTILBERT_NAMES = {
    "embed": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "embed_norm": "embeddings.LayerNorm",
    "q": "transformer.layer.{}.attention.q_lin",
    "k": "transformer.layer.{}.attention.k_lin",
    "v": "transformer.layer.{}.attention.v_lin",
    "o": "transformer.layer.{}.attention.out_lin",
    "attention_norm": "transformer.layer.{}.sa_layer_norm",
    "up": "transformer.layer.{}.ffn.lin1",
    "down": "transformer.layer.{}.ffn.lin2",
    "mlp_norm": "transformer.layer.{}.output_layer_norm",
}
DISTILBERT_KEYS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
}
DISTILBERT_DEFAULTS = BERT_DEFAULTS | {"num_hidden_layers": 6}
DENSE_THEN_OUT = {"dense": "classifier.dense", "classify": "classifier.out_proj"}
HEADS_OF_BERT = ("pooler.", "cls.", "classifier.")
HEADS_OF_ROBERTA = ("pooler.", "lm_head.", "classifier.")


def _bert(name: str = "bert", **options: object) -> EncoderFamily:
    return EncoderFamily(
        **{
            "name": name,
            "prefix": "bert.",
            "names": BERT_NAMES,
            "renames": BERT_KEYS,
            "defaults": BERT_DEFAULTS,
            "flags": ONE_WAY,
            "biased": ENCODER_BIASED,
            "has_plain_heads": True,
            "position_offset": 0,
            "unread": HEADS_OF_BERT,
        }
        | options  # type: ignore[arg-type]
    )


def _roberta(name: str, **options: object) -> EncoderFamily:
    row: dict[str, object] = {
        "prefix": "roberta.",
        "defaults": ROBERTA_DEFAULTS,
        "positions_follow_pad": True,
        "unread": HEADS_OF_ROBERTA,
    }
    return _bert(name, **(row | options))


def _electra(**options: object) -> EncoderFamily:
    row: dict[str, object] = {
        "prefix": "electra.",
        "names": ELECTRA_NAMES,
        "renames": ELECTRA_KEYS,
        "defaults": ELECTRA_DEFAULTS,
        "unread": ("discriminator_predictions.", "generator_", "classifier."),
    }
    return _bert("electra", **(row | options))


def _distilbert(**options: object) -> EncoderFamily:
    row: dict[str, object] = {
        "prefix": "distilbert.",
        "names": DISTILBERT_NAMES,
        "renames": DISTILBERT_KEYS,
        "defaults": DISTILBERT_DEFAULTS,
        "flags": (),
        "has_segments": False,
        "unread": ("vocab_", "pre_classifier.", "classifier."),
    }
    return _bert("distilbert", **(row | options))


ENCODER_FAMILIES: dict[str, EncoderFamily] = {
    "BertModel": _bert(),
    "BertForSequenceClassification": _bert(
        head_names={"dense": "bert.pooler.dense", "classify": "classifier"}, unread=()
    ),
    "RobertaModel": _roberta("roberta"),
    "RobertaForSequenceClassification": _roberta("roberta", head_names=DENSE_THEN_OUT),
    "XLMRobertaModel": _roberta("xlm-roberta"),
    "XLMRobertaForSequenceClassification": _roberta("xlm-roberta", head_names=DENSE_THEN_OUT),
    "DistilBertModel": _distilbert(),
    "DistilBertForSequenceClassification": _distilbert(
        head_names={"dense": "pre_classifier", "classify": "classifier"}, head_activation="relu"
    ),
    "ElectraModel": _electra(),
    "ElectraForSequenceClassification": _electra(head_names=DENSE_THEN_OUT, head_activation="gelu"),
}
