"""The literal table of families: what each calls its keys and tensors, and which options it fixes.  Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}


@dataclass(frozen=True, slots=True)
class Flag:
    """A boolean key.  Where it equals `when`: fields of the ModelSpec it sets, ops that have biases, or a refusal."""

    key: str
    default: bool
    when: bool
    sets: Mapping[str, object] = field(default_factory=dict)
    biased: tuple[str, ...] = ()
    is_refused: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture as a row of data.

    `names` maps what an op reads to the published name's stem ("{}" is the layer; ".weight" and ".bias" follow),
    without `prefix`, which a checkpoint of the bare model leaves out; `heads` are the spellings of the untied
    head.  `renames` and `defaults` are those of `Keys`, `options` fields of the ModelSpec, `biased` the ops that
    always have a bias.
    """

    name: str
    prefix: str
    names: Mapping[str, str]
    heads: tuple[str, ...] = ("lm_head",)
    renames: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, object] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    flags: tuple[Flag, ...] = ()
    biased: tuple[str, ...] = ()
    window: Literal["never", "always", "flagged"] = "never"
    has_plain_heads: bool = (
        False  # as many key heads as heads, together as wide as the model, whatever a key says
    )
    mlp_ratio: int | None = None  # MLP width over model width where the config leaves it out
    position_offset: int | None = None  # learned positions, and what is added to them; None: rotary
    rope_kinds: tuple[str, ...] = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    is_classifier: bool = False  # the head has a row per label, not per token, and stands by itself


LLAMA_NAMES = {
    "embed": "embed_tokens",
    "attention_norm": "layers.{}.input_layernorm",
    "q": "layers.{}.self_attn.q_proj",
    "k": "layers.{}.self_attn.k_proj",
    "v": "layers.{}.self_attn.v_proj",
    "o": "layers.{}.self_attn.o_proj",
    "mlp_norm": "layers.{}.post_attention_layernorm",
    "gate": "layers.{}.mlp.gate_proj",
    "up": "layers.{}.mlp.up_proj",
    "down": "layers.{}.mlp.down_proj",
    "final_norm": "norm",
}
LLAMA_DEFAULTS: dict[str, object] = {
    "hidden_act": "silu",
    "norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
RMS_NORM = {"norm_eps": "rms_norm_eps"}
OPT_BIASED = ("q", "k", "v", "o", "up", "down")

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        name="llama",
        prefix="model.",
        names=LLAMA_NAMES,
        renames=RMS_NORM,
        defaults=LLAMA_DEFAULTS | {"max_position_embeddings": 2048},
        flags=(
            Flag("attention_bias", False, True, biased=("q", "k", "v", "o")),
            Flag("mlp_bias", False, True, biased=("gate", "up", "down")),
        ),
    ),
    "MistralForCausalLM": Family(
        name="mistral",
        prefix="model.",
        names=LLAMA_NAMES,
        renames=RMS_NORM,
        defaults=LLAMA_DEFAULTS
        | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        window="always",
    ),
    "Qwen2ForCausalLM": Family(
        name="qwen2",
        prefix="model.",
        names=LLAMA_NAMES,
        renames=RMS_NORM,
        defaults=LLAMA_DEFAULTS | {"max_position_embeddings": 32768, "sliding_window": 4096},
        biased=("q", "k", "v"),
        window="flagged",
    ),
    "Qwen3ForCausalLM": Family(
        name="qwen3",
        prefix="model.",
        names=LLAMA_NAMES | {"q_norm": "layers.{}.self_attn.q_norm", "k_norm": "layers.{}.self_attn.k_norm"},
        renames=RMS_NORM,
        defaults=LLAMA_DEFAULTS | {"head_dim": 128, "max_position_embeddings": 32768, "sliding_window": 4096},
        options={"qk_norm": True},
        flags=(Flag("attention_bias", False, True, biased=("q", "k", "v", "o")),),
        window="flagged",
    ),
    "Phi3ForCausalLM": Family(
        name="phi3",
        prefix="model.",
        names={
            name: LLAMA_NAMES[name]
            for name in ("embed", "attention_norm", "o", "mlp_norm", "down", "final_norm")
        }
        | {"qkv": "layers.{}.self_attn.qkv_proj", "gate_up": "layers.{}.mlp.gate_up_proj"},
        renames=RMS_NORM,
        defaults=LLAMA_DEFAULTS
        | {"norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
        options={"fused_qkv": "concat", "fused_gate_up": True},
        window="always",
        rope_kinds=("default", "longrope"),
        rope_aliases={"su": "longrope", "yarn": "longrope"},
    ),
    "OPTForCausalLM": Family(
        name="opt",
        prefix="model.",
        names={
            "embed": "decoder.embed_tokens",
            "positions": "decoder.embed_positions",
            "project_in": "decoder.project_in",
            "attention_norm": "decoder.layers.{}.self_attn_layer_norm",
            "q": "decoder.layers.{}.self_attn.q_proj",
            "k": "decoder.layers.{}.self_attn.k_proj",
            "v": "decoder.layers.{}.self_attn.v_proj",
            "o": "decoder.layers.{}.self_attn.out_proj",
            "mlp_norm": "decoder.layers.{}.final_layer_norm",
            "up": "decoder.layers.{}.fc1",
            "down": "decoder.layers.{}.fc2",
            "final_norm": "decoder.final_layer_norm",
            "project_out": "decoder.project_out",
        },
        renames={"intermediate_size": "ffn_dim", "hidden_act": "activation_function"},
        defaults={
            "hidden_act": "relu",
            "norm_eps": 1e-5,  # torch's own, OPT has no key for it
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
        options={"norm": "layer", "gated_mlp": False},
        flags=(
            Flag("do_layer_norm_before", True, False, sets={"norm_position": "post", "final_norm": False}),
            Flag("_remove_final_layer_norm", False, True, sets={"final_norm": False}),
            Flag("layer_norm_elementwise_affine", True, False, sets={"norm_affine": False}),
            Flag("enable_bias", True, True, biased=OPT_BIASED),
        ),
        has_plain_heads=True,
        position_offset=2,
    ),
    "GPT2LMHeadModel": Family(
        name="gpt2",
        prefix="transformer.",
        names={
            "embed": "wte",
            "positions": "wpe",
            "attention_norm": "h.{}.ln_1",
            "qkv": "h.{}.attn.c_attn",
            "o": "h.{}.attn.c_proj",
            "mlp_norm": "h.{}.ln_2",
            "up": "h.{}.mlp.c_fc",
            "down": "h.{}.mlp.c_proj",
            "final_norm": "ln_f",
        },
        renames={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
            "hidden_act": "activation_function",
            "norm_eps": "layer_norm_epsilon",
        },
        defaults={
            "hidden_act": "gelu_new",
            "norm_eps": 1e-5,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        },
        options={"norm": "layer", "gated_mlp": False, "fused_qkv": "concat", "transposed": True},
        flags=(
            Flag("scale_attn_weights", True, False, sets={"attention_scale": 1.0}),
            Flag("scale_attn_by_inverse_layer_idx", False, True, is_refused=True),
            Flag("add_cross_attention", False, True, is_refused=True),
        ),
        biased=("qkv", "o", "up", "down"),
        has_plain_heads=True,
        mlp_ratio=4,
        position_offset=0,
    ),
    "GPTNeoXForCausalLM": Family(
        name="gpt_neox",
        prefix="gpt_neox.",
        names={
            "embed": "embed_in",
            "attention_norm": "layers.{}.input_layernorm",
            "qkv": "layers.{}.attention.query_key_value",
            "o": "layers.{}.attention.dense",
            "mlp_norm": "layers.{}.post_attention_layernorm",
            "up": "layers.{}.mlp.dense_h_to_4h",
            "down": "layers.{}.mlp.dense_4h_to_h",
            "final_norm": "final_layer_norm",
        },
        heads=("embed_out", "lm_head"),
        renames={
            "norm_eps": "layer_norm_eps",
            "rope_theta": "rotary_emb_base",
            "partial_rotary_factor": "rotary_pct",
        },
        defaults={
            "hidden_act": "gelu",
            "norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "partial_rotary_factor": 0.25,
        },
        options={"norm": "layer", "gated_mlp": False, "fused_qkv": "per_head"},
        flags=(
            Flag("use_parallel_residual", True, True, sets={"parallel_residual": True}),
            Flag("attention_bias", True, True, biased=("qkv", "o")),
        ),
        biased=("up", "down"),
        has_plain_heads=True,
        rope_kinds=("default", "linear", "dynamic", "yarn"),
    ),
}

# A classifier is its decoder with another head: `score`, read at a text's last token.
CLASSIFIERS = {
    "LlamaForSequenceClassification": "LlamaForCausalLM",
    "MistralForSequenceClassification": "MistralForCausalLM",
    "Qwen2ForSequenceClassification": "Qwen2ForCausalLM",
    "Qwen3ForSequenceClassification": "Qwen3ForCausalLM",
    "Phi3ForSequenceClassification": "Phi3ForCausalLM",
    "OPTForSequenceClassification": "OPTForCausalLM",
    "GPT2ForSequenceClassification": "GPT2LMHeadModel",
    "GPTNeoXForSequenceClassification": "GPTNeoXForCausalLM",
}
FAMILIES |= {
    architecture: replace(FAMILIES[decoder], heads=("score",), is_classifier=True)
    for architecture, decoder in CLASSIFIERS.items()
}
