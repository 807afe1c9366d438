"""What runs had of a disk: kept per disk, believed by age, of no consequence where it cannot be read or written."""

import json
import math
import random
from types import SimpleNamespace

import pytest

from zinfer.config.machine import Link
from zinfer.memory import disk_notes
from zinfer.memory.disk_notes import expected, write_down
from zinfer.runtime import achieved
from zinfer.runtime.stats import PassRecord

KNOWN = Link(bytes_per_s=1.0e9, latency_s=1e-4)
DISK = "254:0"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ZINFER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def at(seconds):
    return lambda: 1000.0 + seconds


def test_nothing_is_known_of_a_disk_that_nobody_waited_for(folder):
    assert expected(KNOWN, DISK) == (KNOWN, False)
    assert not folder.exists()


def test_a_run_counts_for_most_at_first_and_for_ever_less():
    write_down(DISK, 1.5e9, at(0))
    rates = [expected(KNOWN, DISK, at(seconds))[0].bytes_per_s for seconds in (0, 60, 600, 6000, 10**7)]
    assert rates == sorted(rates, reverse=True)
    assert 1.38e9 < rates[0] < 1.5e9
    assert rates[-1] == pytest.approx(1.0e9, rel=1e-2)
    assert [expected(KNOWN, DISK, at(seconds))[1] for seconds in (0, 30, 600)] == [True, True, False]
    assert expected(KNOWN, DISK, at(-500))[0].bytes_per_s == rates[0], "a clock that was set back"
    assert expected(KNOWN, "8:16", at(0)) == (KNOWN, False), "another disk"
    assert expected(KNOWN, DISK, at(0))[0].latency_s == KNOWN.latency_s


def test_runs_in_a_row_are_averaged_and_old_ones_forgotten():
    for number, rate in enumerate((1.0e9, 1.2e9, 1.0e9, 1.2e9)):
        write_down(DISK, rate, at(20 * number))
    (note,) = disk_notes._notes().values()
    assert 1.05e9 < note.bytes_per_s < 1.15e9
    assert note.variance < 0.06**2
    write_down(DISK, 2.0e9, at(10**5))
    (note,) = disk_notes._notes().values()
    assert note.bytes_per_s == pytest.approx(2.0e9, rel=0.01)


def test_the_filter_is_nearer_than_the_last_run_alone():
    """Its own model, drawn: to believe the last run alone is the mutation."""
    draw, profile = random.Random(3), KNOWN.model_copy(update={"bytes_per_s": 1.5e9})
    errors = {"filter": 0.0, "last": 0.0}
    for disk in map(str, range(40)):
        rate, last = math.log(1.5e9) + draw.gauss(0, 0.1), None
        for number in range(10):
            rate += draw.gauss(0, math.sqrt(25 * disk_notes._DRIFT_PER_S))
            if last is not None:
                link, _ = expected(profile, disk, at(25 * number))
                errors["filter"] += (math.log(link.bytes_per_s) - rate) ** 2
                errors["last"] += (last - rate) ** 2
            last = rate + draw.gauss(0, math.sqrt(disk_notes._RUN))
            write_down(disk, math.exp(last), at(25 * number))
    assert errors["filter"] < 0.8 * errors["last"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{",
        '{"254:0": {}}',
        '{"254:0": {"bytes_per_s": -1, "variance": 1, "unix_s": 1}}',
        '{"254:0": {"bytes_per_s": NaN, "variance": 1, "unix_s": 1}}',
        '{"254:0": {"bytes_per_s": 1e999, "variance": 1, "unix_s": 1}}',
        '{"254:0": {"bytes_per_s": "fast", "variance": 1, "unix_s": 1}}',
    ],
)
def test_a_file_that_says_nothing_is_as_good_as_none(text, folder):
    folder.mkdir()
    (folder / "disks.json").write_text(text)
    assert expected(KNOWN, DISK) == (KNOWN, False)
    write_down(DISK, 1.5e9, at(0))
    assert set(json.loads((folder / "disks.json").read_text())) == {DISK}


def test_where_nothing_can_be_written_a_run_ends_all_the_same(folder):
    folder.write_text("a file where the folder should be")
    write_down(DISK, 1.5e9, at(0))
    assert expected(KNOWN, DISK) == (KNOWN, False)


def passes(count, *, seconds=0.5, nbytes=10**9, wait_s=0.3, is_first=False):
    one = PassRecord(seconds, wait_s, 1, 1, is_first, True, {"disk": nbytes}, {})
    return [one] * count


def plan(binding="disk", **machine):
    forecast = SimpleNamespace(binding=binding, bytes_per_pass={"disk": 10**9}, pass_s=0.4)
    found = {"measured": True, "disk_device": DISK, "fingerprint": "here", "disk_read": KNOWN} | machine
    return SimpleNamespace(forecast=forecast, machine=SimpleNamespace(**found))


def test_the_rate_is_the_foretold_one_by_what_passes_really_took():
    assert achieved.disk_rate(plan(), passes(10)) == pytest.approx(0.8e9)
    mixed = passes(10) + passes(3, seconds=9.0, is_first=True) + passes(5, seconds=0.1, wait_s=0.0)
    assert achieved.disk_rate(plan(), mixed) == pytest.approx(0.8e9), "loading, and passes that did not wait"
    assert achieved.disk_rate(plan("compute"), passes(10)) is None
    assert achieved.disk_rate(plan(), passes(2)) is None
    assert achieved.disk_rate(plan(), passes(10, seconds=0.01)) is None


@pytest.mark.parametrize("other", [{"measured": False}, {"disk_device": ""}, {"fingerprint": "elsewhere"}])
def test_only_runs_under_a_profile_of_this_machine_are_kept(other, monkeypatch, folder):
    monkeypatch.setattr(achieved, "fingerprint", lambda: "here")
    achieved.note_disk(plan(**other), passes(10))
    assert not folder.exists()
    achieved.note_disk(plan(), passes(10))
    assert expected(KNOWN, DISK)[0].bytes_per_s < KNOWN.bytes_per_s
