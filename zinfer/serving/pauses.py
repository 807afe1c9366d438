"""No long pauses of the collector.  In: a process that has loaded.  Out: what lives on is not looked at again."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PARTS = 2_000  # more objects than before, before the young ones are looked at; Python's own is 700


@contextmanager
def few_pauses() -> Iterator[Callable[[], None]]:
    """Yield what to call once everything that stays is loaded; until the block ends the collector passes over it.

    A full collection goes through every object of the process, modules and all: a tenth of a second in which nothing
    is answered, every few hundred requests.  What comes later is collected as ever, but not in the middle of every
    answer: one has some hundreds of parts, which is as many as make Python look for garbage.  With ten times as many
    the oldest are looked at too seldom: a thousand connections then take 35 MiB more.
    """
    often = gc.get_threshold()

    def settle() -> None:
        gc.collect()
        gc.freeze()
        gc.set_threshold(_PARTS, *often[1:])

    try:
        yield settle
    finally:
        gc.set_threshold(*often)
        gc.unfreeze()
