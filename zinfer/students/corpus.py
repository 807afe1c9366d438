"""What a distillation learns from.  In: a table.  Out: texts as ids, class numbers if there are any, three splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from zinfer.errors import CheckpointError
from zinfer.tables import read_table, text_of
from zinfer.tokenizer import Encoded, Text, Tokenizer, encode_texts

SHARES = {"dev": 0.1, "held": 0.1}  # of the texts; the rest is trained on
LEAST = 8  # texts that each split must have


@dataclass(frozen=True)
class Corpus:
    """Texts in the order of the file.

    `train`, `held` (line search, calibration) and `dev` (every figure that is reported) are numbers of texts.  Equal
    texts are in one split, whatever their order.  `digest` stands for all of it.
    """

    encoded: list[Encoded]
    labels: list[int] | None
    train: list[int]
    held: list[int]
    dev: list[int]
    digest: str

    def __len__(self) -> int:
        return len(self.encoded)


def read_corpus(
    path: Path,
    tokenizer: Tokenizer,
    max_tokens: int,
    classes: Sequence[str],
    *,
    seed: int,
    text_column: str = "text",
    pair_column: str | None = None,
    label_column: str | None = None,
) -> Corpus:
    """Read a table; `label_column` None: without labels, the teacher's word is enough.

    Raises CheckpointError ZI-4936 (a label that is no class of the teacher), ZI-4937 (one class only), ZI-4938 (too
    few texts), and what `read_table`, `text_of` and `encode_texts` raise.
    """
    texts: list[Text] = []
    labels: list[int] = []
    for row in read_table(path):
        texts.append(text_of(row, path, text_column, pair_column))
        if label_column is not None:
            labels.append(_class(row.fields.get(label_column), classes, path, row.line))
    if labels and len(set(labels)) == 1:
        raise CheckpointError(
            "ZI-4937",
            f"{path}: every row has the label {classes[labels[0]]!r}",
            remedy="give rows of at least two classes, or leave --label-column out",
        )
    digest = xxhash.xxh3_128()
    places = [_place(text, seed) for text in texts]
    splits: dict[str, list[int]] = {"train": [], "held": [], "dev": []}
    for number, (text, place) in enumerate(zip(texts, places, strict=True)):
        digest.update(repr((text, labels[number] if labels else None)).encode("utf-8", "surrogatepass"))
        bound = SHARES["dev"]
        name = "dev" if place < bound else "held" if place < bound + SHARES["held"] else "train"
        splits[name].append(number)
    if min(map(len, splits.values())) < LEAST:
        sizes = ", ".join(f"{len(numbers)} {name}" for name, numbers in splits.items())
        raise CheckpointError(
            "ZI-4938",
            f"{path} has {len(texts)} rows ({sizes}); at least {LEAST} in each part were wanted",
            remedy="give a few hundred different texts or more",
        )
    encoded = encode_texts(tokenizer, texts, max_tokens)
    return Corpus(encoded, labels or None, **splits, digest=digest.hexdigest())


def _place(text: Text, seed: int) -> float:
    """A number in [0, 1) that a text has for itself."""
    return xxhash.xxh3_64_intdigest(repr(text).encode("utf-8", "surrogatepass"), seed) / 2**64


def _class(value: object, classes: Sequence[str], path: Path, line: int) -> int:
    """A label by name, or by number as an int or its digits."""
    if isinstance(value, str) and value in classes:
        return classes.index(value)
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if type(number) is int and 0 <= number < len(classes):
        return number
    raise CheckpointError(
        "ZI-4936",
        f"{path} line {line}: {value!r:.60} is no class of the teacher, which has {', '.join(classes)!s:.200}",
        remedy="leave --label-column out: agreement with the teacher is enough",
    )
