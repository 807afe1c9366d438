"""Tiny random encoders of every family, made by transformers, and the mutation of each that a test must notice."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import oracle
import torch
import transformers

from zinfer.layers.packed import Packed
from zinfer.models.encoder import EncoderFlow, run_op
from zinfer.spec.read import read_spec

SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 64,
}
DISTIL_SHAPE = {
    "dim": 48,
    "hidden_dim": 80,
    "n_layers": 3,
    "n_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 64,
}
FIVE = {"num_labels": 5}


@dataclass(frozen=True)
class Variant:
    """A model: its class without "Model" or the head's name, whether it has a head, its config, how to spoil it."""

    model: str
    has_head: bool
    spoil: Callable[[Any, dict], tuple[Any, dict]]
    options: dict[str, Any] = field(default_factory=dict)
    shape: dict[str, Any] = field(default_factory=lambda: SHAPE)


def reoption(**changes):
    """A spec whose Encoder differs."""
    return lambda spec, tensors: (replace(spec, encoder=replace(spec.encoder, **changes)), tensors)


def shift_positions(spec, tensors):
    """Read learned positions one row too late."""
    moved = [replace(row, offset=row.offset + (row.role == "positions")) for row in spec.lookups]
    return replace(spec, lookups=tuple(moved)), tensors


ROBERTA = SHAPE | {"pad_token_id": 1, "type_vocab_size": 1}
ELECTRA = SHAPE | {"embedding_size": 32}
VARIANTS = {
    "bert": Variant("Bert", False, oracle.clear("token_type_embeddings.weight")),
    "bert-relu-eps": Variant(
        "Bert",
        False,
        oracle.respec(norm_eps=1e-12),
        {"hidden_act": "relu", "layer_norm_eps": 0.1},
    ),
    "bert-classify": Variant("Bert", True, oracle.clear("pooler.dense.bias"), FIVE),
    "roberta": Variant("Roberta", False, shift_positions, shape=ROBERTA),
    "roberta-classify": Variant(
        "Roberta", True, reoption(head_activation="relu"), FIVE | {"pad_token_id": 2}, ROBERTA
    ),
    "xlm-roberta": Variant("XLMRoberta", False, oracle.clear("embeddings.LayerNorm.bias"), shape=ROBERTA),
    "xlm-roberta-classify": Variant("XLMRoberta", True, shift_positions, FIVE, ROBERTA),
    "distilbert": Variant("DistilBert", False, oracle.flatten("sa_layer_norm.weight"), shape=DISTIL_SHAPE),
    "distilbert-classify": Variant("DistilBert", True, reoption(head_activation="tanh"), FIVE, DISTIL_SHAPE),
    "electra": Variant("Electra", False, oracle.clear("embeddings_project.bias"), shape=ELECTRA),
    "electra-same-width": Variant(
        "Electra", False, oracle.respec(activation="relu"), {"embedding_size": 48}, SHAPE
    ),
    "electra-classify": Variant("Electra", True, reoption(head_activation="tanh"), FIVE, ELECTRA),
}


def make(name):
    """(config, tensors, transformers' model): seeded, eager attention, nothing 0 or 1."""
    variant = VARIANTS[name]
    config = getattr(transformers, f"{variant.model}Config")(**(variant.shape | variant.options))
    config._attn_implementation = "eager"
    kind = f"{variant.model}ForSequenceClassification" if variant.has_head else f"{variant.model}Model"
    torch.manual_seed(11)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.normal_(0.0, 0.1) if key.endswith("bias") else weight.normal_(1.0, 0.2)
            else:
                weight.normal_(0.0, weight.shape[1] ** -0.5 * (1.0 if "embeddings." in key else 1.5))
    as_saved = config.to_dict() | {"architectures": [kind], "dtype": "float32"}
    return as_saved, {key: value.detach() for key, value in model.state_dict().items()}, model


def spec_of(config, tensors):
    return read_spec(config, None, dict.fromkeys(tensors, "F32"))


def pack(texts, segments=None):
    """The Packed batch of whole texts, given as lists of ids."""
    bounds = tuple(accumulate(map(len, texts), initial=0))
    flat = [token for text in texts for token in text]
    types = None if segments is None else torch.tensor([kind for text in segments for kind in text])
    return Packed(
        tokens_T=torch.tensor(flat),
        positions_T=torch.cat([torch.arange(len(text)) for text in texts]),
        bounds=bounds,
        past=(0,) * len(texts),
        logit_rows=torch.tensor(bounds[1:]) - 1,
        segments_T=types,
    )


def run_packed(spec, tensors, batch, *, exact=False, layers=None):
    """The whole program over plain tensors; the flow that is left."""
    flow = EncoderFlow(layers=layers)
    for lookup in spec.lookups:
        flow.rows[lookup.role] = tensors[lookup.name][batch.ids(lookup.role) + lookup.offset]
    for op in spec.program:
        views = {weight.role: tensors[weight.name][weight.start : weight.stop] for weight in op.weights}
        run_op(op, spec, flow, views, batch, exact=exact)
    return flow


def reference(model, texts, segments=None):
    """Transformers on the padded batch: (hidden states [n, M] of each text, logits or None, hidden of all layers)."""
    longest = max(map(len, texts))
    pad = model.config.pad_token_id
    padded = torch.tensor([text + [pad] * (longest - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    given = {"input_ids": padded, "attention_mask": mask, "output_hidden_states": True}
    if segments is not None:
        given["token_type_ids"] = torch.tensor([kinds + [0] * (longest - len(kinds)) for kinds in segments])
    result = model(**given)
    hidden = [rows[: len(text)] for rows, text in zip(result.hidden_states[-1], texts, strict=True)]
    return hidden, getattr(result, "logits", None), result.hidden_states
