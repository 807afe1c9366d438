"""The demo model as a plain torch module, and its Hugging Face form.

Enters: a `DemoConfig` and token ids.  Leaves: logits; and, from `export_folder`, the ordinary files of a
LlamaForCausalLM checkpoint (tied embeddings, weights in bf16).  Parameter names are those of Hugging Face's
Llama, so the state dict is exported as it stands.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from demo_corpus import END_OF_TEXT, end_of_text_id
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

# Keys and values of the tokens seen so far, one pair for each layer (empty at first).
Cache = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class DemoConfig:
    """Shape of the model, in Hugging Face's words."""

    vocab_size: int = 5120
    hidden_size: int = 256
    intermediate_size: int = 640
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


def rope_tables(config: DemoConfig, first: int, length: int) -> tuple[Tensor, Tensor]:
    """Return cosine and sine from position `first` on, each [length, head_dim], halves repeated as in Llama."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.outer(torch.arange(first, first + length, dtype=torch.float32), config.rope_theta**-half)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to [batch, heads, length, head_dim]."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class RmsNorm(nn.Module):
    """RMS normalisation in the type of its input, so that torch's fused kernel is used under autocast."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised input."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, index: int, cache: Cache | None) -> Tensor:
        """Return the attention output, [batch, length, hidden]; with a cache, look at and extend it."""
        batch, length, width = x.shape
        heads = (batch, length, -1, self.config.head_dim)
        q = rotate(self.q_proj(x).view(heads).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(heads).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        if cache is not None:
            if index < len(cache):
                k, v = torch.cat((cache[index][0], k), dim=2), torch.cat((cache[index][1], v), dim=2)
            cache[index : index + 1] = [(k, v)]
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        merged: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, width))
        return merged


class Mlp(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the feed-forward output."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One pre-norm decoder layer, the `index`-th."""

    def __init__(self, config: DemoConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config)
        self.index = index
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RmsNorm(config)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None) -> Tensor:
        """Return the residual stream after this layer."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, self.index, cache)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class DemoModel(nn.Module):
    """A small Llama with tied embeddings."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RmsNorm(config)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * config.num_hidden_layers) if deep else 1.0))

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """Return logits, [batch, length, vocabulary].

        With a cache, `ids` go on from what is in it: the first call takes the prompt, later ones one token.
        """
        x = self.embed_tokens(ids)
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.bfloat16)
        first = cache[0][0].shape[2] if cache else 0
        cos, sin = (table.to(x.dtype) for table in rope_tables(self.config, first, ids.shape[1]))
        for layer in self.layers:
            x = layer(x, cos, sin, cache)
        return F.linear(self.norm(x), self.embed_tokens.weight)


def hf_config(config: DemoConfig, end_of_text: int) -> dict[str, Any]:
    """Return the contents of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(config),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": "bfloat16",
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def export_folder(model: DemoModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the Hugging Face folder: both configs, both tokenizer files, and the weights in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    end_id = end_of_text_id(tokenizer)
    sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
    _write_json(folder / "config.json", hf_config(model.config, end_id))
    ends = {"bos_token_id": end_id, "eos_token_id": end_id}
    _write_json(folder / "generation_config.json", ends | sampling)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "model_max_length": model.config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        },
    )
    state = model.state_dict()
    tensors = {f"model.{name}": value.to(torch.bfloat16).contiguous() for name, value in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def load_folder(folder: Path) -> DemoModel:
    """Load an exported folder as an fp32 module (the weights are the bf16 ones)."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = DemoModel(DemoConfig(**{name: raw[name] for name in asdict(DemoConfig())}))
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): value.float() for name, value in tensors.items()})
    return model.eval()
