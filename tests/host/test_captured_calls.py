"""What a recorded function asks of CUDA, and in which order, with a runtime that writes it down.

tests/gpu has the test of what then happens; this one needs no GPU.
"""

import threading
from contextlib import contextmanager

import pytest
import torch

from zinfer.runtime.captured import Captured, SharedPool

HOST = SharedPool(torch.device("cpu"))


class Stream:
    def __init__(self, calls, name):
        self.calls, self.name = calls, name

    def wait_stream(self, other):
        self.calls.append(f"{self.name} waits for {other.name}")


class Runtime:
    """Stands for torch.cuda on made-up device tensors."""

    def __init__(self):
        self.calls = []

    def Stream(self, device):
        return Stream(self.calls, "side")

    def current_stream(self, device):
        return Stream(self.calls, "current")

    @contextmanager
    def stream(self, stream):
        self.calls.append(f"on {stream.name}")
        yield
        self.calls.append("off")

    @contextmanager
    def device(self, device):
        yield

    @contextmanager
    def graph(self, graph, pool, capture_error_mode):
        self.calls.append(f"record into {pool}, {capture_error_mode}")
        yield
        self.calls.append("recorded")

    def graph_pool_handle(self):
        return "pool"

    def CUDAGraph(self):
        return self

    def replay(self):
        self.calls.append("replay")


class OnDevice(torch.Tensor):
    """A tensor that says it lies on a device."""

    @property
    def device(self):
        return torch.device("cuda:0")


@pytest.fixture
def runtime(monkeypatch):
    fake = Runtime()
    for name in ("Stream", "current_stream", "stream", "device", "graph", "graph_pool_handle", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


def test_warm_ups_come_first_on_a_stream_of_their_own_and_each_call_is_one_replay(runtime):
    def run(x):
        runtime.calls.append("run")
        assert not torch.is_grad_enabled()
        return (x,)

    example = torch.zeros(3).as_subclass(OnDevice)
    captured = Captured(run, example, SharedPool(torch.device("cuda:0")))
    assert runtime.calls == [
        "side waits for current",
        "on side",
        *["run"] * 3,
        "off",
        "current waits for side",
        "record into pool, thread_local",
        "run",
        "recorded",
    ]
    runtime.calls.clear()
    (first,) = captured(torch.tensor([1.0, 2.0, 3.0]))
    (second,) = captured(torch.tensor([4.0, 5.0, 6.0]))
    assert runtime.calls == ["replay"] * 2, "nothing is computed again by the host"
    assert first.tolist() == [1, 2, 3], "an answer is not overwritten by the next"
    assert second.tolist() == [4, 5, 6]
    assert example.tolist() == [0, 0, 0], "the example is not the place that calls write to"


def test_without_a_device_the_twin_runs_on_the_fixed_input():
    seen = []
    captured = Captured(lambda x: (seen.append(x.data_ptr()), x + 1)[1:], torch.zeros(2), HOST)
    assert captured(torch.tensor([1.0, 2.0]))[0].tolist() == [2, 3]
    assert captured(torch.tensor([5.0, 6.0]))[0].tolist() == [6, 7]
    assert len(set(seen)) == 1
    assert HOST.handle is None


def test_graphs_that_share_memory_take_turns():
    """One's outputs may lie where another computes: the second must not begin before the first is copied out."""
    begun, go, seen = threading.Event(), threading.Event(), []

    def slow(x):
        begun.set()
        assert go.wait(30)
        seen.append("slow")
        return (x,)

    pool = SharedPool(torch.device("cpu"))
    one = Captured(slow, torch.zeros(1), pool)
    two = Captured(lambda x: (seen.append("quick"), x)[1:], torch.zeros(1), pool)
    first = threading.Thread(target=one, args=(torch.ones(1),))
    first.start()
    assert begun.wait(30)
    second = threading.Thread(target=two, args=(torch.ones(1),))
    second.start()
    go.set()
    first.join(30)
    second.join(30)
    assert seen == ["slow", "quick"]


def test_an_input_of_another_shape_is_refused():
    captured = Captured(lambda x: (x,), torch.zeros(2), HOST)
    with pytest.raises(RuntimeError):
        captured(torch.zeros(3))
