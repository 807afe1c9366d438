"""Read a model's shape.  In: parsed config.json and generation_config.json.  Out: a ModelSpec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from zinfer.spec.encoder import read_encoder
from zinfer.spec.encoder_families import ENCODER_FAMILIES, EncoderFamily
from zinfer.spec.families import ACTIVATIONS, FAMILIES, Family
from zinfer.spec.keys import Keys, refuse, shown
from zinfer.spec.labels import read_labels, read_scoring
from zinfer.spec.program import Names, build_program, layer_kinds, matrix_shape
from zinfer.spec.records import DTYPE_BYTES, ModelSpec
from zinfer.spec.rope import MAX_CONTEXT, read_rope

MAX_WIDTH = 2**22
MAX_LAYERS = 4096
MAX_HEADS = 2**16
MAX_HEAD_DIM = 2**14
MAX_VOCAB = 2**26
MAX_PARAMETERS = 2**42  # 4.4 T: ten times the largest dense model there is
DTYPES = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
    "torch.float32": "F32",
}


ALL_FAMILIES: Mapping[str, Family] = FAMILIES | ENCODER_FAMILIES
ENCODER_OPTIONS: dict[str, object] = {"norm": "layer", "norm_position": "post", "gated_mlp": False}


def read_spec(
    config: Mapping[str, Any],
    generation: Mapping[str, Any] | None = None,
    published: Mapping[str, str] | None = None,
) -> ModelSpec:
    """The model that a config in transformers' 4 or 5 dialect describes, its program included.

    `published` maps the checkpoint's tensor names to safetensors dtypes where they are known.  It settles what a
    config leaves open: with or without the bare model's prefix, which spelling of the head, and the dtype.
    Raises CheckpointError: ZI-4201 unknown architecture, ZI-4202 missing key, ZI-4203 ill-typed, ZI-4204 out of
    range or not fitting together, ZI-4205 an option zinfer does not know.
    """
    architecture, family = _family(config)
    keys = Keys(config, family.renames, family.defaults)
    published = published or {}
    sets, biased = _flags(keys, family)
    shapes = _shapes(keys, family)
    position_offset = family.position_offset
    if is_encoder := isinstance(family, EncoderFamily):
        sets |= ENCODER_OPTIONS | {"encoder": read_encoder(keys, family)}
        position_offset = _first_position(keys, family)
        shapes["max_context"] -= position_offset
        if shapes["max_context"] < 1:
            raise refuse("ZI-4204", f"{keys.name('max_position_embeddings')} leaves no position for a token")
    stems = _stems(family, published)
    stored = published.get(f"{stems['embed']}.weight")
    dtype = stored if stored in DTYPE_BYTES else _dtype(keys)
    window, window_layers = _window(keys, family, shapes["num_layers"])
    labels = read_labels(keys) if family.is_classifier else ()
    options: dict[str, Any] = {"norm": "rms", **family.options, **sets}
    spec = ModelSpec(
        architecture=architecture,
        family=family.name,
        dtype=dtype,
        **shapes,
        norm_eps=keys.number("norm_eps", 0.0, 1.0),
        sliding_window=window,
        window_layers=window_layers,
        tied_head=not is_encoder and not family.is_classifier and keys.flag("tie_word_embeddings"),
        eos_ids=Keys(generation or {}).ids("eos_token_id") or keys.ids("eos_token_id"),
        bos_id=next(iter(Keys(generation or {}).ids("bos_token_id") or keys.ids("bos_token_id")), None),
        pad_id=next(iter(keys.ids("pad_token_id")), None),
        labels=labels,
        scoring=read_scoring(keys, len(labels)),
        **options,
    )
    if family.position_offset is None:
        spec = replace(spec, rope=read_rope(keys, family, spec.head_dim, spec.max_context))
    _check_size(spec)
    program, lookups, num_parameters = build_program(spec, Names(stems, biased, position_offset))
    return replace(spec, program=program, lookups=lookups, num_parameters=num_parameters)


def _family(config: Mapping[str, Any]) -> tuple[str, Family]:
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise refuse(
            "ZI-4201", f"architectures is {shown(architectures)}, a list of one of {_known()} was wanted"
        )
    family = ALL_FAMILIES.get(architectures[0]) if isinstance(architectures[0], str) else None
    if family is None:
        raise refuse("ZI-4201", f"the architecture {shown(architectures[0])} is not among {_known()}")
    if config.get("quantization_config") is not None:
        raise refuse("ZI-4205", "quantization_config is given; weights in bf16, fp16 or fp32 were wanted")
    return architectures[0], family


def _known() -> str:
    return ", ".join(ALL_FAMILIES)


def _first_position(keys: Keys, family: EncoderFamily) -> int:
    """The row of the position table that belongs to a text's first token."""
    if not family.positions_follow_pad:
        return family.position_offset or 0
    return keys.count("pad_token_id", MAX_VOCAB, least=0) + 1


def _flags(keys: Keys, family: Family) -> tuple[dict[str, object], frozenset[str]]:
    """What the boolean keys of the family's row set, and which ops they give biases."""
    sets: dict[str, object] = {}
    biased = set(family.biased)
    for flag in family.flags:
        if keys.flag(flag.key, flag.default) is not flag.when:
            continue
        if flag.is_refused:
            raise refuse(
                "ZI-4205", f"{keys.name(flag.key)} is {str(flag.when).lower()}, which zinfer does not do"
            )
        sets |= flag.sets
        biased |= set(flag.biased)
    return sets, frozenset(biased)


def _shapes(keys: Keys, family: Family) -> dict[str, Any]:
    """The ModelSpec's counts, fitting together, and the activation."""
    width = keys.count("hidden_size", MAX_WIDTH)
    num_heads = keys.count("num_attention_heads", MAX_HEADS)
    is_plain = family.has_plain_heads
    num_kv_heads = num_heads if is_plain else keys.count("num_key_value_heads", MAX_HEADS, num_heads)
    if num_heads % num_kv_heads:
        raise refuse("ZI-4204", f"{num_heads} attention heads cannot share {num_kv_heads} key-value heads")
    head_dim = None if is_plain else keys.raw("head_dim", None)
    if width % num_heads and head_dim is None:
        raise refuse(
            "ZI-4204", f"{keys.name('hidden_size')} {width} is not a multiple of {num_heads} attention heads"
        )
    ratio = family.mlp_ratio
    embed_dim = keys.count("word_embed_proj_dim", MAX_WIDTH, width) if "project_in" in family.names else width
    return {
        "num_layers": keys.count("num_hidden_layers", MAX_LAYERS),
        "model_dim": width,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": keys.count("head_dim", MAX_HEAD_DIM) if head_dim is not None else width // num_heads,
        "mlp_dim": keys.count("intermediate_size", MAX_WIDTH, *((ratio * width,) if ratio else ())),
        "vocab_size": keys.count("vocab_size", MAX_VOCAB),
        "max_context": keys.count("max_position_embeddings", MAX_CONTEXT),
        "embed_dim": embed_dim if embed_dim != width else None,
        "activation": keys.word("hidden_act", ACTIVATIONS),
    }


def _dtype(keys: Keys) -> str:
    return keys.word("dtype" if keys.has("dtype") else "torch_dtype", DTYPES, "float32")


def _window(keys: Keys, family: Family, num_layers: int) -> tuple[int | None, tuple[bool, ...] | None]:
    """Sliding window and the layers that have it (None: all).  An explicit null is no window."""
    if family.window == "never" or keys.config.get("sliding_window", 0) is None:
        return None, None
    if keys.raw("sliding_window", None) is None:
        return None, None
    if family.window == "flagged" and not keys.flag("use_sliding_window", False):
        return None, None
    window = keys.count("sliding_window", MAX_CONTEXT)
    if family.window == "always":
        return window, None
    types = keys.raw("layer_types", None)
    if types is None:
        first = keys.number("max_window_layers", 0, MAX_LAYERS, 28)
        return window, tuple(layer >= first for layer in range(num_layers))
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != num_layers or any(kind not in known for kind in types):
        raise refuse(
            "ZI-4203", f"layer_types is {shown(types)}, {num_layers} of {' or '.join(known)} were wanted"
        )
    return window, tuple(kind == "sliding_attention" for kind in types)


def _stems(family: Family, published: Mapping[str, str]) -> dict[str, str]:
    """Published stems, spelt as the checkpoint spells them where it is known."""
    embed = f"{family.names['embed']}.weight"
    prefix = "" if embed in published else family.prefix
    heads = [head for head in family.heads if f"{head}.weight" in published]
    head = {"head": (heads or family.heads)[0]}
    if isinstance(family, EncoderFamily):
        head |= family.head_names
    return {key: prefix + stem for key, stem in family.names.items()} | head


def _check_size(spec: ModelSpec) -> None:
    """Refuse what no machine could hold before its program is built."""
    kinds = [kind for part in layer_kinds(spec) for kind in part]
    layer = sum(rows * columns for rows, columns in (matrix_shape(spec, kind) for kind in kinds))
    total = layer * spec.num_layers + spec.vocab_size * spec.model_dim
    if total > MAX_PARAMETERS:
        raise refuse(
            "ZI-4204", f"it describes {total:.1e} parameters, at most {MAX_PARAMETERS:.1e} were expected"
        )
