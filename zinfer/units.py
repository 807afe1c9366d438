"""Units.  In: "20GiB", "20G", "20GB", 123.  Out: Bytes, an int that prints in GiB, and rates that print in GB/s."""

from __future__ import annotations

import re
from fractions import Fraction

from zinfer.errors import UsageError

KIB, MIB, GIB = 2**10, 2**20, 2**30
_FACTORS = {
    "": 1,
    "b": 1,
    "k": KIB,
    "kib": KIB,
    "kb": 10**3,
    "m": MIB,
    "mib": MIB,
    "mb": 10**6,
    "g": GIB,
    "gib": GIB,
    "gb": 10**9,
    "t": 2**40,
    "tib": 2**40,
    "tb": 10**12,
}
_SIZE = re.compile(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([a-zA-Z]*)\s*")


class Bytes(int):
    """A number of bytes.  G and GiB are binary, GB is decimal; printed in the binary unit that reads best."""

    @classmethod
    def parse(cls, text: str | int) -> Bytes:
        """Read "20GiB", "1.5G", "20GB" or a plain integer.

        Raises UsageError ZI-1001 on anything else, negative numbers included.
        """
        if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
            return cls(text)
        match = _SIZE.fullmatch(str(text))
        if match is None or match[2].lower() not in _FACTORS:
            raise UsageError(
                "ZI-1001",
                f"a size was wanted, {text!r} was given",
                remedy="write 20GiB or 20G (binary), 20GB (decimal), or a whole number of bytes",
            )
        return cls(int(Fraction(match[1]) * _FACTORS[match[2].lower()]))

    def __str__(self) -> str:
        for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
            if abs(self) >= factor:
                return f"{int(self) / factor:.2f} {unit}"
        return f"{int(self)} B"


def rate_text(bytes_per_s: float) -> str:
    """A transfer rate for people: decimal GB/s, as disks and links are sold."""
    return f"{bytes_per_s / 1e9:.2f} GB/s" if bytes_per_s >= 1e8 else f"{bytes_per_s / 1e6:.1f} MB/s"


def seconds_text(seconds: float) -> str:
    """A duration for people: 940 us, 12.3 ms, 4.2 s, 3:07, 2:10:00."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 60:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple
