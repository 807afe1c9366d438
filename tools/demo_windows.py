"""Texts of the bundled classifier: windows of standard-library source, each labelled with the package it is from.

Enters: the Python sources of the running interpreter's standard library (found with `sysconfig`).  Leaves: a split by
file, windows of 64 tokens as texts, a tokenizer trained on the training files alone, and hashes that say which corpus
it was.

The library without its tests has few packages of many files, so the twelve classes are the eleven largest packages
and, as the twelfth, the modules that are one file at the top.  About half of the files are kept for the test set.
"""

from __future__ import annotations

import hashlib
import json
import random
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from demo_corpus import SPLIT_PATTERN, is_test, read_source
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TOP = "top-level module"
PACKAGES = (
    *("asyncio", "distutils", "email", "encodings", "idlelib", "importlib", "lib2to3", "multiprocessing"),
    *("tkinter", "turtledemo", "xml"),
)
LABELS = tuple(sorted((*PACKAGES, TOP)))
WINDOW = 64  # tokens of a window, [CLS] and [SEP] among them
LEAST_TOKENS = 24  # a file of fewer has no window
INSTALLED = ("site-packages/", "dist-packages/", "config-", "pydoc_data/")  # not of the library, or tables
PARTS = 64  # of the files that students learn from: what is held out of a distillation are whole ones
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Source:
    """One file: its path in the library, its class, its text."""

    name: str
    label: str
    text: str


@dataclass(frozen=True)
class Split:
    """Files that are learnt from, files that are never seen, files of packages that are no class; which library.

    The label of the last is empty: the teacher never sees them, students may learn what it says of them.
    """

    train: list[Source]
    test: list[Source]
    other: list[Source]
    sha256: str


@dataclass(frozen=True)
class Window:
    """A text, its class, and the file that it is from."""

    text: str
    label: str
    file: str

    def to_row(self) -> dict[str, str]:
        """As a line of JSON."""
        return {"text": self.text, "label": self.label, "file": self.file}


def label_of(name: str) -> str | None:
    """The class of a file of the library; None for a package that is no class."""
    package, _, rest = name.partition("/")
    if not rest:
        return TOP
    return package if package in PACKAGES else None


def load_split(seed: int, num_test: int, root: Path | None = None) -> Split:
    """Draw `num_test` files for the test set, of every class as large a share as of the others."""
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    digest, sources = hashlib.sha256(), []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if is_test(name) or name.startswith(INSTALLED):
            continue
        raw = path.read_bytes()
        text = read_source(raw)
        if text is None or len(text.split()) < LEAST_TOKENS:
            continue
        digest.update(f"{name}\0{hashlib.sha256(raw).hexdigest()}\n".encode())
        sources.append(Source(name, label_of(name) or "", text))
    other = [one for one in sources if not one.label]
    sources = [one for one in sources if one.label]
    draw = random.Random(seed)
    by_label = {label: [one for one in sources if one.label == label] for label in LABELS}
    share, due = num_test / max(len(sources), 1), 0.0
    test: list[Source] = []
    for found in by_label.values():
        draw.shuffle(found)
        due += share * len(found)
        count = round(due) - len(test)
        test += found[:count]
    held = {one.name for one in test}
    train = [one for one in sources if one.name not in held]
    return Split(train, sorted(test, key=lambda one: one.name), other, digest.hexdigest())


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with BERT's special tokens, cut off at a window's length."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(word, special=True, normalized=False) for word in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(word, SPECIAL.index(word)) for word in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def windows_of(tokenizer: Tokenizer, source: Source, *, stride: int, most: int, seed: int) -> list[Window]:
    """At most `most` windows of a file, drawn with a seed, `stride` tokens apart.

    A window begins where a word does, so that its text by itself is cut into the same tokens, and runs on to the end of
    a word: cut off at WINDOW it is full, but where it ends in white space.  The last windows of a file may be shorter.
    """
    encoded = tokenizer.encode(source.text, add_special_tokens=False)
    starts, words, inner = [at for at, _ in encoded.offsets], encoded.word_ids, WINDOW - 2
    is_word = [at == 0 or words[at] != words[at - 1] for at in range(len(starts))]
    found, due = [], 0
    for at in range(len(starts)):
        if at < due or not is_word[at]:
            continue
        stop = next((end for end in range(at + inner, len(starts)) if is_word[end]), len(starts))
        text = source.text[starts[at] : starts[stop] if stop < len(starts) else None]
        if stop - at >= LEAST_TOKENS and text.strip():
            found.append(Window(text, source.label, source.name))
        due = at + stride
    draw = random.Random(f"{seed}/{source.name}")
    kept = sorted(draw.sample(range(len(found)), min(most, len(found))))
    return [found[number] for number in kept]


def part_of(file: str) -> int:
    """Which of PARTS a file, or a window spliced of two, belongs to: a number that it has for itself."""
    return int(hashlib.sha256(file.split(" ", 1)[0].encode()).hexdigest()[:8], 16) % PARTS


def spliced(windows: Sequence[Window], count: int, seed: int) -> list[Window]:
    """Windows that begin as one and go on as another, without a label: of these the teacher is less sure.

    Of windows that it was trained on a teacher says little more than their label; what it makes of others is what
    students have to learn.  Both are of files of one part, so that a part can be held out as a whole.
    """
    draw, found = random.Random(f"{seed}/splice"), []
    by_part: dict[int, list[Window]] = {}
    for one in windows:
        by_part.setdefault(part_of(one.file), []).append(one)
    for _ in range(count):
        one = draw.choice(windows)
        other = draw.choice(by_part[part_of(one.file)])
        part = draw.uniform(0.2, 0.8)
        found.append(
            Window(one.text[: round(part * len(one.text))] + other.text, "", f"{one.file} {other.file}")
        )
    return found


def write_rows(path: Path, windows: Sequence[Window], *, with_part: bool = False) -> None:
    """JSON lines, which say on demand what part of the files each window is of."""
    rows = [one.to_row() | ({"part": part_of(one.file)} if with_part else {}) for one in windows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
