"""BERT with a classification head as ONNX.  In: a checkpoint folder.  Out: one .onnx file, fused where possible.

transformers' own graph does not survive tracing with other shapes than the traced ones; this one is plain matrices.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn


class PlainBert(nn.Module):
    """ids, types, mask [B, S] -> logits [B, C]; padding is masked."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        found = {
            name: w for file in sorted(folder.glob("*.safetensors")) for name, w in load_file(file).items()
        }
        self.names = {name.removeprefix("bert."): f"w{at}" for at, name in enumerate(found)}
        for tensor, short in zip(found.values(), self.names.values(), strict=True):
            self.register_buffer(short, tensor.float())

    def w(self, name: str) -> Tensor:
        """A weight by its published name."""
        return getattr(self, self.names[name])

    def linear(self, x: Tensor, name: str) -> Tensor:
        """x W^T + b"""
        return F.linear(x, self.w(f"{name}.weight"), self.w(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        """Layer norm."""
        weight, bias = self.w(f"{name}.weight"), self.w(f"{name}.bias")
        return F.layer_norm(x, weight.shape, weight, bias, self.config.get("layer_norm_eps", 1e-12))

    def forward(self, ids: Tensor, types: Tensor, mask: Tensor) -> Tensor:
        """Logits."""
        table = "embeddings"
        x = self.w(f"{table}.word_embeddings.weight")[ids]
        x = x + self.w(f"{table}.position_embeddings.weight")[: ids.shape[1]][None]
        x = self.norm(x + self.w(f"{table}.token_type_embeddings.weight")[types], f"{table}.LayerNorm")
        away = (1 - mask.float())[:, None, None, :] * -1e9
        for at in range(self.config["num_hidden_layers"]):
            x = self.layer(x, away, f"encoder.layer.{at}")
        pooled = torch.tanh(self.linear(x[:, 0], "pooler.dense"))
        return self.linear(pooled, "classifier")

    def layer(self, x: Tensor, away: Tensor, at: str) -> Tensor:
        """One post-norm layer."""
        heads = self.config["num_attention_heads"]
        shape = (x.shape[0], x.shape[1], heads, x.shape[2] // heads)
        q, k, v = (
            self.linear(x, f"{at}.attention.self.{name}").reshape(shape).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        scores = q @ k.transpose(2, 3) / (shape[3] ** 0.5) + away
        read = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
        x = self.norm(
            x + self.linear(read, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm"
        )
        wide = F.gelu(self.linear(x, f"{at}.intermediate.dense"))
        return self.norm(x + self.linear(wide, f"{at}.output.dense"), f"{at}.output.LayerNorm")


def export(folder: Path, target: Path) -> str:
    """Write the file; says whether onnxruntime's own optimizer for BERT could fuse it."""
    model = PlainBert(folder).eval()
    if model.config["architectures"] != ["BertForSequenceClassification"]:
        raise SystemExit(f"{folder}: only BertForSequenceClassification is exported")
    ids = torch.randint(5, 20, (2, 9))
    axes = {name: {0: "texts", 1: "tokens"} for name in ("ids", "types", "mask")} | {"logits": {0: "texts"}}
    given = (ids, torch.zeros_like(ids), torch.ones_like(ids))
    names = {"input_names": ["ids", "types", "mask"], "output_names": ["logits"], "dynamic_axes": axes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, given, str(target), dynamo=False, opset_version=17, **names)
    return fused(target, model.config)


def fused(target: Path, config: dict[str, Any]) -> str:
    """Give the peer its best: attention, GELU and norms as single operators."""
    try:
        from onnxruntime.transformers.optimizer import optimize_model

        made = optimize_model(
            str(target), "bert", num_heads=config["num_attention_heads"], hidden_size=config["hidden_size"]
        )
        made.save_model_to_file(str(target))
        return ", ".join(
            f"{count} {name}" for name, count in made.get_fused_operator_statistics().items() if count
        )
    except Exception as error:  # the plain graph is still right, and onnxruntime optimizes it at load
        return f"not fused: {type(error).__name__}"


if __name__ == "__main__":
    print(export(Path(sys.argv[1]), Path(sys.argv[2])))
