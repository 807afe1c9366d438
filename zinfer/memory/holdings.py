"""What a manager has and has done.  Frozen records: the tiers and movers it owns, and its totals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

from zinfer.errors import InternalError
from zinfer.memory.ledger import Ledger
from zinfer.memory.links import LinkLog
from zinfer.memory.nvme import Files, Reader
from zinfer.memory.pinning import Locked, Pinning
from zinfer.memory.residency import Residency, State
from zinfer.memory.rows import RowReader
from zinfer.memory.tier import TierMemory
from zinfer.memory.transfer import Transfer
from zinfer.plan.records import Tier


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """What was moved, waited for and held since the manager was made."""

    link_bytes: dict[str, int]
    num_fetches: int
    wait_s: float
    peak_bytes: dict[str, int]  # tier -> held and reserved together
    surprises: int
    locked_bytes: int = 0  # page-locked for a device


@dataclass(frozen=True, slots=True)
class Memory:
    """What a manager manages and closes: the tiers' memory, and who moves bytes between them."""

    tiers: Mapping[Tier, TierMemory]
    files: Files
    reader: Reader
    rows: RowReader
    transfer: Transfer  # into the compute tier
    log: LinkLog
    locks: tuple[Pinning, ...] = ()  # of page-locked memory

    @property
    def ledgers(self) -> dict[str, Ledger]:
        """Of every tier, and of further devices that the transfer uses, by name."""
        return {str(tier): memory.ledger for tier, memory in self.tiers.items()} | dict(self.transfer.ledgers)

    @property
    def locked(self) -> Locked:
        """Page-locked memory as things stand."""
        return reduce(Locked.plus, (lock.locked for lock in self.locks), Locked(0, 0, True))

    def stats(self, num_fetches: int, wait_s: float, surprises: int) -> MemoryStats:
        """What the log and the ledgers say, beside what the manager has counted."""
        peaks = {name: ledger.peak_bytes for name, ledger in self.ledgers.items()}
        return MemoryStats(self.log.num_bytes, num_fetches, wait_s, peaks, surprises, self.locked.nbytes)

    def check(self, residency: Residency) -> None:
        """Ledgers balance, no live places overlap, states and places agree.  Raises InternalError otherwise."""
        residency.check()
        for ledger in self.ledgers.values():
            ledger.check()
        for tier, memory in self.tiers.items():
            memory.check()
            known = set(residency.chunks(tier, State.ARRIVING, State.RESIDENT, State.LEASED))
            if known != set(memory.places):
                raise InternalError(
                    "ZI-0161", f"{tier}: chunks {known} have states, {set(memory.places)} have bytes"
                )
