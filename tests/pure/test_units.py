"""Sizes as people write them, and as they are printed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zinfer.errors import UsageError
from zinfer.units import GIB, KIB, MIB, Bytes, rate_text, round_up, seconds_text

GOOD = {
    "0": 0,
    "1": 1,
    "123": 123,
    "123b": 123,
    "123 B": 123,
    "1k": KIB,
    "1K": KIB,
    "1KiB": KIB,
    "1kb": 1000,
    "1KB": 1000,
    "4096KiB": 4 * MIB,
    "1m": MIB,
    "1MiB": MIB,
    "1 MiB": MIB,
    "  16MiB  ": 16 * MIB,
    "1mb": 10**6,
    "1.5MiB": 3 * MIB // 2,
    "20g": 20 * GIB,
    "20G": 20 * GIB,
    "20GiB": 20 * GIB,
    "20gib": 20 * GIB,
    "20GB": 20 * 10**9,
    "0.5GiB": GIB // 2,
    "1.25 GiB": 5 * GIB // 4,
    "2T": 2 * 2**40,
    "2TiB": 2 * 2**40,
    "2TB": 2 * 10**12,
}
BAD = [
    "",
    " ",
    "-1",
    "-5GiB",
    "GiB",
    "1.GiB",
    ".5GiB",
    "1,5GiB",
    "1e9",
    "12 parsecs",
    "1 Gi",
    "0x10",
    "5%",
    "auto",
]


@pytest.mark.parametrize(("text", "nbytes"), GOOD.items(), ids=repr)
def test_sizes_are_read(text, nbytes):
    assert Bytes.parse(text) == nbytes


@pytest.mark.parametrize("text", [*BAD, True, -1], ids=repr)
def test_what_is_no_size_is_refused_with_the_forms_that_are(text):
    with pytest.raises(UsageError) as refused:
        Bytes.parse(text)
    assert refused.value.code == "ZI-1001"
    assert repr(text) in str(refused.value)
    assert "20GiB" in refused.value.remedy


def test_there_are_forty_strings():
    assert len(GOOD) + len(BAD) >= 40


@given(st.integers(0, 2**60))
def test_a_whole_number_stands_for_itself_as_text_too(nbytes):
    assert Bytes.parse(nbytes) == nbytes == Bytes.parse(str(nbytes))


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (3 * MIB, "3.00 MiB"),
        (20 * GIB, "20.00 GiB"),
        (-MIB, "-1.00 MiB"),
    ],
)
def test_sizes_print_in_the_unit_that_reads_best(nbytes, text):
    assert str(Bytes(nbytes)) == text


@given(st.integers(1, 2**50))
def test_a_printed_size_reads_back_to_within_its_rounding(nbytes):
    assert abs(Bytes.parse(str(Bytes(nbytes)).replace(" ", "")) - nbytes) <= max(nbytes * 0.005, 1)


def test_rates_and_durations_print_for_people():
    assert [rate_text(rate) for rate in (3.2e9, 1.8e8, 5e6)] == ["3.20 GB/s", "0.18 GB/s", "5.0 MB/s"]
    seconds = [5e-6, 0.0123, 4.2, 187, 7800]
    assert [seconds_text(value) for value in seconds] == ["5 us", "12.3 ms", "4.20 s", "3:07", "2:10:00"]


@given(st.integers(0, 2**40), st.integers(1, 2**20))
def test_rounding_up_gives_the_next_multiple(value, multiple):
    rounded = round_up(value, multiple)
    assert rounded % multiple == 0
    assert 0 <= rounded - value < multiple
