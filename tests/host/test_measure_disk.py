"""The disk's rate: what is counted, what a moment of reads is believed.  Disks and clocks of the tests' own."""

import threading
from itertools import count
from math import exp, log
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from chunk_bytes import write_noise
from hypothesis import given
from hypothesis import strategies as st

from zinfer.chunks.table import PAGE, PIECE_BYTES
from zinfer.config.machine import Link
from zinfer.memory import measure_disk as measuring
from zinfer.memory.measure_disk import (
    ReadLoad,
    likely_rate,
    link_now,
    measure_disk,
    ranges,
    rate_now,
)
from zinfer.memory.measure_links import lasting, typical
from zinfer.memory.nvme import IN_FLIGHT

MIB = 2**20
SIZES = (3 * MIB + 100, 5 * PAGE, PAGE)
rates = st.floats(1e6, 1e11)
noises = (measuring._NOISE, measuring._LESS_NOISE)


@pytest.fixture
def files(tmp_path):
    return write_noise(tmp_path, SIZES)


@pytest.fixture
def disk(monkeypatch):
    """`disk(rounds, ...)`: what each probe sees, one after the other; returns how long each was asked for."""

    def make(*probes):
        asked, left = [], list(probes)

        def round_seconds(_self, _reads, seconds):
            asked.append(seconds)
            return left.pop(0)

        monkeypatch.setattr(ReadLoad, "round_seconds", round_seconds)
        return asked

    return make


def mean_bytes(files):
    reads = ranges(files, PIECE_BYTES)
    return sum(read.nbytes for read in reads) / len(reads)


def test_ranges_are_direct_reads_inside_the_files(files):
    for nbytes in (PIECE_BYTES, 256 * 1024):
        reads = ranges(files, nbytes)
        assert {read.file for read in reads} == {0, 1, 2}
        for read in reads:
            assert read.offset % PAGE == read.nbytes % PAGE == 0
            assert 0 < read.nbytes <= nbytes
            assert read.offset + read.nbytes <= files[read.file].stat().st_size


def test_reading_leaves_no_thread_and_no_open_file(files):
    before, num_files = set(threading.enumerate()), len(list(Path("/proc/self/fd").iterdir()))
    rates = measure_disk(files, 0.02)
    assert rates.link.bytes_per_s > 0
    assert rates.row_latency_s > 0
    assert set(threading.enumerate()) <= before
    assert len(list(Path("/proc/self/fd").iterdir())) == num_files


def test_files_too_small_to_read_directly_are_guessed_too(tmp_path):
    (tmp_path / "small").write_bytes(b"x")
    assert measure_disk([tmp_path / "small"], 0.01) == measure_disk([], 0.01)
    assert link_now([tmp_path / "small"], Link(bytes_per_s=5.0), 0.01) == Link(bytes_per_s=5.0)


@pytest.mark.parametrize("seconds", [-400.0, 0.0, 3.0, 8.5])
def test_a_cold_start_is_not_counted(files, monkeypatch, seconds):
    """A disk that takes 100 s for each of its first reads and one for each later one, by a clock that only it moves."""
    now, begun, under_way, most = [0.0], count(), [0], [0]

    class Reader:
        def begin(self, ticket, place_N, landed):
            assert len(place_N) == ticket.chunk.nbytes
            ticket.number = next(begun)
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])

        def close(self):
            pass

    class Ticket:
        def __init__(self, chunk):
            self.chunk = chunk

        def land(self):
            raise AssertionError("the reader of this test lands nothing")

        def wait(self):
            now[0] += 100.0 if self.number < IN_FLIGHT else 1.0
            under_way[0] -= 1

    monkeypatch.setattr(measuring, "Reader", lambda *_args: Reader())
    monkeypatch.setattr(measuring, "Ticket", Ticket)
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    with ReadLoad(files) as load:
        rounds = load.round_seconds(ranges(files, PIECE_BYTES), 100.0 * IN_FLIGHT + seconds)
    assert rounds == [float(IN_FLIGHT)] * len(rounds)
    # At least one round; and what is begun in time is waited for.
    assert len(rounds) == max(int((seconds + 1 + IN_FLIGHT - 1) // IN_FLIGHT), 1)
    assert most[0] == IN_FLIGHT
    assert under_way[0] == 0


def test_a_rate_that_was_seen_before_is_believed_at_once(files, disk):
    known = Link(bytes_per_s=1e9, latency_s=0.0)
    as_before = mean_bytes(files) / 1e9 * IN_FLIGHT
    asked = disk([as_before] * 4)
    assert link_now(files, known, 0.1).bytes_per_s == pytest.approx(1e9)
    assert asked == [0.1]


def test_a_moment_that_was_disturbed_once_is_not_believed(files, disk):
    """Somebody else's second in one round of four changes nothing."""
    as_before = mean_bytes(files) / 1e9 * IN_FLIGHT
    disk([as_before, as_before, as_before + 1.0, as_before])
    assert link_now(files, Link(bytes_per_s=1e9), 0.1).bytes_per_s == pytest.approx(1e9)


def test_slow_rounds_count_as_passes_meet_them(files, disk):
    """Rounds as a shared disk's are: the slow third is no disturbance, it comes again in every pass."""
    times = (0.78, 0.85, 0.9, 0.96, 0.98, 1.0, 1.02, 1.1, 1.3, 2.0)
    round_s = mean_bytes(files) / 1e9 * IN_FLIGHT
    disk([round_s * each / np.mean(times) for each in times])
    assert link_now(files, Link(bytes_per_s=1e9), 0.1).bytes_per_s == pytest.approx(1e9)
    assert lasting(times) > 1.05 * typical(times), "this test cannot tell the two apart"


def test_another_rate_is_looked_at_for_longer(files, disk):
    known = Link(bytes_per_s=1e9, latency_s=1e-9)
    twice = 2 * mean_bytes(files) / 1e9 * IN_FLIGHT
    asked = disk([twice] * 4, [twice] * 16)
    now = link_now(files, known, 0.1)
    assert asked == [0.1, 0.4]
    assert now.latency_s == known.latency_s
    assert now.bytes_per_s == pytest.approx(0.5e9, rel=0.02), "so far off it is the disk that changed"


def test_a_slow_start_of_a_probe_costs_little(files, disk):
    """The first tenth of a second at half the rate, what follows as before: the disk has not changed."""
    as_before = mean_bytes(files) / 1e9 * IN_FLIGHT
    asked = disk([2 * as_before] * 3, [as_before] * 16)
    assert link_now(files, Link(bytes_per_s=1e9), 0.1).bytes_per_s == pytest.approx(1e9)
    assert len(asked) == 2


@pytest.mark.parametrize("second", [1.0, 1.2, 2.0])
def test_of_two_looks_the_later_one_counts(files, disk, second):
    round_s = mean_bytes(files) / 1e9 * IN_FLIGHT
    asked = disk([1.5 * round_s] * 4, [second * round_s] * 16)
    now = link_now(files, Link(bytes_per_s=1e9), 0.1)
    assert len(asked) == 2
    assert now.bytes_per_s == pytest.approx(likely_rate(1e9, 1e9 / second, noises[1]))


@pytest.mark.parametrize("times", [0.5, 1.6])
def test_a_longer_look_is_believed_more(files, disk, times):
    """A quarter off in a moment is mostly the moment; in the longer look that a half brings, mostly the disk."""
    round_s = mean_bytes(files) / 1e9 * IN_FLIGHT
    disk([round_s / 1.25] * 4)
    moment = link_now(files, Link(bytes_per_s=1e9), 0.1).bytes_per_s
    assert 1.02e9 < moment < 1.1e9
    disk([round_s / times] * 4, [round_s / 1.25] * 16)
    longer = link_now(files, Link(bytes_per_s=1e9), 0.1).bytes_per_s
    assert 1.1e9 < longer < 1.25e9


def test_a_pieces_fixed_cost_is_not_the_rates(files, disk):
    nbytes = mean_bytes(files)
    known = Link(bytes_per_s=1e9, latency_s=0.25 * nbytes / 1e9)
    disk([1.25 * nbytes / 1e9 * IN_FLIGHT] * 4)
    assert link_now(files, known, 0.1).bytes_per_s == pytest.approx(1e9)


@given(rates, rates, st.sampled_from(noises))
def test_the_likely_rate_lies_between_both(known, seen, noise):
    likely = likely_rate(known, seen, noise)
    low, high = sorted((known, seen))
    assert low * (1 - 1e-9) <= likely <= high * (1 + 1e-9)


@given(rates, st.floats(-3, 3), st.floats(0.001, 1), st.sampled_from(noises))
def test_what_was_seen_counts_more_the_farther_off_it_is(known, off, more, noise):
    def share(distance):
        return log(likely_rate(known, known * exp(distance), noise) / known) / distance

    near, far = (off or 0.1), (off or 0.1) + (more if off >= 0 else -more)
    assert share(near) <= share(far) + 1e-6
    assert likely_rate(known, known, noise) == pytest.approx(known)


@pytest.mark.parametrize("drift", [0.0, 0.08, 0.15])
def test_on_disks_that_drift_it_is_nearer_than_either(drift):
    """Ten thousand disks: where they drift as expected, or more, neither the profile nor a look alone is as near."""
    drawn = np.random.default_rng(0)
    true = np.exp(drawn.normal(0, drift, 10_000))
    moments, longer = (true * np.exp(drawn.normal(0, noise, 10_000)) for noise in noises)

    def now(at):
        looks = iter((moments[at], longer[at]))
        return rate_now(1.0, lambda _seconds: next(looks), 0.05)

    likely = np.array([now(at) for at in range(10_000)])

    def error(guess):
        return float(np.sqrt(np.mean(np.log(guess / true) ** 2)))

    assert error(likely) < error(moments)
    if drift:
        assert error(likely) < 0.95 * error(1.0)
    bias = float(np.mean(np.log(likely / true)))
    assert abs(bias) < 0.01, "neither hopeful nor fearful"
