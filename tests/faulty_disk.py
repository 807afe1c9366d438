"""Disks that fail on cue: at a chosen step they do half of it and stop, or forget what was never synced."""

import errno
import os
import signal

from zinfer.chunks.disk import Disk

STEPS = ("open", "scratch", "write", "truncate", "sync", "rename", "remove", "sync_folder")


def kill(_name):
    """The end of the process, at once."""
    os.kill(os.getpid(), signal.SIGKILL)


class PowerCutError(BaseException):
    """The end of the machine."""


def cut_power(_name):
    raise PowerCutError


def fail_with(number):
    """An action that fails as the system would."""

    def fail(_name):
        raise OSError(number, os.strerror(number))

    return fail


disk_full = fail_with(errno.ENOSPC)
io_error = fail_with(errno.EIO)


class StepDisk(Disk):
    """Counts its steps; at step `at` a write writes half, any other does nothing, and then `act` happens.

    Syncs do not reach the real disk: the process that reads afterwards sees every write anyway.
    """

    def __init__(self, at=None, act=None, only=STEPS):
        self.at, self.act, self.only = at, act, only
        self.steps = []

    def step(self, name, fd=None, data=None, offset=None):
        if name not in self.only:
            return
        self.steps.append(name)
        if len(self.steps) - 1 == self.at:
            if name == "write":
                os.pwrite(fd, data[: len(data) // 2], offset)
            self.act(name)

    def open(self, path):
        self.step("open")
        return super().open(path)

    def scratch(self, folder):
        self.step("scratch")
        return super().scratch(folder)

    def write(self, fd, data, offset):
        self.step("write", fd, data, offset)
        return super().write(fd, data, offset)

    def truncate(self, fd, nbytes):
        self.step("truncate")
        super().truncate(fd, nbytes)

    def sync(self, fd):
        self.step("sync")

    def rename(self, old, new):
        self.step("rename")
        super().rename(old, new)

    def remove(self, path):
        self.step("remove")
        super().remove(path)

    def sync_folder(self, folder):
        self.step("sync_folder")


class ShortDisk(StepDisk):
    """Takes at most a few bytes less than asked."""

    def write(self, fd, data, offset):
        return super().write(fd, data[: max(len(data) * 2 // 3, 1)], offset)


class ForgetfulDisk(StepDisk):
    """Remembers what is durable: contents at their last sync, names at the folder's last sync.

    Of names given since, a file system may keep none or any: `newest` is the one given last.
    """

    def __init__(self, folder, at=None):
        super().__init__(at, cut_power)
        self.folder = folder
        self.contents = {}  # inode -> bytes
        self.names = {}  # name -> inode
        self.newest = {}

    def sync(self, fd):
        super().sync(fd)
        status = os.fstat(fd)
        self.contents[status.st_ino] = os.pread(fd, status.st_size, 0)

    def sync_folder(self, folder):
        super().sync_folder(folder)
        if folder == self.folder:
            self.names = {path.name: path.stat().st_ino for path in folder.iterdir()}
            self.newest = {}

    def rename(self, old, new):
        super().rename(old, new)
        if new.parent == self.folder:
            self.newest = {old.name: None, new.name: new.stat().st_ino}

    def remove(self, path):
        inode = path.stat().st_ino if path.exists() else None
        super().remove(path)
        if inode not in self.names.values():
            self.contents.pop(inode, None)

    def come_back(self, unsynced, keeps_newest=False):
        """What the folder holds after the power is back; `unsynced` maps unsynced bytes to what is left of them."""
        now = {path.stat().st_ino: path.read_bytes() for path in self.folder.iterdir()}
        for path in self.folder.iterdir():
            path.unlink()
        for name, inode in (self.names | (self.newest if keeps_newest else {})).items():
            if inode is not None:
                volatile = now.get(inode, b"")
                (self.folder / name).write_bytes(self.contents.get(inode, unsynced(volatile)))
