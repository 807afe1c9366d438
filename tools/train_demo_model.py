"""Train the bundled demo model on the Python standard library's source, on two CPU cores.

Enters: the standard library of the running interpreter.  Leaves: a Hugging Face folder (config.json,
generation_config.json, tokenizer.json, tokenizer_config.json, model.safetensors in bf16), the held-out slice
`heldout.txt`, and `RECORD.json` that says what was trained on what, for how long, and how good it is.

    python tools/train_demo_model.py --out zinfer/assets/demo

The learning rate is warmed up, kept, and let down to zero over the last part of the steps; up to where it is
let down a run does not depend on `--steps`.  `--resume` goes on from the last checkpoint of a broken run.
The matrices of the layers are trained with Muon, the embedding and the norms with AdamW.  On cores shared
with other work, GOMP_SPINCOUNT=20000 in the environment keeps the two threads from spinning against it.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from demo_corpus import Corpus, encode_documents, load_corpus, train_tokenizer
from demo_eval import bits_per_byte, evaluate
from demo_model import DemoConfig, DemoModel, export_folder
from torch import Tensor


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line (or `words`); the defaults are the settings of the shipped model."""
    parser = argparse.ArgumentParser(description="Train the bundled demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the exported model")
    work = Path(tempfile.gettempdir()) / "zinfer-demo-model"
    parser.add_argument("--work", type=Path, default=work, help="folder of checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--length", type=int, default=1024, help="tokens in a sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step")
    parser.add_argument("--micro-batch", type=int, default=2, help="sequences in one forward pass")
    parser.add_argument("--muon-lr", type=float, default=0.005)
    parser.add_argument("--adam-lr", type=float, default=0.003)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warmup", type=int, default=40)
    parser.add_argument(
        "--decay-share", type=float, default=0.25, help="share of steps letting the rate down"
    )
    parser.add_argument("--remark", default="", help="a remark on the run, for the record")
    parser.add_argument("--stop-after", type=int, default=0, help="stop after so many steps, for trials")
    for name, value in vars(DemoConfig()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    return parser.parse_args(words)


def rate(step: int, args: argparse.Namespace) -> float:
    """Return the factor on the learning rates at `step`: warm-up, then stable, then linear to zero."""
    left: float = (args.steps - step) / max(1.0, args.decay_share * args.steps)
    warm: float = (step + 1) / args.warmup
    return min(1.0, warm, left)


class Batches:
    """Sequences of the encoded documents; the order of an epoch is a function of the seed and the epoch."""

    def __init__(self, documents: list[np.ndarray], args: argparse.Namespace) -> None:
        self.documents = documents
        self.args = args
        self.per_epoch = sum(map(len, documents)) // args.length - 1
        self.epoch = -1
        self.stream = np.zeros(0, dtype=np.int32)
        self.order = np.zeros(0, dtype=np.int64)

    def _begin(self, epoch: int) -> None:
        rng = np.random.default_rng((self.args.seed, epoch))
        shuffled = [self.documents[i] for i in rng.permutation(len(self.documents))]
        self.stream = np.roll(np.concatenate(shuffled), int(rng.integers(self.args.length)))
        self.order = rng.permutation(self.per_epoch)
        self.epoch = epoch

    def sequence(self, number: int) -> np.ndarray:
        """Return the `number`-th sequence of the run, length + 1 ids."""
        epoch, place = divmod(number, self.per_epoch)
        if epoch != self.epoch:
            self._begin(epoch)
        start = int(self.order[place]) * self.args.length
        return self.stream[start : start + self.args.length + 1]

    def step(self, step: int) -> Tensor:
        """Return the ids of one step, [batch, length + 1]."""
        first = step * self.args.batch
        rows = [self.sequence(number) for number in range(first, first + self.args.batch)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def make_optimizers(model: DemoModel, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest; each group keeps its full rate as `base`."""
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    muon = torch.optim.Muon(
        matrices, lr=args.muon_lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    optimizers: list[torch.optim.Optimizer] = [muon, adam]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base"] = group["lr"]
    return optimizers


def train_step(
    model: DemoModel, optimizers: list[torch.optim.Optimizer], ids: Tensor, factor: float, micro_batch: int
) -> float:
    """Do one optimizer step; return the mean loss in nats per token."""
    pieces = torch.split(ids, micro_batch)
    total = 0.0
    for piece in pieces:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(piece[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), piece[:, 1:].flatten()) / len(pieces)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total


def save_checkpoint(
    path: Path, model: DemoModel, optimizers: list[torch.optim.Optimizer], step: int, seconds: float
) -> None:
    """Write a checkpoint; the old one is replaced only by a complete new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    states = [optimizer.state_dict() for optimizer in optimizers]
    content = {"model": model.state_dict(), "optimizers": states, "step": step, "seconds": seconds}
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    partial.replace(path)


def train(model: DemoModel, batches: Batches, heldout: list[int], args: argparse.Namespace) -> float:
    """Run the steps, printing progress; return the seconds spent, those before a resumption included."""
    optimizers = make_optimizers(model, args)
    checkpoint = args.work / "checkpoint.pt"
    start, before = 0, 0.0
    if args.resume and checkpoint.exists():
        content = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(content["model"])
        for optimizer, state in zip(optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        start, before = content["step"], content["seconds"]
    began = time.monotonic()
    end = min(args.steps, args.stop_after or args.steps)
    losses: list[float] = []
    for step in range(start, end):
        losses.append(train_step(model, optimizers, batches.step(step), rate(step, args), args.micro_batch))
        spent = time.monotonic() - began
        if (step + 1) % 20 == 0:
            per_step = spent / (step + 1 - start)
            speed, left = args.batch * args.length / per_step, per_step * (end - step - 1)
            mean = sum(losses[-20:]) / len(losses[-20:])
            rates = f"{speed:.0f} tok/s ETA {left / 60:.1f} min"
            print(f"step {step + 1}/{end} loss {mean:.3f} {rates}", flush=True)
        if (step + 1) % 100 == 0 or step + 1 == end:
            save_checkpoint(checkpoint, model, optimizers, step + 1, before + spent)
            with torch.autocast("cpu", torch.bfloat16):
                bits = bits_per_byte(model, heldout, args.heldout_bytes)
            print(f"step {step + 1} held-out bits/byte {bits:.4f} after {before + spent:.0f} s", flush=True)
    return before + time.monotonic() - began


def changed_arguments(args: argparse.Namespace) -> str:
    """Return the arguments that bear on the result and are not at their default, as on a command line."""
    usual = vars(parse_arguments(["--out", "OUT"]))
    personal = {"out", "work", "resume", "remark", "heldout_bytes"}
    changed = {k: v for k, v in vars(args).items() if k not in personal and v != usual[k]}
    return "".join(f" --{name.replace('_', '-')} {value}" for name, value in changed.items())


def make_record(
    args: argparse.Namespace, corpus: Corpus, config: DemoConfig, seconds: float
) -> dict[str, Any]:
    """Return what RECORD.json says of the corpus and the run."""
    hyper = (
        "batch",
        "micro_batch",
        "length",
        "muon_lr",
        "adam_lr",
        "weight_decay",
        "warmup",
        "decay_share",
        "steps",
    )
    return {
        "corpus": {
            "source": "the standard library of the Python below, without tests and generated tables",
            "files": corpus.files,
            "train_bytes": corpus.train_bytes,
            "sha256_of_sorted_path_sha256_lines": corpus.sha256,
            "heldout_files": corpus.heldout_files,
            "licence": "heldout.txt: CPython, Copyright (c) Python Software Foundation, PSF-2.0",
        },
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seed": args.seed,
        "hyperparameters": {name: getattr(args, name) for name in hyper} | vars(config),
        "tokens_seen": args.steps * args.batch * args.length,
        "train_seconds": round(seconds),
        "remark": args.remark,
    }


def main() -> None:
    """Train, export, evaluate the exported folder, and write the record."""
    args = parse_arguments()
    torch.set_num_threads(2)
    torch.manual_seed(args.seed)
    corpus = load_corpus(args.seed)
    args.heldout_bytes = len(corpus.heldout.encode())
    tokenizer = train_tokenizer(corpus.train, args.vocab_size)
    config = DemoConfig(**{name: getattr(args, name) for name in vars(DemoConfig())})
    model = DemoModel(config)
    parameters = sum(p.numel() for p in model.parameters())
    batches = Batches(encode_documents(tokenizer, corpus.train), args)
    print(f"{parameters} parameters, {batches.per_epoch * args.length} tokens in an epoch", flush=True)
    seconds = train(model, batches, tokenizer.encode(corpus.heldout).ids, args)
    export_folder(model, tokenizer, args.out)
    (args.out / "heldout.txt").write_bytes(corpus.heldout.encode())
    record = make_record(args, corpus, config, seconds) | {"parameters": parameters, **evaluate(args.out)}
    record["command"] = "python tools/train_demo_model.py --out OUT" + changed_arguments(args)
    (args.out / "RECORD.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
