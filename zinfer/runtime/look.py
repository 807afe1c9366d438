"""Look at something that takes a while, beside other work.  In: how to look.  Out: what was seen, once it is needed."""

from __future__ import annotations

import threading
from collections.abc import Callable

from zinfer.config.machine import Machine
from zinfer.memory.nvme import SWITCH_INTERVAL


class Look:
    """A thread that looks at the machine once, from now on; `machine` waits for it.  Any thread may ask.

    What it raised is raised by every `machine`.  The thread ends by itself; `end` waits for that.  Until then a busy
    thread keeps the interpreter for a shorter time: who plans meanwhile would else hold up every read.
    """

    def __init__(self, look: Callable[[], Machine]) -> None:
        self._look = look
        self._seen: Machine | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="zinfer-look")
        SWITCH_INTERVAL.hold()
        self._thread.start()

    def machine(self) -> Machine:
        """What was seen."""
        self.end()
        if self._error is not None:
            raise self._error
        assert self._seen is not None, "a look ends with what was seen or an error"
        return self._seen

    def end(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._seen = self._look()
        except BaseException as error:
            self._error = error
        finally:
            SWITCH_INTERVAL.let_go()
