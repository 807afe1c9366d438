"""Write a sequence's pages to disk and read them back.  In: planes and slots.  Out: a copy that proves its bytes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from xxhash import xxh3_64

from zinfer.chunks.disk import Disk
from zinfer.errors import MachineError, UsageError


class SpilledCopy:
    """One sequence's committed rows in a file that has no name: when the process ends, however it ends, it is gone.

    Layout: plane by plane, within it layer by layer, keys then values; each such piece holds the rows of all tokens,
    oldest first, and has an XXH3 of its own, so that the pages may be cut otherwise when they come back.
    """

    def __init__(self, fd: int, length: int, nbytes: int, digests: Sequence[bytes]) -> None:
        self._fd = fd
        self.length = length  # tokens
        self.nbytes = nbytes
        self._digests = tuple(digests)

    @classmethod
    def write(
        cls, planes: Sequence[Tensor], slots: Sequence[range], folder: Path, disk: Disk | None = None
    ) -> SpilledCopy:
        """Copy the rows of `slots` of every plane [layers, 2, slots, ...].

        Raises MachineError ZI-5501 when the disk is full or refuses; nothing is left of the copy then.
        """
        disk = disk or Disk()
        fd, offset, digests = -1, 0, []
        try:
            fd = disk.scratch(folder)
            for runs in _pieces(planes, slots):
                digest = xxh3_64()
                for rows in runs:
                    data = _bytes(rows.cpu())
                    disk.write_all(fd, data, offset)
                    digest.update(data)
                    offset += len(data)
                digests.append(digest.digest())
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise MachineError(
                "ZI-5501",
                f"{folder} took {offset} bytes of a sequence's cache pages and then refused: {error.strerror}",
                remedy="--set memory.disk=FOLDER, one with more room",
            ) from error
        except BaseException:
            if fd >= 0:
                os.close(fd)
            raise
        return cls(fd, sum(map(len, slots)), offset, digests)

    def read(self, planes: Sequence[Tensor], slots: Sequence[range]) -> bool:
        """Read everything back into `slots`; False when a byte cannot be read or is not what was written."""
        os.lseek(self._fd, 0, os.SEEK_SET)
        for runs, expected in zip(_pieces(planes, slots), self._digests, strict=True):
            digest = xxh3_64()
            for rows in runs:
                bounce = rows if rows.device.type == "cpu" else torch.empty_like(rows, device="cpu")
                data = _bytes(bounce)
                if not _read_all(self._fd, data):
                    return False
                digest.update(data)
                if bounce is not rows:
                    rows.copy_(bounce)
            if digest.digest() != expected:
                return False
        return True

    def close(self) -> None:
        """Give the disk its bytes back; may be called again."""
        if self._fd >= 0:
            with suppress(OSError):
                os.close(self._fd)
            self._fd = -1


def spill_folder(wanted: str | None, beside: Path) -> Path:
    """Where copies go: the folder of memory.disk, else beside the model, else where the system keeps such files.

    Raises UsageError ZI-1014 when the wanted one is no folder that can be written to.
    """
    if wanted is None:
        return beside if os.access(beside, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    folder = Path(wanted)
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise UsageError(
            "ZI-1014", f"memory.disk = {wanted!r} is no folder to write in", remedy="--set memory.disk=."
        )
    return folder


def _pieces(planes: Sequence[Tensor], slots: Sequence[range]) -> Iterator[list[Tensor]]:
    """For every plane, layer, and keys or values: the contiguous rows of all slots."""
    for plane in planes:
        for layer, kind in product(range(plane.shape[0]), range(plane.shape[1])):
            yield [plane[layer, kind, run.start : run.stop] for run in slots]


def _bytes(rows: Tensor) -> memoryview:
    return rows.view(torch.uint8).view(-1).numpy().data


def _read_all(fd: int, data: memoryview) -> bool:
    while data:
        try:
            count = os.readv(fd, [data])
        except OSError:
            return False
        if not count:
            return False
        data = data[count:]
    return True
