"""Embedding rows from disk: the file's bytes in any order, few reads, and checked blocks where there are checksums."""

import errno
import os
import random
from contextlib import contextmanager

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from zinfer.chunks.table import PAGE, Read, RowTable
from zinfer.errors import IntegrityError, InternalError, MachineError
from zinfer.memory import nvme
from zinfer.memory.links import LinkLog
from zinfer.memory.nvme import IN_FLIGHT, Files
from zinfer.memory.rows import WINDOW_BYTES, RowReader
from zinfer.plan.profile import ROW_STAGING_BYTES


@contextmanager
def open_rows(path, **options):
    """A reader of one file's rows."""
    files = Files([path])
    reader = RowReader(files, LinkLog(), **options)
    try:
        yield reader
    finally:
        reader.close()
        reader.close()
        files.close()


@given(
    row_bytes=st.sampled_from([4, 24, 512, 6000, 8192, 60_000, 150_000]),
    offset=st.sampled_from([0, 8, 4095, 5000]),
    data=st.data(),
)
def test_rows_are_those_of_the_file(tmp_path_factory, row_bytes, offset, data):
    num_rows = 40
    ids = data.draw(st.lists(st.integers(0, num_rows - 1), max_size=60))
    path = tmp_path_factory.getbasetemp() / "rows.bin"
    text = random.Random(row_bytes).randbytes(offset + num_rows * row_bytes)
    path.write_bytes(text)
    table = RowTable("e", 0, offset, row_bytes, num_rows, (row_bytes,), "F32")
    with open_rows(path) as reader:
        rows = reader.read(table, np.array(ids, dtype=np.int64))
    assert rows.shape == (len(ids), row_bytes)
    for row, row_id in zip(rows, ids, strict=True):
        assert row.tobytes() == text[offset + row_id * row_bytes :][:row_bytes]


def test_neighbouring_rows_are_one_read_and_repeated_ones_none(tmp_path, monkeypatch):
    path = tmp_path / "rows.bin"
    path.write_bytes(bytes(64 * PAGE))
    reads, real = [], os.preadv
    monkeypatch.setattr(
        nvme.os, "preadv", lambda fd, b, offset: reads.append((offset, len(b[0]))) or real(fd, b, offset)
    )
    table = RowTable("e", 0, 0, 1024, 256, (1024,), "F32")
    with open_rows(path) as reader:
        reader.read(table, np.array([9, 8, 9, 10, 11, 200, 12]))
        assert sorted(reads) == [(2 * PAGE, 2 * PAGE), (50 * PAGE, PAGE)]
        reads.clear()
        reader.read(table, np.arange(256))
        assert max(nbytes for _, nbytes in reads) <= WINDOW_BYTES
        assert sum(nbytes for _, nbytes in reads) == 64 * PAGE
        assert reader._log.num_bytes["disk"] == 67 * PAGE


def test_scattered_rows_are_a_read_each_by_a_job_per_thread(tmp_path, monkeypatch):
    path = tmp_path / "rows.bin"
    path.write_bytes(b"".join(bytes([row]) * PAGE for row in range(200)))
    table, ids = RowTable("e", 0, 0, PAGE, 200, (PAGE,), "U8"), np.random.default_rng(0).permutation(100) * 2
    with open_rows(path) as reader:
        jobs, submit = [], reader._pool.submit
        monkeypatch.setattr(reader._pool, "submit", lambda *a: jobs.append(submit(*a)) or jobs[-1])
        rows = reader.read(table, ids)
        assert (rows == ids[:, None]).all()
        assert len(jobs) == IN_FLIGHT
        assert reader._log.num_bytes["disk"] == 100 * PAGE
        reader.read(table, np.array([0, 100]))
        assert len(jobs) == IN_FLIGHT + 2


@pytest.mark.parametrize("ids", [[-1], [3, 256]])
def test_a_row_that_is_not_there_is_our_mistake(tmp_path, ids):
    path = tmp_path / "rows.bin"
    path.write_bytes(bytes(PAGE))
    with open_rows(path) as reader, pytest.raises(InternalError, match="has 256 rows"):
        reader.read(RowTable("e", 0, 0, 16, 256, (16,), "F32"), np.array(ids))


def test_a_failing_row_leaves_the_reader_usable(tmp_path, monkeypatch):
    path = tmp_path / "rows.bin"
    path.write_bytes(bytes(64 * PAGE))
    real = os.preadv
    table = RowTable("e", 0, 0, PAGE, 64, (PAGE,), "F32")

    def preadv(fd, buffers, offset):
        if offset == 40 * PAGE:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers, offset)

    monkeypatch.setattr(nvme.os, "preadv", preadv)
    with open_rows(path) as reader:
        for _ in range(2 * IN_FLIGHT):  # no buffer is lost on the way
            with pytest.raises(MachineError, match="rows of e"):
                reader.read(table, np.array([1, 20, 40]))
        assert not reader.read(table, np.arange(39)).any()


def blocks_of(path, block_bytes):
    """The file's checksummed blocks."""
    text = path.read_bytes()
    parts = [(at, text[at : at + block_bytes]) for at in range(0, len(text), block_bytes)]
    return [Read(0, at, block_bytes, 0, len(part), xxhash.xxh3_64_intdigest(part)) for at, part in parts]


def test_a_block_is_checked_before_its_first_row_is_used(tmp_path):
    path = tmp_path / "rows.bin"
    path.write_bytes(random.Random(0).randbytes(100 * PAGE + 500))
    blocks = blocks_of(path, 20 * PAGE)
    table = RowTable("e", 0, 0, PAGE, 100, (PAGE,), "F32")
    text = bytearray(path.read_bytes())
    text[45 * PAGE] ^= 1  # in the third block, in row 45
    path.write_bytes(text)
    with open_rows(path, blocks={"e": blocks}) as reader:
        rows = reader.read(table, np.array([3, 99]))
        assert rows.tobytes() == bytes(text[3 * PAGE : 4 * PAGE] + text[99 * PAGE : 100 * PAGE])
        assert reader._log.num_bytes["disk"] == 40 * PAGE + 2 * PAGE
        reader.read(table, np.array([4, 98]))  # the same blocks: not again
        assert reader._log.num_bytes["disk"] == 40 * PAGE + 4 * PAGE
        for _ in range(2):
            with pytest.raises(
                IntegrityError, match=rf"ZI-6101.*rows\.bin: the block at byte {40 * PAGE} of e"
            ):
                reader.read(table, np.array([3, 50]))
    with open_rows(path) as trusting:
        trusting.read(table, np.array([45]))


def test_rows_take_no_more_memory_than_the_plan_counts(tmp_path):
    with open_rows(tmp_path) as reader:
        buffers = [reader._buffers.get_nowait() for _ in range(reader._buffers.qsize())]
        assert sum(len(buffer) for buffer in buffers) == ROW_STAGING_BYTES
