"""The exception tree.  Every error has a numbered code, says what was wanted and what was there, and a remedy."""

from __future__ import annotations


class ZinferError(Exception):
    """Base of everything zinfer raises on purpose.

    `code` is stable ("ZI-4103"), `message` states what was wanted and what was there, `remedy` is the next
    command or change to try.  `exit_code` is what the command line exits with.
    """

    exit_code = 1

    def __init__(self, code: str, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{self.code}  {self.message}"
        return f"{text}\n  try: {self.remedy}" if self.remedy else text

    def to_dict(self) -> dict[str, str | int]:
        """The documented JSON form: code, message, remedy, exit_code."""
        return {
            "code": self.code,
            "message": self.message,
            "remedy": self.remedy,
            "exit_code": self.exit_code,
        }


class InternalError(ZinferError):
    """A rule of our own was broken (a ledger out of balance, an illegal transition): a bug in zinfer."""

    exit_code = 1


class UsageError(ZinferError):
    """ZI-1xxx: a flag, setting, prompt or parameter that cannot be meant."""

    exit_code = 2


class CheckpointError(ZinferError):
    """ZI-4xxx: a model folder, header, index, config or data file that is not what it should be."""

    exit_code = 3


class BudgetError(ZinferError):
    """ZI-2xxx: the memory, disk or context that was allowed does not suffice."""

    exit_code = 4


class MachineError(ZinferError):
    """ZI-5xxx: the machine refuses: no such device, no permission, a read that fails."""

    exit_code = 5


class IntegrityError(ZinferError):
    """ZI-6xxx: bytes differ from what their checksum promised, or a store is unfinished."""

    exit_code = 6


class PartialError(ZinferError):
    """ZI-7xxx: some of the work was done and some was not; says where each part is."""

    exit_code = 7
