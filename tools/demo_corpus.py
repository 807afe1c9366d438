"""Corpus and tokenizer of the bundled demo model.

Enters: the Python sources of the running interpreter's standard library (found with `sysconfig`, never a
fixed path).  Leaves: the training documents, the 64 KiB held-out slice made from files that are never
trained on, hashes that say which corpus it was, and a byte-level BPE tokenizer trained on the training
documents alone.
"""

from __future__ import annotations

import hashlib
import io
import random
import sysconfig
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END_OF_TEXT = "<|endoftext|>"
HELDOUT_BYTES = 65536
# A held-out file is at most this large, so that the slice holds several files and no one dominates it.
HELDOUT_FILE_BYTES = (2048, 24576)
# Directories that hold tests, installed packages or caches; `lib2to3/tests` is covered by "tests".
EXCLUDED_DIRS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
# Generated tables (character maps, help text dumped to a literal): not code, and so predictable that they
# would flatter the held-out figure, so they are in neither half.
GENERATED = ("encodings/", "pydoc_data/", "html/entities.py", "config-", "_sysconfigdata")
# Splits words with one leading mark, digits by up to three, punctuation with its trailing newline, and runs
# of white space less the last blank: indentation so becomes tokens of its own (the Llama 3 pattern).
SPLIT_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Corpus:
    """The split corpus: `train` documents in sorted path order, the held-out slice, and what it came from."""

    train: list[str]
    heldout: str
    heldout_files: list[str]
    files: int
    train_bytes: int
    sha256: str


def is_test(name: str) -> bool:
    """Whether the path of a source says that it is, or lies among, tests."""
    parts = Path(name).with_suffix("").parts
    return any(part in EXCLUDED_DIRS or part.startswith("test_") or part.endswith("_test") for part in parts)


def list_sources(root: Path) -> list[str]:
    """Return the sorted POSIX paths, relative to `root`, of the sources that belong to the corpus."""
    kept = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        if not is_test(name) and not name.startswith(GENERATED):
            kept.append(name)
    return sorted(kept)


def read_source(raw: bytes) -> str | None:
    """Decode a source by its own declared encoding, with newlines as `\\n`; None where it does not decode."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        return raw.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return None


def load_corpus(seed: int, root: Path | None = None) -> Corpus:
    """Read the standard library and split it by file into training documents and the held-out slice."""
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    documents: dict[str, str] = {}
    digest = hashlib.sha256()
    for name in list_sources(root):
        raw = (root / name).read_bytes()
        text = read_source(raw)
        if text is None or not text.strip():
            continue
        documents[name] = text
        digest.update(f"{name}\0{hashlib.sha256(raw).hexdigest()}\n".encode())
    low, high = HELDOUT_FILE_BYTES
    candidates = [name for name, text in documents.items() if low <= len(text) <= high and text.isascii()]
    random.Random(seed).shuffle(candidates)
    held: list[str] = []
    while sum(len(documents[name]) for name in held) < HELDOUT_BYTES:
        held.append(candidates.pop())
    heldout = "".join(documents[name] for name in held)[:HELDOUT_BYTES]
    train = [text for name, text in documents.items() if name not in set(held)]
    train_bytes = sum(len(text.encode()) for text in train)
    return Corpus(train, heldout, held, len(documents), train_bytes, digest.hexdigest())


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train the byte-level BPE tokenizer; `<|endoftext|>` is entry 0 and is put before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(END_OF_TEXT, special=True, normalized=False)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B",
        special_tokens=[(END_OF_TEXT, end_of_text_id(tokenizer))],
    )
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """Return the id of `<|endoftext|>`, which begins every text and ends it."""
    number: int | None = tokenizer.token_to_id(END_OF_TEXT)
    if number is None:
        raise ValueError(f"the tokenizer has no {END_OF_TEXT}")
    return number


def encode_documents(tokenizer: Tokenizer, documents: list[str]) -> list[np.ndarray]:
    """Encode each document as int32 ids, beginning with `<|endoftext|>`."""
    return [np.asarray(item.ids, dtype=np.int32) for item in tokenizer.encode_batch(documents)]
