"""What crosses the link beside weights: which stream waits for what, who keeps what alive, and where it lies below."""

import pytest
import torch
from cuda_double import cuda_runtime  # noqa: F401
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from zinfer.memory.clock import CudaClock, HostClock
from zinfer.memory.crossing import Crossing
from zinfer.memory.links import LinkLog
from zinfer.memory.parking import Parking

CPU = torch.device("cpu")


@pytest.fixture
def crossing(runtime):
    made = Crossing(CPU, LinkLog(), 4096)
    runtime.calls.clear()
    yield made
    runtime.finish.set()
    made.close()


def names(runtime):
    """The calls without the numbers of events."""
    return [call[:2] for call in runtime.calls]


def waits(runtime, stream):
    return [call[2] for call in runtime.calls if call[:2] == (stream, "waits for")]


def records(runtime, stream):
    return [call[2] for call in runtime.calls if call[:2] == (stream, "records")]


def test_up_waits_for_its_memory_and_computation_for_the_copy(crossing, runtime):
    x = torch.arange(6.0)
    assert torch.equal(crossing.to_device(x), x)
    (mark,) = records(runtime, "compute")
    _, end = records(runtime, "weights")  # the double names streams in the order of making
    assert waits(runtime, "weights") == [mark]
    assert waits(runtime, "compute") == [end]


def test_parking_waits_for_nobody(crossing, runtime):
    runtime.finish.clear()  # the device does nothing
    x = torch.arange(6.0)
    parked = crossing.park(x)
    assert torch.equal(crossing.unpark(parked), x)
    runtime.finish.set()


def test_what_the_host_reads_is_waited_for(crossing, runtime):
    done = []
    runtime.on_synchronize = lambda: done.append(1)
    runtime.finish.set()
    assert torch.equal(crossing.to_host(torch.arange(3.0)), torch.arange(3.0))
    assert done


def test_a_tensor_that_leaves_lives_until_computation_stands_behind_its_copy(crossing, runtime):
    first = crossing.park(torch.arange(4.0))
    assert len(crossing._leaving) == 1
    (end,) = [call[2] for call in runtime.calls if call[:2] == ("up", "records")][1:]
    assert end not in waits(runtime, "compute"), "put off: computation goes on at once"
    second = crossing.park(torch.arange(4.0))  # of the same turn
    assert len(crossing._leaving) == 2
    crossing.unpark(first)
    crossing.park(torch.arange(4.0))  # the next turn
    assert end in waits(runtime, "compute")
    assert [leaving.turn for leaving in crossing._leaving] == [1]
    crossing.unpark(second)


def test_the_way_back_waits_for_the_way_down_and_the_place_for_the_way_back(crossing, runtime):
    parked = crossing.park(torch.arange(4.0))
    down_end = records(runtime, "up")[-1]
    runtime.calls.clear()
    crossing.unpark(parked)
    assert down_end in waits(runtime, "weights")
    behind = records(runtime, "weights")[-1]
    assert waits(runtime, "up") == [behind], "nothing goes down into a place that is still being read"
    assert crossing.parking._lent == {}


def test_parked_tensors_lie_in_the_slab_and_what_does_not_fit_elsewhere(crossing):
    begin = crossing.parking.slab.bytes_N.data_ptr()
    inside = crossing.park(torch.zeros(1000, dtype=torch.uint8))
    outside = crossing.park(torch.zeros(8000, dtype=torch.uint8))
    assert begin <= inside.data_ptr() < begin + 4096
    assert not begin <= outside.data_ptr() < begin + 4096
    assert crossing.parking.num_misses == 1
    for parked in (inside, outside):
        crossing.unpark(parked)


def test_an_error_leaves_nothing_parked(crossing):
    for _ in range(3):
        crossing.park(torch.zeros(512, dtype=torch.uint8))
    crossing.forget()
    assert not crossing._leaving
    assert not crossing._ends
    assert crossing.parking._arena.free_bytes == 4096


def test_bytes_are_counted_each_way(runtime):
    log = LinkLog()
    crossing = Crossing(CPU, log, 4096)
    crossing.unpark(crossing.park(torch.zeros(100, dtype=torch.uint8)))
    crossing.to_host(torch.zeros(28, dtype=torch.uint8))
    crossing.close()
    assert log.num_bytes == {"h2d": 100, "d2h": 128}


class ParkingMachine(RuleBasedStateMachine):
    """Pieces never overlap, and everything comes back."""

    def __init__(self):
        super().__init__()
        self.parking, self.held = Parking(4096), []

    @rule(size=st.integers(0, 3000))
    def take(self, size):
        piece = self.parking.take(torch.empty(size, dtype=torch.uint8))
        piece.fill_(len(self.held) % 251)
        self.held.append((piece, len(self.held) % 251))

    @precondition(lambda self: self.held)
    @rule(at=st.integers(0, 100))
    def give_back(self, at):
        piece, value = self.held.pop(at % len(self.held))
        assert bool((piece == value).all())
        self.parking.give_back(piece)

    @invariant()
    def nobody_writes_into_anothers(self):
        assert all(bool((piece == value).all()) for piece, value in self.held)

    def teardown(self):
        self.parking.clear()
        assert self.parking._arena.free_bytes == 4096
        self.parking.close()


TestParking = ParkingMachine.TestCase


def test_a_hosts_clock_books_by_kind():
    clock = HostClock()
    clock.start()
    clock.lap("attention")
    clock.lap("mlp")
    clock.lap("mlp")
    assert set(clock.read()) == {"attention", "mlp"}
    assert clock.read() == {}


def test_a_devices_clock_reads_when_all_is_done(runtime):
    clock = CudaClock(CPU)
    for _ in range(3):
        clock.start()
        clock.lap("attention")
        clock.lap("mlp")
        clock.start()  # the wait for a chunk in between is nobody's
        clock.lap("mlp")
        assert clock.read() == {"attention": 1.0, "mlp": 2.0}
    assert runtime.num_events == 5, "events are made once"
    runtime.finish.clear()
    clock.start()
    clock.lap("mlp")
    assert clock.read() == {}, "nobody waits for what is not done"
    runtime.finish.set()
