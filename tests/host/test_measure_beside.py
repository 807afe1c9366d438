"""What reads, fresh memory and products cost each other, by clocks of the tests' own."""

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from zinfer.chunks.table import HUGE_PAGE
from zinfer.config.machine import Overlap
from zinfer.memory import measure_beside as measuring
from zinfer.memory.crowd import CROWD
from zinfer.memory.measure_beside import (
    measure_chunk_overhead,
    measure_fresh,
    overlap_turns,
    usual_overlap,
)
from zinfer.memory.measure_disk import ReadLoad

MIB = 2**20


@pytest.fixture
def files(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(bytes(3 * MIB))
    return [path]


class Bench:
    """Reads and work by one clock, each with seconds alone and beside the other; a stray one is long.

    While something is read beside it three rounds of work are done.
    """

    def __init__(self, monkeypatch, alone, beside):
        self.alone, self.beside = alone, beside
        self.now, self.left, self.num_turns = 0.0, 0, 0
        monkeypatch.setattr(ReadLoad, "round_seconds", lambda *_args: self.rounds(alone[0]))
        monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(measuring, "_until_cores_spin", lambda: None)
        monkeypatch.setattr(measuring, "ThreadPoolExecutor", lambda *_args: self)

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        pass

    @staticmethod
    def rounds(seconds):
        return [seconds, 50.0, seconds]

    def submit(self, _run, *_arguments):
        self.left, self.num_turns = 4, self.num_turns + 1
        return self

    def done(self):
        self.left -= 1
        return self.left == 0

    def result(self):
        return self.rounds(self.beside[0])

    def work(self):
        self.now += self.beside[1] if self.left else self.alone[1]


@pytest.mark.parametrize("turns", [0, 1, 4])
def test_reads_and_work_that_get_in_each_others_way_are_seen(files, monkeypatch, turns):
    bench = Bench(monkeypatch, alone=(2.0, 1.5), beside=(2.5, 1.8))
    seen = overlap_turns(files, bench.work, turns * measuring._TURN_S * 1.01)
    assert [turn.disk for turn in seen] == [pytest.approx(1.25)] * max(turns, 1)
    assert [turn.compute for turn in seen] == [pytest.approx(1.2)] * max(turns, 1)
    assert usual_overlap(seen).disk == pytest.approx(1.25)
    assert bench.num_turns == max(turns, 1), "in turns: both may have changed a second later"


def test_reads_and_work_that_do_not_are_not_said_to(files, monkeypatch):
    bench = Bench(monkeypatch, alone=(2.0, 2.0), beside=(1.0, 1.9))
    assert overlap_turns(files, bench.work, 0.1) == [Overlap()]
    assert overlap_turns([], lambda: None, 0.01) == []
    assert usual_overlap([]) == Overlap()


def test_products_beside_reads_do_not_spin(files, monkeypatch):
    """A team that idles is there while work runs beside reads, as in a streamed pass, and goes at the end."""
    said = []

    class Crowd:
        is_there = False

        def __getattr__(self, name):
            return lambda: said.append(name)

    bench = Bench(monkeypatch, alone=(1.0, 1.0), beside=(1.0, 1.0))

    def work():
        said.append("beside" if bench.left else "alone")
        bench.work()

    monkeypatch.setattr(measuring, "CROWD", Crowd())
    overlap_turns(files, work, 0.0)
    assert said == ["hold", "alone", *["enter", "beside"] * 3, "alone", "let_go"]


def test_what_somebody_else_takes_meets_some_turns_and_not_the_others():
    """Seen on a machine that had one user: 1.03, 1.91, 1.66, 1.10, 1.06, 1.09, 1.47 and 1.11 within half a minute."""
    turns = [Overlap(disk=disk, compute=1.1) for disk in (1.03, 1.91, 1.66, 1.1, 1.06, 1.09, 1.47, 1.11)]
    assert usual_overlap(turns).disk == pytest.approx(1.0825)
    assert usual_overlap(turns).compute == 1.1
    busy = [Overlap(disk=1.2, compute=compute) for compute in (1.0, 1.3, 9.0)]
    assert usual_overlap(busy) == Overlap(disk=1.2, compute=1.3)
    assert usual_overlap([Overlap(disk=30.0, compute=30.0)]) == Overlap(
        disk=measuring._MOST, compute=measuring._MOST
    )


@pytest.mark.parametrize("alone", [(2.0, 4.0), (4.0, 2.0)])
def test_a_turn_is_alone_before_and_after(files, monkeypatch, alone):
    """A disk that becomes slower or faster within a turn is not taken for what work costs it."""
    bench = Bench(monkeypatch, alone=(1.0, 1.0), beside=(3.0, 1.0))
    rounds = iter(alone)
    monkeypatch.setattr(ReadLoad, "round_seconds", lambda *_args: [next(rounds)] * 3)
    assert overlap_turns(files, bench.work, 0.0) == [Overlap()]


def test_a_product_alone_waits_until_its_cores_spin_again(monkeypatch):
    slept = []
    monkeypatch.setattr(measuring, "time", SimpleNamespace(sleep=slept.append))
    there = [True, True, False]
    monkeypatch.setattr(type(CROWD), "is_there", property(lambda _self: there.pop(0)))
    measuring._until_cores_spin()
    assert slept == [measuring._WAIT_S] * 2
    monkeypatch.setattr(type(CROWD), "is_there", property(lambda _self: True))
    measuring._until_cores_spin()
    assert len(slept) == 2 + measuring._MOST_WAITS, "another reader of the process may stay for good"


class Finder:
    """`pages` more are found during each round of work, the first `free` of them all at once before."""

    pages, free = 1, 0

    def __init__(self, bytes_N, nbytes):
        self._most, self._found = nbytes, self.free * HUGE_PAGE
        Finder.last = self

    def round(self):
        self._found += self.pages * HUGE_PAGE

    @property
    def found_bytes(self):
        return min(self._found, self._most)

    def close(self):
        Finder.is_closed = True


@pytest.mark.parametrize("free", [0, 10, 30])
@pytest.mark.parametrize(("alone_s", "beside_s"), [(1.0, 3.0), (1.0, 1.5)])
def test_fresh_memory_costs_what_it_adds_to_work(monkeypatch, alone_s, beside_s, free):
    """A page a round: its cost is that by which the round is longer, whatever was found for nothing at first."""
    now, has_begun = [0.0], [False]

    class Found(Finder):
        def __init__(self, bytes_N, nbytes):
            super().__init__(bytes_N, nbytes)
            has_begun[0] = True

    Found.free = free

    def work():
        now[0] += beside_s if has_begun[0] else alone_s
        if has_begun[0]:
            Finder.last.round()

    monkeypatch.setattr(measuring, "_FINDERS", 1)
    monkeypatch.setattr(measuring, "Ahead", Found)
    monkeypatch.setattr(measuring, "typical_seconds", lambda run, _seconds: run() or alone_s)
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    rate = measure_fresh(work, 40.0, 64 * HUGE_PAGE)
    assert rate == pytest.approx(HUGE_PAGE / (beside_s - alone_s))
    assert Finder.is_closed


def test_memory_that_is_there_is_held_while_what_is_fresh_is_measured(monkeypatch):
    """It would be used first, and is not what is asked for."""
    order = []

    @contextmanager
    def held_there(nbytes, seconds):
        order.append(("held", nbytes, seconds))
        yield
        order.append("let go")

    def found(_work, alone_s, seconds, nbytes):
        order.append(("found", alone_s, seconds, nbytes))
        return 7.0

    monkeypatch.setattr(measuring, "held_there", held_there)
    monkeypatch.setattr(measuring, "_fresh_rate", found)
    monkeypatch.setattr(measuring, "typical_seconds", lambda _run, _seconds: 0.25)
    assert measure_fresh(lambda: None, 3.0, HUGE_PAGE) == 7.0
    assert order == [("held", 4 * HUGE_PAGE, 3.0), ("found", 0.25, 3.0, HUGE_PAGE), "let go"]


def test_fresh_memory_is_never_free(monkeypatch):
    now = [0.0]

    def work():
        now[0] += 1.0
        Finder.last.round()

    monkeypatch.setattr(measuring, "_FINDERS", 1)
    monkeypatch.setattr(measuring, "Ahead", Finder)
    monkeypatch.setattr(measuring, "typical_seconds", lambda _run, _seconds: 1.0)
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert measure_fresh(work, 40.0, 64 * HUGE_PAGE) == pytest.approx(HUGE_PAGE / measuring._LEAST_ADDED)


@pytest.mark.parametrize("pages", [1, 2, 7, 64])
def test_finders_share_the_memory_and_all_of_it_counts(monkeypatch, pages):
    shares = []

    class All(Finder):
        def __init__(self, bytes_N, nbytes):
            super().__init__(bytes_N, nbytes)
            assert len(bytes_N) >= nbytes
            shares.append((bytes_N.data_ptr() % HUGE_PAGE, nbytes))
            self._found = nbytes

    now = iter(range(100))
    monkeypatch.setattr(measuring, "Ahead", All)
    monkeypatch.setattr(measuring, "typical_seconds", lambda _run, _seconds: 0.25)
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: float(next(now))))
    rate = measure_fresh(lambda: None, 40.0, pages * HUGE_PAGE)
    assert rate == pytest.approx(pages * HUGE_PAGE / 0.75)
    assert sum(nbytes for _, nbytes in shares) == pages * HUGE_PAGE
    assert len(shares) == min(pages, measuring._FINDERS)
    assert {offset for offset, _ in shares} == {0}, "each begins at a huge page"


def test_fresh_memory_is_found_by_the_engines_own_finder_and_given_back():
    before = set(threading.enumerate())
    assert measure_fresh(lambda: None, 0.05, 8 * HUGE_PAGE) > 0
    assert measure_fresh(lambda: None, 0.0, HUGE_PAGE) > 0
    assert set(threading.enumerate()) <= before


def test_a_chunk_costs_the_calling_thread_something(files):
    assert measure_chunk_overhead([], 0.01) is None
    assert measure_chunk_overhead(files, 0.01) > 0
