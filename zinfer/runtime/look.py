"""Look at something that takes a while, beside other work.  In: how to look.  Out: what was seen, once it is needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from zinfer.config.machine import Machine, There
from zinfer.memory.nvme import SWITCH_INTERVAL
from zinfer.memory.there import memory_there
from zinfer.units import GIB

_MEMORY_S = 0.2  # of finding memory that is there: nearly 2 GB
_LEAST_BYTES = GIB  # for a look to be worth it: what finding less takes, guests keep from the first token
_MOST_RATE = 4e9  # fresh memory that comes faster holds nobody up
_STAYS_S = 3.0  # free memory goes back to the host of a virtual machine from some two seconds on


class Look:
    """A thread that looks at the machine once, from now on; `machine` waits for it.  Any thread may ask.

    What it raised is raised by every `machine`.  The thread ends by itself; `end` waits for that.  Until then a busy
    thread keeps the interpreter for a shorter time: who plans meanwhile would else hold up every read.
    """

    def __init__(self, look: Callable[[], Machine]) -> None:
        self._look = look
        self._seen: Machine | None = None
        self._error: BaseException | None = None
        self._end_s = 0.0
        self._thread = threading.Thread(target=self._run, name="zinfer-look")
        SWITCH_INTERVAL.hold()
        self._thread.start()

    def machine(self) -> Machine:
        """What was seen, without the free memory that may be gone by now."""
        self.end()
        if self._error is not None:
            raise self._error
        assert self._seen is not None, "a look ends with what was seen or an error"
        if time.monotonic() - self._end_s > _STAYS_S and self._seen.there.nbytes:
            self._seen = self._seen.model_copy(update={"there": There()})
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
            self._end_s = time.monotonic()
            SWITCH_INTERVAL.let_go()


def look_at(machine: Machine, files: Sequence[Path], memory_bytes: int) -> Machine:
    """The machine with its disk as it is now (`files`; none: no look) and the free memory that is still there.

    `memory_bytes` of it would be used at most, where that is worth a look.
    """
    from zinfer.memory.measure import for_files

    machine = for_files(machine, files)
    if not is_worth_a_look(machine, memory_bytes):
        return machine
    # Not at once: beside who finds memory, and who plans, a disk's reads are a tenth slower on two cores.
    return machine.model_copy(update={"there": memory_there(memory_bytes, _MEMORY_S)})


def is_worth_a_look(machine: Machine, memory_bytes: int) -> bool:
    """Whether a first pass may wait for so much memory, if it is fresh."""
    fresh = machine.fresh_bytes_per_s
    return memory_bytes >= _LEAST_BYTES and fresh is not None and fresh < _MOST_RATE
