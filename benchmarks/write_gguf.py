"""Write a Llama checkpoint as GGUF.  In: a Hugging Face folder.  Out: one file with the same weights, bit for bit.

usage: write_gguf.py MODEL OUT.gguf

Matrices keep their 16-bit words; vectors become float32, which is what llama.cpp wants of norms.  Rows of q and k
are put into the order that llama.cpp's rotation of neighbouring pairs expects (its converter's `permute`).  The
tokenizer is a dummy of the right size: benchmarks feed token ids.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
NUM_SPECIAL, NUM_BYTES = 3, 256
UNKNOWN, CONTROL, BYTE, NORMAL = 2, 3, 6, 1  # llama.cpp's token types


def gguf_name(name: str) -> str:
    """GGUF's name of a published Llama tensor.  Raises KeyError for a tensor that Llama does not have."""
    stem, suffix = name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{TOP_NAMES[stem]}.{suffix}"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{LAYER_NAMES[part]}.{suffix}"


def pair_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows [heads * head_dim, ...] of q or k from halves (i, i + D/2) to neighbours (2i, 2i + 1)."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def published(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    from safetensors import safe_open

    names = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as opened:
            names |= dict.fromkeys(opened.keys(), file)
    return names


def words(file: Path, name: str, config: dict[str, Any]) -> tuple[np.ndarray, Any]:
    """A tensor as GGUF holds it, and its type there: matrices as 16-bit words, vectors as float32."""
    import torch
    from gguf import GGMLQuantizationType
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        tensor = opened.get_tensor(name)
    if tensor.ndim == 1:
        return tensor.float().numpy(), GGMLQuantizationType.F32
    kinds = {torch.bfloat16: GGMLQuantizationType.BF16, torch.float16: GGMLQuantizationType.F16}
    array = tensor.view(torch.uint16).numpy()
    if ".q_proj." in name:
        array = pair_rows(array, config["num_attention_heads"])
    elif ".k_proj." in name:
        array = pair_rows(array, config["num_key_value_heads"])
    return np.ascontiguousarray(array), kinds[tensor.dtype]


def add_settings(writer: Any, config: dict[str, Any]) -> None:
    """Write the shapes and the dummy tokenizer."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    theta = config.get("rope_theta") or config.get("rope_parameters", {}).get("rope_theta", 10000.0)
    writer.add_name("benchmark")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    num_words = config["vocab_size"] - NUM_SPECIAL - NUM_BYTES
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(NUM_BYTES))]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * NUM_BYTES, *[NORMAL] * num_words]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens + [f"w{word}" for word in range(num_words)])
    writer.add_token_scores([0.0] * config["vocab_size"])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def write(folder: Path, out: Path) -> None:
    """Write `folder` as `out`, one tensor in memory at a time.  Raises KeyError for a foreign architecture."""
    from gguf import GGUFWriter

    config = json.loads((folder / "config.json").read_text())
    if config["architectures"] != ["LlamaForCausalLM"]:
        raise KeyError(f"a Llama checkpoint was wanted, {folder} is {config['architectures']}")
    partial = out.with_name(out.name + ".tmp")
    writer = GGUFWriter(partial, "llama")
    add_settings(writer, config)
    files = published(folder)
    for name, file in files.items():
        array, kind = words(file, name, config)
        data = array.view(np.uint8) if array.dtype == np.uint16 else array
        writer.add_tensor_info(gguf_name(name), data.shape, data.dtype, data.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, file in files.items():
        array, _ = words(file, name, config)
        writer.write_tensor_data(array.view(np.uint8) if array.dtype == np.uint16 else array)
    writer.close()
    partial.replace(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    write(given.model, given.out)
