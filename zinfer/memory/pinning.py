"""Page-lock host memory for a device.  In: address ranges.  Out: the same ranges, locked as far as the system allows.

torch's own page-locked allocator rounds sizes up to powers of two and keeps what is freed; what streams must be locked
exactly, once, and for as long as the engine lives.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from zinfer.config.limits import lock_limit
from zinfer.log import logger
from zinfer.units import GIB, Bytes

_PORTABLE = 1  # cudaHostRegisterPortable: locked for every device, whichever is current
_REASONS = {
    1: "invalid value",
    2: "out of memory",
    100: "no device",
    712: "locked already",
    801: "not supported",
}


def no_entry() -> None:
    """What a thread does before its first work where nothing has to be done."""


@dataclass(frozen=True, slots=True)
class Locked:
    """What has become of a request: bytes locked so far, of how many, and whether nothing more will come."""

    nbytes: int
    wanted_bytes: int
    is_settled: bool

    def plus(self, other: Locked) -> Locked:
        """Both together."""
        return Locked(
            self.nbytes + other.nbytes,
            self.wanted_bytes + other.wanted_bytes,
            self.is_settled and other.is_settled,
        )


class Pinning:
    """cudaHostRegister in a thread of its own, at most 1 GiB at a time; locking everything at once stalls others.

    A copy may not straddle two registrations, so ranges end at `cuts`: ascending offsets where places begin and end.
    They are locked in that order: whoever cuts the slab puts first what most needs it.  A range that is refused is
    tried in halves, down to one place; what is locked stays locked, and the rest is announced once: copies from
    pageable memory are slow but right.

    The runtime keeps the last error of each thread and shows it to the next kernel launch of that thread, so a
    refusal must not happen in a thread that computes.  `enter` is called first in this one (it makes the device
    current, so that no context is made on another, and moves near it).  `is_quiet`: nobody is told.
    """

    def __init__(
        self,
        address: int,
        cuts: Sequence[int],
        runtime: Any,
        *,
        enter: Callable[[], None] = no_entry,
        is_quiet: bool = False,
    ) -> None:
        self._is_quiet = is_quiet
        self._address = address
        self._runtime = runtime
        self._enter = enter
        self._registered: list[tuple[int, int]] = []  # (address, bytes)
        self._wanted_bytes = cuts[-1] - cuts[0] if cuts else 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(list(cuts),), name="zinfer-pin", daemon=True)
        self._thread.start()

    @property
    def locked(self) -> Locked:
        """As things stand."""
        is_settled = not self._thread.is_alive()  # asked first: what is counted after the end is all there is
        return Locked(sum(nbytes for _, nbytes in list(self._registered)), self._wanted_bytes, is_settled)

    def settle(self) -> Locked:
        """Wait until everything is locked or refused."""
        self._thread.join()
        return self.locked

    def undo(self) -> None:
        """Stop and unregister; must come before the memory is unmapped, and after the last copy has ended.

        In a thread of its own, like the registering: what a lost device answers must not stick to the caller's.
        """
        self._stop.set()
        self._thread.join()
        undoing = threading.Thread(target=self._unregister, name="zinfer-unpin", daemon=True)
        undoing.start()
        undoing.join()

    def _run(self, cuts: list[int]) -> None:
        try:
            self._enter()
            code = self._lock(cuts)
        except Exception as error:  # a thread of its own: nobody else would hear of it
            self._announce(str(error))
            return
        if code and not self._stop.is_set():
            self._announce(f"CUDA error {code}, {_REASONS.get(code, 'see its documentation')}")

    def _lock(self, cuts: list[int]) -> int:
        """Lock range after range; the runtime's answer to the first that it refuses, 0 when there is none."""
        for begin, end in pieces(cuts):
            if self._stop.is_set():
                return 0
            code = int(self._runtime.cudaHostRegister(self._address + begin, end - begin, _PORTABLE))
            if not code:
                self._registered.append((self._address + begin, end - begin))
                continue
            inside = [cut for cut in cuts if begin <= cut <= end]
            if len(inside) > 2:
                half = len(inside) // 2
                for part in (inside[: half + 1], inside[half:]):
                    if refused := self._lock(part):
                        return refused
                continue
            return code
        return 0

    def _announce(self, reason: str) -> None:
        if self._is_quiet:
            return
        locked, limit = self.locked, lock_limit()
        share = locked.nbytes / max(locked.wanted_bytes, 1)
        logger.warning(
            "only %s of %s of host memory (%.0f %%) could be page-locked (%s%s): the rest of the copies to the device "
            "come from pageable memory, expect about half their speed and a busier processor; a smaller --host-mem, "
            "or a larger `ulimit -l`, avoids it",
            Bytes(locked.nbytes),
            Bytes(locked.wanted_bytes),
            100 * share,
            reason,
            "" if limit is None else f"; this process may lock {Bytes(limit)}",
        )

    def _unregister(self) -> None:
        try:
            self._enter()
        finally:
            while self._registered:
                self._runtime.cudaHostUnregister(self._registered.pop()[0])


def pieces(cuts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Join neighbouring cuts to ranges of at most 1 GiB; a single longer one stays whole."""
    begin = cuts[0] if cuts else 0
    for before, after in pairwise(cuts):
        if after - begin > GIB and before > begin:
            yield begin, before
            begin = before
    if cuts and cuts[-1] > begin:
        yield begin, cuts[-1]
