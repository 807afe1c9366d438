"""A teacher and a group of students with random weights, as folders.  What they say means nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch

from zinfer.checkpoint.index import CheckpointIndex
from zinfer.checkpoint.synthetic import write_checkpoint
from zinfer.spec.read import read_spec
from zinfer.students.group import Group, write_group
from zinfer.students.settings import segments
from zinfer.students.student import (
    OFFSET,
    PROJECTION,
    head_names,
    layer_names,
    shared_names,
    source_names,
    student_spec,
)
from zinfer.students.tensors import read_tensors

LABELS, VOCAB = 12, 2000


def config_of(width: int, layers: int, heads: int) -> dict[str, Any]:
    """A BERT of that shape with a dozen classes."""
    return {
        "architectures": ["BertForSequenceClassification"],
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "id2label": {str(label): f"label {label}" for label in range(LABELS)},
        "torch_dtype": "float32",
    }


def write_teacher(folder: Path, width: int, layers: int, heads: int) -> Path:
    """An encoder with random weights and a tokenizer of numbers; what is there already is kept."""
    if not (folder / "model.safetensors").exists():
        config = config_of(width, layers, heads)
        write_checkpoint(read_spec(config), config, folder, seed=1, dtype="F32")
        words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3} | {f"w{at}": at for at in range(4, VOCAB)}
        core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
        core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        ends = [("[CLS]", 2), ("[SEP]", 3)]
        core.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
        )
        core.save(str(folder / "tokenizer.json"))
    return folder


def write_students(folder: Path, teacher: Path, count: int, layers: int = 2) -> Path:
    """A group whose students hold copies of the teacher's layers; what is there already is kept."""
    if (folder / "students.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((teacher / "config.json").read_text())
    spec = read_spec(config)
    published, _ = read_tensors(CheckpointIndex.open(teacher).files[0])
    heads, student = head_names(spec), student_spec(spec, layers)
    width = spec.model_dim
    draw = torch.Generator().manual_seed(3)

    def one(taught: list[int]) -> dict[str, torch.Tensor]:
        copied = source_names(student, taught)
        own = {name: published[copied[name]].clone() for name in layer_names(student)}
        matrix = torch.randn(width, width, generator=draw) * width**-0.5
        return own | {PROJECTION: matrix, OFFSET: torch.zeros(width)}

    group = Group(
        spec,
        {name: published[name] for name in shared_names(spec) if name not in heads},
        torch.zeros(width),
        {name: published[name] for name in heads},
        [one(taught) for taught in segments(spec.num_layers, count, layers)],
        [torch.tensor(0.5**k) for k in range(count)],
        torch.ones(count),
        torch.zeros(count, LABELS),
        layers,
    )
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((teacher / name).read_bytes())
    write_group(group, folder, {"prefixes": []})
    return folder
