"""Tiny random models of every family, saved by transformers, and the mutation of each that a test must notice."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2_SHAPE = {"n_embd": 48, "n_layer": 2, "n_head": 3, "vocab_size": 97, "n_positions": 64, "eos_token_id": 2}
OPT_SHAPE = {key: value for key, value in SHAPE.items() if key != "intermediate_size"} | {"ffn_dim": 80}


@dataclass(frozen=True)
class Variant:
    """A model: its class, what its config holds beyond SHAPE, and how to spoil it."""

    model: str
    options: dict[str, Any]
    spoil: Callable[[Any, dict], tuple[Any, dict]]
    shape: dict[str, Any] = field(default_factory=lambda: SHAPE)
    rename: Callable[[str], str] = str


def respec(**changes):
    return lambda spec, tensors: (replace(spec, **changes), tensors)


def rerope(**changes):
    return lambda spec, tensors: (replace(spec, rope=replace(spec.rope, **changes)), tensors)


def rescale(**changes):
    def spoil(spec, tensors):
        return replace(spec, rope=replace(spec.rope, parameters=spec.rope.parameters | changes)), tensors

    return spoil


def swap(one, other):
    return lambda spec, tensors: (spec, tensors | {one: tensors[other], other: tensors[one]})


def clear(ending):
    def spoil(spec, tensors):
        hit = {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if name.endswith(ending)}
        assert hit, ending
        return spec, tensors | hit

    return spoil


def flatten(ending):
    def spoil(spec, tensors):
        hit = {name: torch.ones_like(tensor) for name, tensor in tensors.items() if name.endswith(ending)}
        assert hit, ending
        return spec, tensors | hit

    return spoil


def transpose(ending):
    def spoil(spec, tensors):
        hit = {name: tensor.t().contiguous() for name, tensor in tensors.items() if name.endswith(ending)}
        assert hit, ending
        return spec, tensors | hit

    return spoil


def reposition(spec, tensors):
    """Read learned positions one row too early."""
    tokens, positions = spec.lookups
    return replace(spec, lookups=(tokens, replace(positions, offset=positions.offset - 1))), tensors


FACTORS = [1.0 + 0.5 * i for i in range(8)]
LAYER = "model.layers.0"

VARIANTS = {
    "llama-mha": Variant(
        "Llama", {}, swap(f"{LAYER}.self_attn.q_proj.weight", f"{LAYER}.self_attn.k_proj.weight")
    ),
    "llama-gqa-biased-tied": Variant(
        "Llama",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
        clear("gate_proj.bias"),
    ),
    "llama-head-dim": Variant(
        "Llama", {"head_dim": 24, "num_key_value_heads": 1}, respec(attention_scale=0.25)
    ),
    "llama-eps-gelu": Variant("Llama", {"rms_norm_eps": 0.3, "hidden_act": "gelu"}, respec(norm_eps=0.2)),
    "llama-theta": Variant(
        "Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, rerope(theta=400.0)
    ),
    "llama-linear": Variant(
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        rescale(factor=3.0),
    ),
    "llama-dynamic": Variant(
        "Llama",
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0},
        },
        rerope(kind="default"),
    ),
    "llama-yarn": Variant(
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "rope_theta": 100.0,
            }
        },
        rescale(attention_factor=1.0),
    ),
    "llama-yarn-mscale": Variant(
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 100.0,
                "beta_fast": 4.0,
                "beta_slow": 1.5,
                "mscale": 1.5,
                "mscale_all_dim": 0.7,
                "truncate": False,
            }
        },
        rescale(truncate=True),
    ),
    "llama-longrope": Variant(
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": FACTORS,
                "long_factor": [2 * factor for factor in FACTORS],
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "rope_theta": 10000.0,
            }
        },
        rescale(original_context=64),
    ),
    "llama-llama3": Variant(
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 500.0,
            }
        },
        rescale(high_freq_factor=2.0),
    ),
    "mistral-window": Variant(
        "Mistral", {"sliding_window": 6, "num_key_value_heads": 1}, respec(sliding_window=None)
    ),
    "mistral-no-window": Variant(
        "Mistral",
        {"sliding_window": None, "num_key_value_heads": 3, "vocab_size": 101},
        respec(sliding_window=9),
    ),
    "qwen2": Variant("Qwen2", {"num_key_value_heads": 1}, clear("q_proj.bias")),
    "qwen2-max-window-layers": Variant(
        "Qwen2",
        {
            "num_hidden_layers": 3,
            "num_key_value_heads": 3,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
        respec(window_layers=None),
    ),
    "qwen2-layer-types-tied": Variant(
        "Qwen2",
        {
            "num_key_value_heads": 1,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "tie_word_embeddings": True,
        },
        respec(window_layers=(False, True)),
    ),
    "qwen3": Variant("Qwen3", {"head_dim": 24, "num_key_value_heads": 1}, flatten("q_norm.weight")),
    "qwen3-biased-tied": Variant(
        "Qwen3",
        {"head_dim": 16, "num_key_value_heads": 3, "attention_bias": True, "tie_word_embeddings": True},
        flatten("k_norm.weight"),
    ),
    "phi3-window": Variant("Phi3", {"sliding_window": 7}, respec(sliding_window=8)),
    "phi3-longrope-partial": Variant(
        "Phi3",
        {
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": FACTORS[:6],
                "long_factor": FACTORS[2:],
                "partial_rotary_factor": 0.75,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 16,
            },
        },
        rescale(short_factor=tuple(FACTORS[2:])),
    ),
    "opt": Variant("OPT", {}, reposition, OPT_SHAPE),
    "opt-350m": Variant(
        "OPT",
        {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
        respec(norm_position="pre"),
        OPT_SHAPE,
    ),
    "opt-no-final-norm": Variant(
        "OPT",
        {"_remove_final_layer_norm": True},
        clear("final_layer_norm.bias"),
        OPT_SHAPE,
    ),
    "opt-bare": Variant(
        "OPT",
        {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
        respec(activation="relu"),
        OPT_SHAPE,
    ),
    "gpt2": Variant("GPT2", {}, transpose("attn.c_proj.weight"), GPT2_SHAPE),
    "gpt2-without-prefix": Variant(
        "GPT2",
        {"n_inner": 80, "scale_attn_weights": False, "vocab_size": 101},
        respec(attention_scale=None),
        GPT2_SHAPE,
        rename=lambda name: name.removeprefix("transformer."),
    ),
    "neox-parallel": Variant("GPTNeoX", {"num_attention_heads": 2}, respec(parallel_residual=False)),
    "neox-sequential": Variant(
        "GPTNeoX",
        {
            "use_parallel_residual": False,
            "attention_bias": False,
            "num_attention_heads": 2,
            "vocab_size": 101,
        },
        respec(fused_qkv="concat"),
    ),
    "neox-linear": Variant(
        "GPTNeoX",
        {
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 2.0,
                "rope_theta": 1000.0,
                "partial_rotary_factor": 0.5,
            }
        },
        rescale(factor=1.0),
        rename=lambda name: name.replace("embed_out", "lm_head"),
    ),
}


def make(name, folder: Path):
    """Save the variant in fp32 and bf16 under `folder`; the weights are seeded and nothing is 0 or 1."""
    variant = VARIANTS[name]
    config = getattr(transformers, f"{variant.model}Config")(**(variant.shape | variant.options))
    kind = "GPT2LMHeadModel" if variant.model == "GPT2" else f"{variant.model}ForCausalLM"
    torch.manual_seed(7)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            randomise(key, weight, model)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        target = folder / str(dtype)
        model.to(dtype).save_pretrained(target)
        if variant.rename is not str:
            file = target / "model.safetensors"
            save_file({variant.rename(key): value for key, value in load_file(file).items()}, file)


def randomise(key, weight, model):
    """Scale a parameter so that activations and logits are of order 1."""
    if weight.dim() == 1:
        weight.normal_(0.0, 0.1) if key.endswith("bias") else weight.normal_(1.0, 0.2)
        return
    is_table = any(part in key for part in ("embed_", "wte", "wpe")) and "embed_out" not in key
    is_conv = type(model).__name__.startswith("GPT2") and not is_table
    fan_in = weight.shape[0] if is_conv else weight.shape[1]
    weight.normal_(0.0, fan_in**-0.5 * (1.0 if is_table else 1.5))


def load(folder: Path, dtype):
    """(config, tensors, transformers' model) as saved; eager attention, as the plainest reference."""
    target = folder / str(dtype)
    config = json.loads((target / "config.json").read_text())
    tensors = load_file(target / "model.safetensors")
    model = getattr(transformers, config["architectures"][0]).from_pretrained(
        target, dtype=dtype, attn_implementation="eager"
    )
    return config, tensors, model.eval()


def to_v4(config):
    """The same config in transformers 4's dialect."""
    old = {key: value for key, value in config.items() if key not in ("dtype", "rope_parameters")}
    old["torch_dtype"] = config["dtype"]
    rope = dict(config.get("rope_parameters") or {})
    is_neox = config["model_type"] == "gpt_neox"
    if "rope_theta" in rope:
        old["rotary_emb_base" if is_neox else "rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        old["rotary_pct" if is_neox else "partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    if rope.get("rope_type", "default") != "default":
        word = "rope_type" if rope["rope_type"] in ("llama3", "longrope") else "type"
        old["rope_scaling"] = {word: rope.pop("rope_type")} | rope
    elif rope:
        old["rope_scaling"] = None
    return old
