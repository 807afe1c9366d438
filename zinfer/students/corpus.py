"""What a distillation learns from.  In: a table.  Out: texts as ids, class numbers if there are any, three splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from zinfer.errors import CheckpointError
from zinfer.tables import Row, read_table, text_of
from zinfer.tokenizer import Encoded, Text, Tokenizer, encode_texts

SHARES = {"dev": 0.1, "held": 0.1}  # of the texts; the rest is trained on
LEAST = 8  # texts that each split must have


@dataclass(frozen=True)
class Corpus:
    """Texts in the order of the file.

    `train`, `held` (line search, calibration) and `dev` (every figure that is reported) are numbers of texts.  Equal
    texts are in one split, whatever their order, or all texts of one origin are.  `digest` stands for all of it.
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
    split_column: str | None = None,
) -> Corpus:
    """Read a table; `label_column` None: without labels, the teacher's word is enough.

    `split_column` says what a text is from (a file, an author): texts of one origin are in one split, so that held and
    dev texts stand for what is new and not for more of the same.

    Raises CheckpointError ZI-4936 (a label that is no class of the teacher), ZI-4937 (one class only), ZI-4938 (too
    few texts), ZI-4940 (a row that does not say what it is from), and what `read_table`, `text_of` and `encode_texts`
    raise.
    """
    texts: list[Text] = []
    labels: list[int] = []
    origins: list[str] = []
    for row in read_table(path):
        texts.append(text_of(row, path, text_column, pair_column))
        if label_column is not None:
            labels.append(_class(row.fields.get(label_column), classes, path, row.line))
        if split_column is not None:
            origins.append(_origin(row, path, split_column))
    if labels and len(set(labels)) == 1:
        raise CheckpointError(
            "ZI-4937",
            f"{path}: every row has the label {classes[labels[0]]!r}",
            remedy="give rows of at least two classes, or leave --label-column out",
        )
    digest = xxhash.xxh3_128()
    places = [_place(one, seed) for one in origins or texts]
    splits: dict[str, list[int]] = {"train": [], "held": [], "dev": []}
    for number, (text, place) in enumerate(zip(texts, places, strict=True)):
        own = (text, labels[number] if labels else None, *origins[number : number + 1])
        digest.update(repr(own).encode("utf-8", "surrogatepass"))
        bound = SHARES["dev"]
        name = "dev" if place < bound else "held" if place < bound + SHARES["held"] else "train"
        splits[name].append(number)
    if min(map(len, splits.values())) < LEAST:
        sizes = ", ".join(f"{len(numbers)} {name}" for name, numbers in splits.items())
        raise CheckpointError(
            "ZI-4938",
            f"{path} has {len(texts)} rows ({sizes}); at least {LEAST} in each part were wanted",
            remedy="give a few hundred different texts or more"
            + (f", and --split-column a column of more than {len(set(origins))} values" if origins else ""),
        )
    encoded = encode_texts(tokenizer, texts, max_tokens)
    return Corpus(encoded, labels or None, **splits, digest=digest.hexdigest())


def _place(text: Text, seed: int) -> float:
    """A number in [0, 1) that a text, or what it is from, has for itself."""
    return xxhash.xxh3_64_intdigest(repr(text).encode("utf-8", "surrogatepass"), seed) / 2**64


def _origin(row: Row, path: Path, column: str) -> str:
    """What a row is from, as it stands there.  Raises CheckpointError ZI-4940."""
    value = row.fields.get(column)
    if isinstance(value, str | int) and value != "":
        return str(value)
    raise CheckpointError(
        "ZI-4940",
        f"{path} line {row.line} has {value!r:.60} in {column!r}; a name or number of what the text is from was wanted",
        remedy="--split-column a column that every row has, or none: texts are then split by themselves",
    )


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
