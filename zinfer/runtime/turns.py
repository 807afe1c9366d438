"""Take turns.  In: threads that want the engine, pass after pass.  Out: each of them gets it soon."""

from __future__ import annotations

import threading
from types import TracebackType


class Turns:
    """A re-entrant lock that whoever has just given it back cannot take again before those who wait.

    Python's own locks let the last holder win: a caller who runs pass after pass would keep newcomers out of all of
    them.  Who waits for the lock holds a gate, and the last holder must pass that gate first.
    """

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._lock = threading.RLock()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        if self._owner == threading.get_ident():
            self._lock.acquire()
        else:
            with self._gate:
                self._lock.acquire()
        self._owner = threading.get_ident()
        self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
        self._lock.release()
