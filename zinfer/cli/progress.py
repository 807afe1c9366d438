"""Progress for people.  In: done, total, what.  Out: a bar with rate and ETA on a terminal, else a line each 10 s."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

import click
from tqdm import tqdm

from zinfer.units import Bytes, rate_text, seconds_text

LINE_EVERY_S = 10.0
FIRST_S = 1.5


class Progress:
    """Call it with (done, total, what) as often as you like; a context manager that cleans up its bar.

    A new `what` starts anew.  Nothing is shown of what ends within a second and a half.
    """

    def __init__(self, unit: str = "B", *, quiet: bool = False) -> None:
        self.is_quiet = quiet
        self._unit = unit
        self._what = ""
        self._bar: tqdm[Any] | None = None
        self._begin_s = self._next_s = 0.0
        self._first = 0  # done when it began: work of an earlier run says nothing about the rate

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.clear()

    def clear(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._what = ""

    def __call__(self, done: int, total: int, what: str, note: str = "") -> None:
        """Show that `done` of `total` are finished, and a note beside it."""
        if self.is_quiet:
            return
        now_s = time.perf_counter()
        if what != self._what:
            self.clear()
            self._what = what
            self._begin_s, self._next_s, self._first = now_s, now_s + FIRST_S, done
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=bool(note))
            self._bar.update(done - self._bar.n)
        elif now_s >= self._next_s:
            self._next_s = now_s + LINE_EVERY_S
            if sys.stderr.isatty():
                self._draw(done, total)
            else:
                self._print_line(done, total, now_s - self._begin_s, note)

    def _draw(self, done: int, total: int) -> None:
        self._bar = tqdm(
            desc=self._what,
            total=total,
            initial=self._first,
            unit=self._unit,
            unit_scale=self._unit == "B",
            unit_divisor=1000,
            leave=False,
            file=sys.stderr,
        )
        self._bar.start_t -= time.perf_counter() - self._begin_s
        self._bar.update(done - self._first)

    def _print_line(self, done: int, total: int, spent_s: float, note: str) -> None:
        rate = (done - self._first) / spent_s
        left = seconds_text((total - done) / rate) if rate else "unknown"
        if self._unit == "B":
            text = f"{Bytes(done)} of {Bytes(total)} at {rate_text(rate)}"
        else:
            text = f"{done} of {total} {self._unit} at {rate:.1f} {self._unit}/s"
        click.echo(f"{self._what}: {text}, eta {left}" + (f", {note}" if note else ""), err=True)
