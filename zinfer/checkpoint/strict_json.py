"""JSON from strangers.  In: bytes.  Out: one dict; what lenient parsers let through raises ValueError."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NoReturn

MAX_JSON_BYTES = 16 * 2**20
MAX_VALUES = 2_500_000  # 200 000 tensors need 1.8 million; 16 MiB of "[]" would hold 6 million and 500 MB


class DuplicateKeyError(ValueError):
    """The same key stands twice in one object: two readers would see two different files."""


def parse_object(raw: bytes) -> dict[str, Any]:
    """Parse UTF-8 JSON whose top level is an object.

    Raises DuplicateKeyError on a repeated key and ValueError on everything else that is not plain JSON: too
    many bytes or objects, nesting that would exhaust the stack, NaN and Infinity, lone surrogates.
    """
    if len(raw) > MAX_JSON_BYTES:
        raise ValueError(f"{len(raw)} bytes of JSON, the limit is {MAX_JSON_BYTES}")
    # Counted before parsing; text inside strings counts too, which only makes the bound stricter.
    if sum(map(raw.count, (b"[", b"{", b","))) > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES} values")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
        # A lone surrogate parses but can be neither printed nor written again.
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"an object was wanted at the top, it is a {type(value).__name__}")
    return value


def shown(value: object) -> str:
    """A stranger's value for a message: quoted, control characters escaped, never longer than a line."""
    if isinstance(value, dict | list):
        return f"a {type(value).__name__}"
    text = ascii(value[:100] if isinstance(value, str) else value)
    return text if len(text) <= 100 else text[:97] + "..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise DuplicateKeyError(f"the key {shown(twice)} stands twice in one object")
    return result


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")
