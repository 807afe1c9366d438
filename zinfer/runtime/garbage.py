"""No look at old objects while requests run.  In: whoever has requests.  Out: collections that stay short."""

from __future__ import annotations

import gc
import threading


class _OldObjects:
    """While anybody holds them the collector passes over what was there before; then all is as it was.

    A full collection goes through every object of the process, most of them torch's: a tenth of a second, which a
    wide pass of as many milliseconds waits for.  Passing over them and back costs microseconds.  Where somebody has
    frozen objects already nothing is done: they would be let go with ours.
    """

    def __init__(self) -> None:
        self._holders, self._is_ours = 0, False
        self._lock = threading.Lock()

    def hold(self) -> None:
        """What lives now, dead cycles too, is not looked at until everybody has let go."""
        with self._lock:
            if self._holders == 0:
                self._is_ours = gc.get_freeze_count() == 0
                if self._is_ours:
                    gc.freeze()
            self._holders += 1

    def let_go(self) -> None:
        """The last one's call ends it."""
        with self._lock:
            self._holders -= 1
            if self._holders == 0 and self._is_ours:
                gc.unfreeze()


OLD_OBJECTS = _OldObjects()
