"""Published config.json files, without the keys that no engine reads, and the parameter counts on their pages."""

LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def llama(hidden, mlp, layers, heads, kv_heads, vocab, **more):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    } | more


def llama31(*shape, **more):
    rope = {"factor": 8.0, "rope_type": "llama3"} | LLAMA3_ROPE
    common = {"rope_theta": 500000.0, "rope_scaling": rope, "max_position_embeddings": 131072}
    return llama(*shape, **(common | more))


def mistral(vocab, **more):
    shape = llama(4096, 14336, 32, 32, 8, vocab, max_position_embeddings=32768)
    return shape | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"} | more


def qwen2(hidden, mlp, layers, heads, kv_heads, vocab, **more):
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "max_window_layers": layers,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    } | more


def qwen3(hidden, mlp, layers, heads, vocab=151936, **more):
    shape = qwen2(hidden, mlp, layers, heads, 8, vocab, sliding_window=None, max_position_embeddings=40960)
    named = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    return shape | named | {"head_dim": 128, "attention_bias": False, "rope_scaling": None} | more


def phi3(**more):
    return {
        "architectures": ["Phi3ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "model_type": "phi3",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32064,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
        "eos_token_id": 32000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    } | more


def phi3_long(kind):
    factors = {
        "short_factor": [1.0 + 0.01 * i for i in range(48)],
        "long_factor": [1.0 + i for i in range(48)],
    }
    return phi3(max_position_embeddings=131072, sliding_window=262144, rope_scaling=factors | {"type": kind})


def opt(hidden, ffn, layers, heads, **more):
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "_remove_final_layer_norm": False,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "hidden_size": hidden,
        "ffn_dim": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        "vocab_size": 50272,
        "word_embed_proj_dim": hidden,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "torch_dtype": "float16",
    } | more


def gpt2(hidden, layers, heads):
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_ctx": 1024,
        "n_positions": 1024,
        "vocab_size": 50257,
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    }


def neox(hidden, mlp, layers, heads, vocab, **more):
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_parallel_residual": True,
    } | more


PUBLISHED = {
    "llama-7b": (llama(4096, 11008, 32, 32, None, 32000, torch_dtype="float16"), 6_738_415_616),
    "Llama-2-7b": (llama(4096, 11008, 32, 32, 32, 32000, max_position_embeddings=4096), 6_738_415_616),
    "Llama-2-70b": (llama(8192, 28672, 80, 64, 8, 32000, max_position_embeddings=4096), 68_976_648_192),
    "Meta-Llama-3-8B": (
        llama(4096, 14336, 32, 32, 8, 128256, rope_theta=500000.0, max_position_embeddings=8192),
        8_030_261_248,
    ),
    "Llama-3.1-8B": (llama31(4096, 14336, 32, 32, 8, 128256), 8_030_261_248),
    "Llama-3.1-70B": (llama31(8192, 28672, 80, 64, 8, 128256), 70_553_706_496),
    "Llama-3.1-405B": (llama31(16384, 53248, 126, 128, 8, 128256), 405_853_388_800),
    "Llama-3.2-1B": (
        llama31(2048, 8192, 16, 32, 8, 128256, head_dim=64, tie_word_embeddings=True),
        1_235_814_400,
    ),
    "Llama-3.2-3B": (
        llama31(3072, 8192, 28, 24, 8, 128256, head_dim=128, tie_word_embeddings=True),
        3_212_749_824,
    ),
    "Mistral-7B-v0.1": (mistral(32000, sliding_window=4096), 7_241_732_096),
    "Mistral-7B-v0.3": (mistral(32768, sliding_window=None, rope_theta=1e6), 7_248_023_552),
    "Qwen2-0.5B": (qwen2(896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True), 494_032_768),
    "Qwen2-7B": (qwen2(3584, 18944, 28, 28, 4, 152064), 7_615_616_512),
    "Qwen2.5-72B": (qwen2(8192, 29568, 80, 64, 8, 152064), 72_706_203_648),
    "Qwen3-0.6B": (qwen3(1024, 3072, 28, 16, tie_word_embeddings=True), 596_049_920),
    "Qwen3-8B": (qwen3(4096, 12288, 36, 32), 8_190_735_360),
    "Qwen3-32B": (qwen3(5120, 25600, 64, 64), 32_762_123_264),
    "Phi-3-mini-4k-instruct": (phi3(), 3_821_079_552),
    "Phi-3-mini-128k-instruct": (phi3_long("su"), 3_821_079_552),
    "Phi-3.5-mini-instruct": (phi3_long("longrope"), 3_821_079_552),
    "opt-125m": (opt(768, 3072, 12, 12), 125_239_296),
    "opt-350m": (
        opt(1024, 4096, 24, 16, do_layer_norm_before=False, word_embed_proj_dim=512),
        331_196_416,
    ),
    "opt-6.7b": (opt(4096, 16384, 32, 32), 6_658_473_984),
    "opt-30b": (opt(7168, 28672, 48, 56), 29_974_540_288),
    # No page: 96 layers of 12 M^2 + 13 M, 50272 + 2050 rows of embeddings and the last norm, M = 12288.
    "opt-175b": (
        opt(12288, 49152, 96, 96),
        96 * (12 * 12288**2 + 13 * 12288) + (50272 + 2050 + 2) * 12288,
    ),
    "gpt2": (gpt2(768, 12, 12), 124_439_808),
    "gpt2-xl": (gpt2(1600, 48, 25), 1_557_611_200),
    "pythia-1b": (neox(2048, 8192, 16, 8, 50304), 1_011_781_632),
    "gpt-neox-20b": (
        neox(6144, 24576, 44, 64, 50432, hidden_act="gelu_fast", rotary_pct=0.25),
        20_554_567_680,
    ),
}
