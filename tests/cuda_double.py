"""CUDA's runtime, written down: streams, events and page-locking that a machine without a device can be asked for.

Copies happen at once, whatever stream they are issued on: what is tested with it is what is asked for, in which order.
"""

import threading
from contextlib import contextmanager

import pytest
import torch


class Runtime:
    """Stands for torch.cuda: every call is noted; synchronize() blocks until `finish` is set, or raises `error`."""

    def __init__(self):
        self.calls, self.num_events, self.finish, self.error = [], 0, threading.Event(), None
        self.threads = set()
        self.on_synchronize = lambda: None
        self.finish.set()
        self.compute = self.Stream(None)
        self.compute.name, self.num_streams = "compute", 0

    num_streams = 0

    def Stream(self, device):
        names = ("weights", "up", "down")
        self.num_streams += 1
        return FakeStream(self, names[(self.num_streams - 1) % 3])

    def Event(self, **_):
        self.num_events += 1
        return FakeEvent(self, self.num_events)

    def current_stream(self, device):
        return self.compute

    def set_device(self, device):
        self.threads.add(threading.current_thread().name.rstrip("_0123456789"))

    @contextmanager
    def stream(self, stream):
        yield


class FakeStream:
    def __init__(self, runtime, name="copy"):
        self.runtime, self.name = runtime, name

    def wait_stream(self, other):
        self.runtime.calls.append((self.name, "waits for", other.name))

    def wait_event(self, event):
        self.runtime.calls.append((self.name, "waits for", event.number))


class FakeEvent:
    def __init__(self, runtime, number):
        self.runtime, self.number = runtime, number

    def record(self, stream):
        self.runtime.calls.append((stream.name, "records", self.number))

    def query(self):
        return self.runtime.finish.is_set()

    def synchronize(self):
        self.runtime.on_synchronize()
        self.runtime.finish.wait(20)
        if self.runtime.error:
            raise self.runtime.error

    def elapsed_time(self, end):
        return 1000.0


@pytest.fixture(name="runtime")
def cuda_runtime(monkeypatch):
    """torch.cuda, as far as zinfer.memory asks for it, written down."""
    fake = Runtime()
    for name in ("Stream", "Event", "current_stream", "stream", "set_device"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


class Library:
    """cudart: locks ranges up to `most` bytes in all, then answers `code`."""

    def __init__(self, most=2**62, code=2):
        self.most, self.code = most, code
        self.locked, self.calls = {}, []
        self.threads = set()

    def cudaHostRegister(self, address, nbytes, flags):
        self.calls.append((address, nbytes, flags))
        self.threads.add(threading.current_thread().name)
        if sum(self.locked.values()) + nbytes > self.most:
            return self.code
        for begin, size in self.locked.items():
            assert address + nbytes <= begin or begin + size <= address, "locked twice"
        self.locked[address] = nbytes
        return 0

    def cudaHostUnregister(self, address):
        self.threads.add(threading.current_thread().name)
        del self.locked[address]
        return 0
