"""What only an encoder's config says.  In: its keys, and a sentence-transformers folder's.  Out: an Encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from zinfer.spec.encoder_families import EncoderFamily
from zinfer.spec.keys import Keys, refuse, shown
from zinfer.spec.labels import read_labels, read_scoring
from zinfer.spec.records import Encoder, ModelSpec

MAX_SEGMENTS = 2**10
POOLINGS = ("cls", "max", "mean", "mean_sqrt_len")  # in the order in which several are put side by side
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
}


def read_encoder(keys: Keys, family: EncoderFamily) -> Encoder:
    """Token types, head and labels.  Raises CheckpointError ZI-4203, ZI-4204, ZI-4205."""
    keys.word("position_embedding_type", {"absolute": "absolute"}, "absolute")
    if not family.head_names:
        return Encoder(num_segments=_num_segments(keys, family), unread=family.unread)
    labels = read_labels(keys)
    return Encoder(
        num_segments=_num_segments(keys, family),
        head="classify",
        head_activation=family.head_activation,
        labels=labels,
        scoring=read_scoring(keys, len(labels)),
        unread=tuple(stem for stem in family.unread if not _is_read(stem, family)),
    )


def with_sentence_files(
    spec: ModelSpec,
    modules: Sequence[Any] | None,
    pooling: Mapping[str, Any],
    sentence: Mapping[str, Any],
) -> ModelSpec:
    """The same encoder with the pooling, normalisation and length limit of a sentence-transformers folder.

    `modules` is modules.json, `pooling` 1_Pooling/config.json, `sentence` sentence_bert_config.json; None and empty:
    not there, and the mean of all tokens is taken, as upstream does.  Raises CheckpointError ZI-4203 to ZI-4205.
    """
    assert spec.encoder is not None, "only encoders have sentence files"
    limit = spec.max_context
    if sentence.get("max_seq_length") is not None:
        limit = min(limit, Keys(sentence).count("max_seq_length", 2**31))
    kinds = [_module_kind(module) for module in modules or ()]
    if strange := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise refuse(
            "ZI-4205", f"modules.json has a {shown(strange[0])}; Transformer, Pooling, Normalize were wanted"
        )
    if "Pooling" in kinds and not pooling:
        raise refuse("ZI-4202", "modules.json names a pooling module, its config.json is missing")
    encoder = replace(
        spec.encoder,
        max_tokens=limit,
        is_lowered=Keys(sentence).flag("do_lower_case", False),
        is_normalised="Normalize" in kinds,
        pooling=_pooling(pooling) if pooling else spec.encoder.pooling,
    )
    return replace(spec, encoder=encoder)


def _is_read(stem: str, family: EncoderFamily) -> bool:
    return any(f"{name}.".startswith(stem) for name in family.head_names.values())


def _num_segments(keys: Keys, family: EncoderFamily) -> int:
    return keys.count("type_vocab_size", MAX_SEGMENTS) if family.has_segments else 0


def _module_kind(module: object) -> str:
    kind = module.get("type") if isinstance(module, dict) else None
    if not isinstance(kind, str):
        raise refuse("ZI-4203", f"modules.json holds {shown(module)}, an object with a type was wanted")
    path = module.get("path") if isinstance(module, dict) else None
    if kind.endswith(".Transformer") and path not in ("", None):
        raise refuse("ZI-4205", f"modules.json keeps the model in {shown(path)}, not in the folder itself")
    return kind.rpartition(".")[2]


def _pooling(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The pooling modes that are on, older dialect (a flag per mode) or newer ("pooling_mode": word or words)."""
    words = config.get("pooling_mode")
    if words is None:
        on = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
        words = [_POOLING_FLAGS.get(key, key) for key in on]
    words = [words] if isinstance(words, str) else words
    if not isinstance(words, list) or not words or any(word not in POOLINGS for word in words):
        raise refuse("ZI-4205", f"the pooling is {shown(words)}, some of {', '.join(POOLINGS)} were wanted")
    return tuple(mode for mode in POOLINGS if mode in words)
