"""Engines by turns.  In: a folder that they share, an order.  Out: one of them works at a time, for some passes.

A disk and a processor that others use too drift within minutes: engines that run one after the other meet different
machines.  Whoever's turn it is runs its passes while the others wait between two of theirs, so drift falls on all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Order:
    """Whose turn it is, kept in a file: a place in `names`, which are gone through again and again.

    Only the one whose turn it is moves on; who has ended (`leave`) is passed over.
    """

    folder: Path
    names: tuple[str, ...]

    def begin(self) -> None:
        """The first one's turn, and nobody has ended."""
        for file in self.folder.glob("left-*"):
            file.unlink()
        self._write(0)

    def is_on(self, name: str) -> bool:
        """Whether it is that engine's turn."""
        return self.names[self._place() % len(self.names)] == name

    def move_on(self) -> None:
        """The next one's turn, if there is one that has not ended."""
        place = self._place()
        for further in range(place + 1, place + 1 + len(self.names)):
            if not self._left(self.names[further % len(self.names)]).exists():
                self._write(further)
                return

    def leave(self, name: str) -> None:
        """An engine has ended, well or not; said by whoever started it."""
        self._left(name).touch()
        if self.is_on(name):
            self.move_on()

    def _left(self, name: str) -> Path:
        return self.folder / f"left-{name}"

    def _place(self) -> int:
        return int((self.folder / "turn").read_text())

    def _write(self, place: int) -> None:
        fresh = self.folder / "turn.new"
        fresh.write_text(str(place))
        fresh.replace(self.folder / "turn")


class Turn:
    """One engine's side: `wait` for the first turn, say what has `passed`; `waited_s` belongs to nobody's passes."""

    def __init__(self, name: str, passes: int, order: Order) -> None:
        self.waited_s = 0.0
        self._name, self._passes, self._order = name, passes, order
        self._done = 0

    def wait(self) -> None:
        """Until it is this engine's turn."""
        began = time.perf_counter()
        while not self._order.is_on(self._name):
            time.sleep(_POLL_S)
        self.waited_s += time.perf_counter() - began

    def passed(self, passes: int) -> None:
        """So many passes in all have been made: perhaps the next one's turn."""
        if passes - self._done >= self._passes:
            self._done = passes
            self._order.move_on()
            self.wait()


class Alone(Turn):
    """Nobody else runs."""

    def __init__(self) -> None:
        self.waited_s = 0.0

    def wait(self) -> None:
        """At once."""

    def passed(self, passes: int) -> None:
        """Go on."""


def turn_of(options: dict[str, Any]) -> Turn:
    """What a job's options say: `turn` {"folder", "names", "name", "passes"}, or nothing."""
    found = options.get("turn")
    if found is None:
        return Alone()
    return Turn(found["name"], found["passes"], Order(Path(found["folder"]), tuple(found["names"])))


def options_of(order: Order, name: str, passes: int) -> dict[str, Any]:
    """What `turn_of` reads."""
    return {"folder": str(order.folder), "names": list(order.names), "name": name, "passes": passes}


def order_of(weights: Sequence[tuple[str, int]]) -> tuple[str, ...]:
    """Names, each as often as its weight says, one of each in turn."""
    most = max(weight for _, weight in weights)
    return tuple(name for at in range(most) for name, weight in weights if at < weight)
