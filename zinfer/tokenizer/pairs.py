"""Texts and text pairs for an encoder.  In: str or (str, str).  Out: ids and token types, cut to a length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from zinfer.errors import UsageError
from zinfer.tokenizer.text import Tokenizer, refuse_half_pairs

Text: TypeAlias = str | tuple[str, str]
MAX_CHARS = (
    2**24
)  # of one text: cutting more than that into tokens is seconds of work for a few hundred tokens


@dataclass(frozen=True, slots=True)
class Encoded:
    """One text as an encoder reads it.  `is_cut`: it was longer than allowed, an end was left out."""

    ids: tuple[int, ...]
    types: tuple[int, ...]
    is_cut: bool


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[Text], max_tokens: int, first: int = 0, direction: str = "right"
) -> list[Encoded]:
    """Token ids with the special tokens of the checkpoint; of a pair the longer part is cut first, as upstream.

    What is too long loses its `direction` end: "right", or "left" its beginning.

    An empty text has its special tokens alone.  Raises UsageError ZI-1131 for a text that is no Unicode or has more
    than MAX_CHARS characters, ZI-1132 for one without any token; both name its number, counted from `first`.
    """
    for number, text in enumerate(texts, first):
        _check(text, number)
    found = [Encoded(*one) for one in tokenizer.encode_batch(texts, max_tokens, direction)]
    for number, one in enumerate(found, first):
        if not one.ids:
            raise UsageError(
                "ZI-1132",
                f"text {number} has no token, and this tokenizer adds none",
                remedy="leave empty texts out",
            )
    return found


def _check(text: Text, number: int) -> None:
    for part in (text,) if isinstance(text, str) else text:
        if len(part) > MAX_CHARS:
            raise UsageError(
                "ZI-1131",
                f"text {number} has {len(part)} characters, at most {MAX_CHARS} are taken",
                remedy="cut it into documents of a few thousand words",
            )
        refuse_half_pairs(part, f"text {number}")
