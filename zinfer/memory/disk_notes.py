"""What runs really had of a disk.  In: the rate of passes that waited for it.  Out: the rate to expect of it next.

A profile is hours old, and a look at the opening lasts a twentieth of a second: of a disk that others use both are off
by more than it changes from one minute to the next.  A run whose passes waited for it has read for seconds.  What it
saw is kept in the cache folder, one entry per disk, and counts the less the older it is: a Kalman filter of the
logarithm.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import exp, inf, log

from zinfer.config.load import cache_folder
from zinfer.config.machine import Link
from zinfer.errors import ZinferError
from zinfer.log import logger
from zinfer.whole import written_whole

_RUN = 0.06**2  # variance of a run's rate about the disk's
_DRIFT_PER_S = 0.06**2 / 60  # and of the disk about itself, by what time has passed
_PROFILE = 0.15**2  # of a profile: measured at some other time of some day
_FRESH = 0.09**2  # a minute or two after a run
_FILE = "disks.json"


@dataclass(frozen=True, slots=True)
class Note:
    """A rate, the variance of its logarithm when it was written, and when that was (seconds of Unix time)."""

    bytes_per_s: float
    variance: float
    unix_s: float

    def variance_at(self, now_s: float) -> float:
        """By now; a clock that was set back has changed nothing."""
        return self.variance + _DRIFT_PER_S * max(now_s - self.unix_s, 0.0)


def expected(known: Link, device: str, now: Callable[[], float] = time.time) -> tuple[Link, bool]:
    """The link of a profile with its rate as runs since then make it likely.

    Also whether that is so lately seen that a moment of reads, which is off by twice as much, would add nothing.
    """
    note = _notes().get(device)
    if note is None:
        return known, False
    variance = note.variance_at(now())
    share = _PROFILE / (_PROFILE + variance)
    rate = known.bytes_per_s * exp(share * log(note.bytes_per_s / known.bytes_per_s))
    return known.model_copy(update={"bytes_per_s": rate}), variance < _FRESH


def write_down(device: str, bytes_per_s: float, now: Callable[[], float] = time.time) -> None:
    """A run has ended whose passes had so much of the disk.  Where nothing can be written nothing is."""
    notes, now_s = _notes(), now()
    found = Note(bytes_per_s, _RUN, now_s)
    if (before := notes.get(device)) is not None:
        spread = before.variance_at(now_s)
        gain = spread / (spread + _RUN)
        rate = before.bytes_per_s * exp(gain * log(bytes_per_s / before.bytes_per_s))
        found = Note(rate, (1 - gain) * spread, now_s)
    told = {name: asdict(note) for name, note in (notes | {device: found}).items()}
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with written_whole(cache_folder() / _FILE) as file:
            file.write(json.dumps(told, indent=1).encode() + b"\n")
    except (OSError, ZinferError) as error:
        logger.debug("what passes had of the disk is not kept: %s", error)


def _notes() -> dict[str, Note]:
    """What is there; what cannot be read, or says nothing that can be, is as good as not there."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        told = json.loads((cache_folder() / _FILE).read_text(encoding="utf-8"))
        notes = {str(device): Note(**note) for device, note in told.items()}
        if all(0 < note.bytes_per_s < inf and 0 <= note.variance < inf for note in notes.values()):
            return notes
    return {}
