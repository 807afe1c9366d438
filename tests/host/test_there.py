"""Which free memory is still there: by memory and clocks of the tests' own, and that all of it is given back."""

from types import SimpleNamespace

import pytest
import torch
from plan_of import MACHINE

from zinfer.config.machine import There
from zinfer.memory import measure
from zinfer.memory import there as looking
from zinfer.memory.there import memory_there
from zinfer.runtime import look as looks
from zinfer.runtime.look import Look, is_worth_a_look, look_at

MIB = 2**20
BLOCK = looking._BLOCK
FAST_S, SLOW_S = BLOCK / 8e9, BLOCK / 4e8


class Memory:
    """A slab of the tests' own: finding block `at` takes `seconds(at)` of its clock."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.found, self.is_closed, self.asked = 5.0, 0, False, None
        self._seconds = seconds
        monkeypatch.setattr(looking, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(looking, "HostSlab", self.open)

    def open(self, nbytes):
        self.asked = nbytes
        return SimpleNamespace(bytes_N=self, close=self.close)

    def close(self):
        self.is_closed = True

    def __getitem__(self, pages):
        assert pages.stop <= self.asked, "within the slab"
        assert pages.start == self.found * BLOCK, "one block after the other"
        assert len(range(self.asked)[pages]) == BLOCK // looking.HUGE_PAGE, "every page of it"
        return self

    def fill_(self, _value):
        self.now += self._seconds(self.found)
        self.found += 1


def test_all_of_it_may_be_there(monkeypatch):
    memory = Memory(monkeypatch, lambda _at: FAST_S)
    there = memory_there(100 * BLOCK + 5, 10.0)
    assert there.nbytes == 100 * BLOCK + 5
    assert there.bytes_per_s == pytest.approx(8e9)
    assert memory.found == 101
    assert memory.is_closed


@pytest.mark.parametrize("fast", [0, 20, 64])
def test_it_ends_where_pages_come_slowly_several_times_in_a_row(monkeypatch, fast):
    """The rate is that of what was there, and the slow pages behind it are not counted."""
    memory = Memory(monkeypatch, lambda at: FAST_S if at < fast else SLOW_S)
    there = memory_there(1000 * BLOCK, 10.0)
    assert memory.found == fast + looking._SLOW_BLOCKS
    assert there.nbytes == fast * BLOCK
    assert there.bytes_per_s == (pytest.approx(8e9) if fast else There().bytes_per_s)
    assert memory.is_closed


def test_a_core_that_was_lost_for_a_moment_is_no_end(monkeypatch):
    """Nor is memory of which some is gone: what it costs is in the rate."""
    memory = Memory(monkeypatch, lambda at: SLOW_S if at % 10 in (3, 4) else FAST_S)
    there = memory_there(100 * BLOCK, 10.0)
    assert there.nbytes == 100 * BLOCK
    assert there.bytes_per_s == pytest.approx(100 * BLOCK / (80 * FAST_S + 20 * SLOW_S))
    assert memory.found == 100


def test_where_its_time_is_up_as_much_again_is_expected(monkeypatch):
    """At the same rate, and never more than there is use for."""
    memory = Memory(monkeypatch, lambda _at: FAST_S)
    there = memory_there(1000 * BLOCK, 50.5 * FAST_S)
    assert memory.found == 51
    assert there.nbytes == 2 * 51 * BLOCK
    assert there.bytes_per_s == pytest.approx(8e9)
    memory = Memory(monkeypatch, lambda _at: FAST_S)
    assert memory_there(80 * BLOCK, 50.5 * FAST_S).nbytes == 80 * BLOCK


def test_too_little_to_show_is_nothing(monkeypatch):
    Memory(monkeypatch, lambda at: FAST_S if at < 5 else SLOW_S)
    assert memory_there(1000 * BLOCK, 10.0) == There()


def test_an_error_gives_it_back_too(monkeypatch):
    def fail(at):
        raise MemoryError

    memory = Memory(monkeypatch, fail)
    with pytest.raises(MemoryError):
        memory_there(10 * BLOCK, 1.0)
    assert memory.is_closed


def test_real_memory_is_found_and_given_back(monkeypatch):
    slabs, real = [], looking.HostSlab
    monkeypatch.setattr(looking, "HostSlab", lambda nbytes: (slabs.append(real(nbytes)), slabs[-1])[1])
    there = memory_there(8 * BLOCK, 60.0)
    assert there.nbytes in (0, 8 * BLOCK)
    assert memory_there(0, 1.0) == There()
    assert all(torch.equal(slab.bytes_N, torch.empty(0, dtype=torch.uint8)) for slab in slabs)


SLOW = MACHINE.model_copy(update={"fresh_bytes_per_s": 5e8})
SEEN = There(nbytes=7 * MIB, bytes_per_s=5e9)


@pytest.fixture
def told(monkeypatch):
    """What is looked at, in order."""
    order = []

    def found(nbytes, _seconds):
        order.append(("memory", nbytes))
        return SEEN

    def for_files(machine, files):
        if files:
            order.append(("disk", files))
        return machine.model_copy(update={"host_copy_bytes_per_s": 3.0})

    monkeypatch.setattr(looks, "memory_there", found)
    monkeypatch.setattr(measure, "for_files", for_files)
    return order


def test_the_disk_is_looked_at_before_memory_is_found_which_would_slow_its_reads(told):
    machine = look_at(SLOW, ["f"], 2**30)
    assert machine == SLOW.model_copy(update={"there": SEEN, "host_copy_bytes_per_s": 3.0})
    assert told == [("disk", ["f"]), ("memory", 2**30)]


def test_memory_alone_is_looked_at_where_no_pass_will_wait_for_the_disk(told):
    assert look_at(SLOW, [], 2**30).there == SEEN
    assert told == [("memory", 2**30)]


@pytest.mark.parametrize(
    ("fresh", "nbytes"), [(None, 2**30), (5e9, 2**30), (5e8, 2**30 - 1), (5e8, 0)], ids=str
)
def test_memory_is_not_looked_at_where_no_pass_waits_for_it(told, fresh, nbytes):
    machine = MACHINE.model_copy(update={"fresh_bytes_per_s": fresh})
    assert not is_worth_a_look(machine, nbytes)
    assert look_at(machine, ["f"], nbytes).there == There()
    assert told == [("disk", ["f"])]


def test_what_was_there_is_not_believed_for_long(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(looks, "time", SimpleNamespace(monotonic=lambda: now[0]))
    seen = SLOW.model_copy(update={"there": SEEN})
    look = Look(lambda: seen)
    assert look.machine() == seen
    now[0] += looks._STAYS_S
    assert look.machine() == seen
    now[0] += 0.1
    assert look.machine() == SLOW
    now[0] -= 1.0
    assert look.machine() == SLOW, "gone is gone"
