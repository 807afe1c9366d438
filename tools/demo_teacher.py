"""The bundled classifier's teacher: BERT as a plain torch module, its training, and its Hugging Face form.

Enters: windows as token ids with class numbers.  Leaves: a `BertForSequenceClassification` folder.  Parameter names are
those of Hugging Face's BERT, so the state dict is exported as it stands.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from demo_windows import LABELS, SPECIAL, WINDOW
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

PAD, MASK = SPECIAL.index("[PAD]"), SPECIAL.index("[MASK]")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Shape, in Hugging Face's words, and how it is trained.

    A share `masked` of the tokens is hidden in every step; of each word the hidden token must be guessed, beside the
    class, with weight `guessing`: so that a few hundred files teach words as well as classes.  Before the first step
    the table of words is trained for `bag` epochs by itself (`learn_words`).  In a share `mixed` of the steps windows
    go on as others (`spliced_windows`).  `averaged`: the teacher is the mean of the weights on the way, the share of
    each step falling by this factor; 0: the last weights.
    """

    vocab_size: int = 4096
    hidden_size: int = 64
    intermediate_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    steps: int = 1600
    batch: int = 32
    lr: float = 1.5e-3
    dropout: float = 0.1
    masked: float = 0.15
    guessing: float = 0.2
    smoothing: float = 0.0
    bag: int = 3
    mixed: float = 0.5
    averaged: float = 0.99


class Dense(nn.Module):
    """A product named `dense`, as Hugging Face nests it, and a norm behind a residual."""

    def __init__(self, wide: int, narrow: int, *, has_norm: bool = True) -> None:
        super().__init__()
        self.dense = nn.Linear(wide, narrow)
        if has_norm:
            self.LayerNorm = nn.LayerNorm(narrow, eps=1e-12)


class Layer(nn.Module):
    """One post-norm encoder layer."""

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads, self.rate = config.num_attention_heads, config.dropout
        projections = {name: nn.Linear(width, width) for name in ("query", "key", "value")}
        self.attention = nn.ModuleDict({"self": nn.ModuleDict(projections), "output": Dense(width, width)})
        self.intermediate = Dense(width, config.intermediate_size, has_norm=False)
        self.output = Dense(config.intermediate_size, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, hidden] -> the same."""
        projections: Any = self.attention["self"]
        heads = (*x.shape[:2], self.num_heads, -1)
        q, k, v = (projections[name](x).view(heads).transpose(1, 2) for name in ("query", "key", "value"))
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self._add(x, seen, self.attention["output"])
        return self._add(x, F.gelu(self.intermediate.dense(x)), self.output)

    def _add(self, x: Tensor, inner: Tensor, part: Any) -> Tensor:
        out: Tensor = part.LayerNorm(x + F.dropout(part.dense(inner), self.rate, self.training))
        return out


class Teacher(nn.Module):
    """BERT with a class head, and a guess of hidden tokens through the tied table."""

    def __init__(self, config: TeacherConfig, num_labels: int = len(LABELS)) -> None:
        super().__init__()
        self.config, width = config, config.hidden_size
        tables = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(config.vocab_size, width),
                "position_embeddings": nn.Embedding(WINDOW, width),
                "token_type_embeddings": nn.Embedding(2, width),
                "LayerNorm": nn.LayerNorm(width, eps=1e-12),
            }
        )
        layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        pooler = Dense(width, width, has_norm=False)
        self.bert = nn.ModuleDict(
            {"embeddings": tables, "encoder": nn.ModuleDict({"layer": layers}), "pooler": pooler}
        )
        self.classifier = nn.Linear(width, num_labels)
        # What a layer adds begins small beside the stream: norms behind residuals are slow to train otherwise.
        depth = math.sqrt(2 * config.num_hidden_layers)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                scale = math.sqrt(weight.shape[1]) * (depth if "output.dense" in name else 1)
                nn.init.normal_(weight, std=0.02 if "embeddings" in name else 1 / scale)

    def rows(self, ids: Tensor) -> Tensor:
        """The last layer's rows, [batch, length, hidden]; no row may be padding."""
        bert: Any = self.bert
        tables, rate = bert["embeddings"], self.config.dropout
        places = torch.arange(ids.shape[1])
        x: Tensor = tables["word_embeddings"](ids) + tables["position_embeddings"](places)
        x = F.dropout(tables["LayerNorm"](x + tables["token_type_embeddings"].weight[0]), rate, self.training)
        for layer in bert["encoder"]["layer"]:
            x = layer(x)
        return x

    def classes(self, rows: Tensor) -> Tensor:
        """Class logits of `rows`."""
        bert: Any = self.bert
        pooled = torch.tanh(bert["pooler"].dense(rows[:, 0]))
        logits: Tensor = self.classifier(F.dropout(pooled, self.config.dropout, self.training))
        return logits

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Of a step: the classes (numbers, or a share of each) of windows with hidden tokens, and the hidden tokens."""
        config, bert = self.config, self.bert
        hidden = (torch.rand(ids.shape) < config.masked) & (ids >= len(SPECIAL))
        rows = self.rows(ids.masked_fill(hidden, MASK))
        loss = F.cross_entropy(self.classes(rows), labels, label_smoothing=config.smoothing)
        if config.guessing and hidden.any():
            table: Any = bert["embeddings"]
            guesses = rows[hidden] @ table["word_embeddings"].weight.T
            loss = loss + config.guessing * F.cross_entropy(guesses, ids[hidden])
        return loss


def token_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, cut off at the window's length as BERT's tokenizers do: the last is [SEP]."""
    end = SPECIAL.index("[SEP]")
    found = [encoded.ids for encoded in tokenizer.encode_batch(list(texts))]
    return [ids if len(ids) <= WINDOW else [*ids[: WINDOW - 1], end] for ids in found]


def rate(step: int, config: TeacherConfig) -> float:
    """Learning rate: a linear warm-up over a tenth, then linearly to nothing."""
    warm = max(config.steps // 10, 1)
    return config.lr * min((step + 1) / warm, (config.steps - step) / (config.steps - warm + 1))


def spliced_windows(ids: Tensor, labels: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """Windows [N, L] that go on as another of them from a random place, and the share of each class [N, C].

    CutMix (Yun et al. 2019, arXiv 1905.04899) along a text: a teacher that must say how much of which is in a window
    says more of windows that it has not seen.
    """
    num, length = ids.shape
    place = torch.randint(length // 8, length - length // 8, (num, 1))
    other, share = torch.randperm(num), place / length
    classes = F.one_hot(labels, num_labels).float()
    mixed = torch.where(torch.arange(length) < place, ids, ids[other])
    return mixed, share * classes + (1 - share) * classes[other]


def learn_words(teacher: Teacher, ids_NL: Tensor, labels_N: Tensor, epochs: int) -> None:
    """Train the table of words alone: the classes from the mean of a window's words, a hidden layer behind them.

    What a word says of the class needs no attention and is learnt in seconds; layers that begin on such a table
    need fewer steps.  Three of ten words are left out of every step.
    """
    width, inner = teacher.config.hidden_size, ids_NL.shape[1] - 2
    bert: Any = teacher.bert
    table: Tensor = bert["embeddings"]["word_embeddings"].weight
    head = nn.Sequential(
        nn.Linear(width, width), nn.GELU(), nn.Linear(width, teacher.classifier.out_features)
    )
    optimiser = torch.optim.AdamW([table, *head.parameters()], 3e-3, weight_decay=0.05)
    for _ in range(epochs):
        for taken in torch.randperm(len(ids_NL)).split(128):  # type: ignore[no-untyped-call]
            words = F.layer_norm(F.embedding(ids_NL[taken, 1:-1], table), (width,))
            kept = (torch.rand(words.shape[:2]) > 0.3) / (0.7 * inner)
            loss = F.cross_entropy(head(3 * (words * kept[..., None]).sum(1)), labels_N[taken])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()


def train_teacher(
    ids: Sequence[Sequence[int]],
    labels: Sequence[int],
    config: TeacherConfig,
    seed: int,
    progress: Callable[[int, int, float], None],
) -> Teacher:
    """Train on windows that are full; the others are too few to matter.  Deterministic from `seed` and threads."""
    torch.manual_seed(seed)
    full = [number for number, one in enumerate(ids) if len(one) == WINDOW]
    ids_NL = torch.tensor([list(ids[number]) for number in full])
    labels_N = torch.tensor([labels[number] for number in full])
    teacher = Teacher(config).train()
    learn_words(teacher, ids_NL, labels_N, config.bag)
    decay: Any = get_ema_multi_avg_fn(config.averaged)  # type: ignore[no-untyped-call]
    averaged = AveragedModel(teacher, multi_avg_fn=decay)
    optimiser = torch.optim.AdamW(teacher.parameters(), config.lr, weight_decay=0.05)
    order = torch.empty(0, dtype=torch.long)
    for step in range(config.steps):
        if len(order) < config.batch:
            order = torch.cat((order, torch.randperm(len(full))))
        taken, order = order[: config.batch], order[config.batch :]
        for group in optimiser.param_groups:
            group["lr"] = rate(step, config)
        given, wanted = ids_NL[taken], labels_N[taken]
        if config.mixed and torch.rand(()) < config.mixed:
            given, wanted = spliced_windows(given, wanted, len(LABELS))
        loss = teacher.loss(given, wanted)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimiser.step()
        if config.averaged:
            averaged.update_parameters(teacher)
        progress(step + 1, config.steps, loss.item())
    found: Any = averaged.module if config.averaged else teacher
    return cast(Teacher, found.eval())


def hf_config(config: TeacherConfig) -> dict[str, Any]:
    """The contents of config.json."""
    shape = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {
        "architectures": ["BertForSequenceClassification"],
        "model_type": "bert",
        **{name: getattr(config, name) for name in shape},
        "max_position_embeddings": WINDOW,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-12,
        "initializer_range": 0.02,
        "pad_token_id": PAD,
        "id2label": {str(number): label for number, label in enumerate(LABELS)},
        "label2id": {label: number for number, label in enumerate(LABELS)},
        "torch_dtype": "float32",
    }


def export_folder(teacher: Teacher, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the Hugging Face folder: config, tokenizer, weights in fp32."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(hf_config(teacher.config), indent=2) + "\n"
    (folder / "config.json").write_text(config, encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": WINDOW}
    names = {f"{word[1:-1].lower()}_token": word for word in SPECIAL}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(words | names, indent=2) + "\n", encoding="utf-8"
    )
    state = {name: value.contiguous() for name, value in teacher.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
