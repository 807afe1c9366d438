"""The bundled model: its files, its record, and the held-out figure checked against transformers.

Enters: `zinfer/assets/demo` as shipped.  Leaves: nothing; nothing is trained here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
tokenizers = pytest.importorskip("tokenizers")
demo_eval = pytest.importorskip("demo_eval")
demo_model = pytest.importorskip("demo_model")

DEMO = Path(__file__).resolve().parents[2] / "zinfer" / "assets" / "demo"
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
    "heldout.txt",
    "RECORD.json",
)
MAX_TOTAL_BYTES = 12 * 1024 * 1024
HELDOUT_BYTES = 65536
MAX_BITS_PER_BYTE = 1.6
MIN_SHARE = 0.60
CONTEXT, STRIDE = 1024, 512  # the windows that tools/demo_eval.py defines


def record() -> dict[str, Any]:
    """Return the shipped record."""
    content: dict[str, Any] = json.loads((DEMO / "RECORD.json").read_text(encoding="utf-8"))
    return content


def heldout_ids() -> list[int]:
    """Return the ids of the whole held-out slice, `<|endoftext|>` first."""
    tokenizer = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    ids: list[int] = tokenizer.encode((DEMO / "heldout.txt").read_bytes().decode("utf-8")).ids
    return ids


def oracle() -> Any:
    """Return transformers' LlamaForCausalLM with the shipped weights, in bf16."""
    transformers = pytest.importorskip("transformers", reason="the oracle, transformers, is not installed")
    return transformers.LlamaForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16).eval()


def oracle_bits(model: Any, ids: list[int], size: int) -> float:
    """Score every id but the first once, in windows that move on by STRIDE; return bits per byte."""
    nats, done = 0.0, 1
    for start in range(0, len(ids), STRIDE):
        if done >= len(ids):
            break
        window = torch.tensor(ids[start : start + CONTEXT])
        with torch.no_grad():
            scores = model(window[None]).logits[0, :-1].float().log_softmax(-1)
        chosen = scores.gather(1, window[1:, None])[:, 0]
        nats -= float(chosen[done - start - 1 :].sum())
        done = start + len(window)
    return nats / math.log(2) / size


def test_files_are_there_and_small() -> None:
    """All files of the folder are there, no others are, and they fit the limit together."""
    assert sorted(path.name for path in DEMO.iterdir()) == sorted(FILES)
    assert sum((DEMO / name).stat().st_size for name in FILES) <= MAX_TOTAL_BYTES


def test_record_is_within_the_limits() -> None:
    """The recorded figures meet the requirement, and the record names its origin."""
    figures = record()
    assert 0.5 < figures["heldout_bits_per_byte"] <= MAX_BITS_PER_BYTE
    assert MIN_SHARE <= figures["share_tokenises"] <= figures["share_tokenises_open_at_cut_allowed"] <= 1.0
    assert len(figures["corpus"]["sha256_of_sorted_path_sha256_lines"]) == 64
    for name in ("python", "torch", "seed", "hyperparameters", "tokens_seen", "train_seconds", "command"):
        assert figures[name]


def test_weights_are_a_llama_in_bf16() -> None:
    """The tensors open, are bf16, finite, named as Hugging Face's Llama, and as many as recorded."""
    tensors = safetensors_torch.load_file(DEMO / "model.safetensors")
    config = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    assert sum(tensor.numel() for tensor in tensors.values()) == record()["parameters"]
    assert tensors["model.embed_tokens.weight"].shape == (config["vocab_size"], config["hidden_size"])
    assert len(tensors) == 2 + 9 * config["num_hidden_layers"]


def test_heldout_decodes_and_the_tokenizer_round_trips_it() -> None:
    """The slice is 64 KiB of text that the tokenizer gives back byte for byte."""
    raw = (DEMO / "heldout.txt").read_bytes()
    assert len(raw) == HELDOUT_BYTES
    tokenizer = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    ids = heldout_ids()
    assert ids[0] == tokenizer.token_to_id("<|endoftext|>") and ids[0] not in ids[1:]
    assert tokenizer.decode(ids).encode() == raw
    odd = "π = '\U0001f40d'\t\r\n   x\u00a0 "
    assert tokenizer.decode(tokenizer.encode(odd).ids) == odd


def test_the_judge_can_fail() -> None:
    """Broken lines fail both verdicts; a construct open at the cut fails the strict one only."""
    for good in ("x = 1\n", "def f():\n    return (1,\n            2)\n", 's = """a\nb"""\n'):
        assert demo_eval.judge(good) == demo_eval.Verdict(True, True)
    for bad in ("x = 'open\n", "x = $\n", "if x:\n        y\n    z\n"):
        assert demo_eval.judge(bad) == demo_eval.Verdict(False, False)
    for cut in ("f(1,\n", 's = """a\n'):
        assert demo_eval.judge(cut) == demo_eval.Verdict(False, True)


def test_part_of_the_continuations_tokenise_again() -> None:
    """The first 8 of the 200 continuations, made anew, come near the recorded share."""
    tokenizer = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    strict, _ = demo_eval.share_that_tokenises(demo_model.load_folder(DEMO), tokenizer, text, count=8)
    assert strict == pytest.approx(record()["share_tokenises"], abs=0.35)


def test_transformers_reproduces_the_figure_and_a_broken_matrix_does_not() -> None:
    """The oracle agrees within 1 % on the whole slice; with one matrix zeroed it is far outside."""
    model, ids = oracle(), heldout_ids()
    recorded = record()["heldout_bits_per_byte"]
    assert oracle_bits(model, ids, HELDOUT_BYTES) == pytest.approx(recorded, rel=0.01)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
    tokenizer = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    part = ids[: 2 * CONTEXT]
    assert oracle_bits(model, part, len(tokenizer.decode(part))) > 1.1 * recorded
