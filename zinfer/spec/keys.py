"""Typed access to config.json.  In: a parsed object.  Out: checked values, or a refusal that names the key."""

from __future__ import annotations

import math
from collections.abc import Mapping

from zinfer.errors import CheckpointError

MISSING = object()


def refuse(code: str, what: str) -> CheckpointError:
    """The error for a config that cannot be meant; all ZI-42xx share this remedy."""
    return CheckpointError(
        code,
        f"config.json: {what}",
        remedy="hf download ORG/NAME config.json --force-download   # then compare it with the one you have",
    )


def shown(value: object) -> str:
    """A stranger's value for a message: control characters escaped, never longer than a line."""
    text = ascii(value[:60] if isinstance(value, str | list | tuple) else value)
    return text if len(text) <= 80 else text[:77] + "..."


class Keys:
    """One object of a config, asked by the commonest name of each key.

    `renames` says what this family calls it, `defaults` what an absent key means there (published configs leave
    out what equals their class's default).  An explicit null counts as absent wherever null is not allowed.
    """

    def __init__(
        self,
        config: Mapping[str, object],
        renames: Mapping[str, str] | None = None,
        defaults: Mapping[str, object] | None = None,
        prefix: str = "",
    ) -> None:
        self.config = config
        self.renames = renames or {}
        self.defaults = defaults or {}
        self.prefix = prefix

    def name(self, term: str) -> str:
        """What the config calls `term`, for messages."""
        return self.prefix + self.renames.get(term, term)

    def has(self, term: str) -> bool:
        """Whether the config says anything but null."""
        return self.config.get(self.renames.get(term, term)) is not None

    def raw(self, term: str, default: object = MISSING) -> object:
        """The value as it stands, else the family's default, else `default`.  Raises ZI-4202 where there is none."""
        value = self.config.get(self.renames.get(term, term))
        if value is None:
            value = self.defaults.get(term, default)
        if value is MISSING:
            raise refuse("ZI-4202", f"the key {self.name(term)} is missing")
        return value

    def count(self, term: str, most: int, default: object = MISSING, least: int = 1) -> int:
        """A whole number from `least` to `most`.  Raises ZI-4203 (not a number) or ZI-4204 (out of range)."""
        value = self.raw(term, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise refuse("ZI-4203", f"{self.name(term)} is {shown(value)}, a whole number was wanted")
        if not least <= value <= most:
            raise refuse("ZI-4204", f"{self.name(term)} is {shown(value)}, {least} to {most} was wanted")
        return value

    def number(self, term: str, low: float, high: float, default: object = MISSING) -> float:
        """A finite number in [low, high].  Raises ZI-4203 or ZI-4204."""
        value = self.raw(term, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise refuse("ZI-4203", f"{self.name(term)} is {shown(value)}, a number was wanted")
        if not low <= value <= high:
            raise refuse("ZI-4204", f"{self.name(term)} is {shown(value)}, {low:g} to {high:g} was wanted")
        return float(value)

    def flag(self, term: str, default: object = MISSING) -> bool:
        """True or false.  Raises ZI-4203."""
        value = self.raw(term, default)
        if not isinstance(value, bool):
            raise refuse("ZI-4203", f"{self.name(term)} is {shown(value)}, true or false was wanted")
        return value

    def word(self, term: str, choices: Mapping[str, str], default: object = MISSING) -> str:
        """One of `choices`, translated.  Raises ZI-4203 or ZI-4205 (a choice zinfer does not know)."""
        value = self.raw(term, default)
        if not isinstance(value, str):
            raise refuse("ZI-4203", f"{self.name(term)} is {shown(value)}, a word was wanted")
        if value not in choices:
            raise refuse(
                "ZI-4205", f"{self.name(term)} is {shown(value)}, one of {', '.join(choices)} was wanted"
            )
        return choices[value]

    def numbers(self, term: str, length: int) -> tuple[float, ...]:
        """A list of exactly `length` positive finite numbers.  Raises ZI-4203."""
        value = self.raw(term)
        is_numbers = isinstance(value, list | tuple) and all(
            isinstance(item, int | float) and not isinstance(item, bool) and 0 < item < math.inf
            for item in value
        )
        if not is_numbers or len(value) != length:  # type: ignore[arg-type]
            raise refuse(
                "ZI-4203", f"{self.name(term)} is {shown(value)}, {length} positive numbers were wanted"
            )
        return tuple(float(item) for item in value)  # type: ignore[attr-defined]

    def ids(self, term: str) -> tuple[int, ...]:
        """Token ids: a number, a list of them, or null.  Raises ZI-4203."""
        value = self.raw(term, None)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids):
            raise refuse("ZI-4203", f"{self.name(term)} is {shown(value)}, token ids were wanted")
        return tuple(ids)

    def section(self, term: str) -> Mapping[str, object]:
        """A nested object; empty where absent.  Raises ZI-4203."""
        value = self.raw(term, {})
        if not isinstance(value, dict):
            raise refuse("ZI-4203", f"{self.name(term)} is {shown(value)}, an object was wanted")
        return value
