"""The writing end of the store: every call that changes the disk, in one place, so that a test can make it fail."""

from __future__ import annotations

import fcntl
import os
import tempfile
from contextlib import suppress
from pathlib import Path


class Disk:
    """Positioned writes, syncs and renames.  Each method is one step that may fail or be the last one ever taken."""

    def open(self, path: Path) -> int:
        """A descriptor to read and write `path`, made if it is not there; never through a link."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)

    def scratch(self, folder: Path) -> int:
        """A descriptor of a new file without a name in `folder`: nothing is left of it when it is closed."""
        with suppress(OSError):  # not every file system makes nameless files
            return os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
        fd, name = tempfile.mkstemp(prefix="zinfer-", suffix=".scratch", dir=folder)
        os.unlink(name)  # noqa: PTH108
        return fd

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        """Write at an offset; returns how many bytes were taken, perhaps fewer than given."""
        return os.pwrite(fd, data, offset)

    def truncate(self, fd: int, nbytes: int) -> None:
        """Cut the file to a length, or lengthen it."""
        os.ftruncate(fd, nbytes)

    def sync(self, fd: int) -> None:
        """Return when the file's bytes are on the disk; they need not stay in memory."""
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def rename(self, old: Path, new: Path) -> None:
        """Give a file its final name, in one step."""
        old.replace(new)

    def remove(self, path: Path) -> None:
        """Remove a file that may already be gone."""
        path.unlink(missing_ok=True)

    def sync_folder(self, folder: Path) -> None:
        """Return when the folder's names are on the disk."""
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def lock(self, fd: int) -> bool:
        """Take the file for this process until it ends; False where another has it."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def free_bytes(self, folder: Path) -> int:
        """What the file system will still take from this user."""
        status = os.statvfs(folder)
        return status.f_bavail * status.f_frsize

    def write_all(self, fd: int, data: bytes | memoryview, offset: int) -> None:
        """Write everything, however often the system takes only a part."""
        view = memoryview(data)
        while view:
            count = self.write(fd, view, offset)
            view, offset = view[count:], offset + count
