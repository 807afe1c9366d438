"""The account of one memory tier.  In: who takes how many bytes for what.  Out: a balance that never exceeds it."""

from __future__ import annotations

from collections.abc import Mapping

from zinfer.errors import BudgetError, InternalError
from zinfer.plan.records import Tier
from zinfer.units import Bytes, round_up

_FLAGS = {Tier.HOST: "--host-mem", Tier.DEVICE: "--device-mem"}


class Ledger:
    """Bytes of a budget are free, held by a chunk, or reserved by name (KV, activations, staging); none twice.

    A transfer's bytes are taken when it is issued, not when it lands.  `peak_bytes` is the most that was ever held
    and reserved together.  Used from one thread.
    """

    def __init__(self, tier: Tier, capacity_bytes: int, reserved: Mapping[str, int] | None = None) -> None:
        self.tier = tier
        self.capacity_bytes = capacity_bytes
        self.free_bytes = capacity_bytes
        self.peak_bytes = 0
        self.held: dict[int, int] = {}  # key -> bytes
        self.reserved: dict[str, int] = {}  # name -> bytes
        for name, nbytes in (reserved or {}).items():
            self.reserve(name, nbytes)

    @property
    def used_bytes(self) -> int:
        """Held and reserved."""
        return self.capacity_bytes - self.free_bytes

    def take(self, key: int, nbytes: int) -> None:
        """Hold `nbytes` for `key`.  Raises BudgetError ZI-2401 when they are not free."""
        if key in self.held:
            raise InternalError("ZI-0111", f"{self.tier}: chunk {key} takes bytes twice")
        self._spend(f"chunk {key}", nbytes)
        self.held[key] = nbytes

    def give_back(self, key: int) -> None:
        """Free what `key` holds.  Raises InternalError ZI-0112 if it holds nothing."""
        if key not in self.held:
            raise InternalError("ZI-0112", f"{self.tier}: chunk {key} gives back bytes that it does not hold")
        self.free_bytes += self.held.pop(key)

    def reserve(self, name: str, nbytes: int) -> None:
        """Set what is reserved under `name`; 0 frees it.  Raises BudgetError ZI-2401, and nothing has changed."""
        self._spend(name, nbytes - self.reserved.get(name, 0))
        self.reserved[name] = nbytes

    def resize(self, capacity_bytes: int) -> None:
        """Allow more or fewer bytes.  Raises BudgetError ZI-2401 when more are in use, and nothing has changed."""
        more = capacity_bytes - self.capacity_bytes
        if self.free_bytes + more < 0:
            raise BudgetError(
                "ZI-2401",
                f"{Bytes(self.used_bytes)} of {self.tier} memory are in use, a budget of {Bytes(capacity_bytes)} was "
                "asked for",
                remedy=f"{_FLAGS[self.tier]} {round_up(self.used_bytes, 1024) // 1024}KiB",
            )
        self.capacity_bytes, self.free_bytes = capacity_bytes, self.free_bytes + more

    def check(self) -> None:
        """The books balance.  Raises InternalError ZI-0113 if they do not."""
        spent = self.free_bytes + sum(self.held.values()) + sum(self.reserved.values())
        if spent != self.capacity_bytes or min(0, self.free_bytes, *self.held.values()) < 0:
            raise InternalError(
                "ZI-0113",
                f"the {self.tier} ledger is off by {spent - self.capacity_bytes} bytes: capacity "
                f"{self.capacity_bytes}, free {self.free_bytes}, held {self.held}, reserved {self.reserved}",
            )

    def _spend(self, who: str, nbytes: int) -> None:
        if nbytes > self.free_bytes:
            need = self.capacity_bytes + nbytes - self.free_bytes
            raise BudgetError(
                "ZI-2401",
                f"{who} needs {Bytes(nbytes)} of {self.tier} memory, {Bytes(self.free_bytes)} of the "
                f"{Bytes(self.capacity_bytes)} allowed are free",
                remedy=f"{_FLAGS[self.tier]} {round_up(need, 1024) // 1024}KiB",
            )
        self.free_bytes -= nbytes
        self.peak_bytes = max(self.peak_bytes, self.capacity_bytes - self.free_bytes)
