"""What reads, fresh memory and products cost each other, by clocks of the tests' own."""

import threading
from types import SimpleNamespace

import pytest

from zinfer.chunks.table import HUGE_PAGE
from zinfer.config.machine import Overlap
from zinfer.memory import measure_beside as measuring
from zinfer.memory.crowd import CROWD
from zinfer.memory.measure_beside import measure_chunk_overhead, measure_fresh, measure_overlap
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
    bench = Bench(monkeypatch, alone=(1.0, 1.5), beside=(3.0, 2.1))
    overlap = measure_overlap(files, bench.work, turns * measuring._TURN_S * 1.01)
    assert overlap.disk == pytest.approx(3.0)
    assert overlap.compute == pytest.approx(1.4)
    assert bench.num_turns == max(turns, 1), "in turns: both may have changed a second later"


def test_reads_and_work_that_do_not_are_not_said_to(files, monkeypatch):
    bench = Bench(monkeypatch, alone=(2.0, 2.0), beside=(1.0, 1.9))
    assert measure_overlap(files, bench.work, 0.1) == Overlap()
    assert measure_overlap([], lambda: None, 0.01) == Overlap()


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
    measure_overlap(files, work, 0.0)
    assert said == ["hold", "alone", *["enter", "beside"] * 3, "let_go"]


def test_nothing_is_slower_than_it_is_alone_by_less_than_nothing(files, monkeypatch):
    assert measuring._slowdown(0.5, 1.0) == 1.0
    assert measuring._slowdown(3.0, 2.0) == 1.5
    assert measuring._slowdown(30.0, 1.0) == measuring._MOST


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
