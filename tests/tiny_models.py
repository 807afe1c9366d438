"""One tiny random model per family, written to a folder: enough layers and width that streaming has work to do."""

from zinfer.checkpoint.synthetic import write_checkpoint
from zinfer.spec.read import read_spec

_DECODER = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 515,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 1,
    "bos_token_id": 0,
}
CONFIGS = {
    "llama": _DECODER | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "mistral": _DECODER
    | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 16},
    "qwen2": _DECODER
    | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": _DECODER | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32},
    "phi3": _DECODER
    | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "pad_token_id": 2, "sliding_window": None},
    "opt": {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "hidden_size": 64,
        "ffn_dim": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 515,
        "word_embed_proj_dim": 32,
        "do_layer_norm_before": False,
        "max_position_embeddings": 256,
        "activation_function": "relu",
        "eos_token_id": 1,
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 256,
        "vocab_size": 515,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "eos_token_id": 1,
    },
    "gpt_neox": {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 515,
        "max_position_embeddings": 256,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
    },
}


def write_tiny(family, folder, dtype="bfloat16", **changes):
    """Write the family's tiny model in `dtype`; returns the folder."""
    config = CONFIGS[family] | {"torch_dtype": dtype} | changes
    words = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    write_checkpoint(read_spec(config, None), config, folder, seed=7, dtype=words[dtype])
    return folder


def streaming_bytes(folder, prompt, params, **options):
    """A host budget in which about half of the weights stream, whatever the activations need."""
    from zinfer import LLM

    with LLM(folder, **options, memory={"host": "1GiB"}) as llm:
        plan = llm.fit([prompt], params)
        fixed = plan.uses[0].total - plan.reserve.recorded
        return fixed - sum(chunk.nbytes for chunk in plan.table.streamable) // 2
