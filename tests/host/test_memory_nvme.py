"""The reader: every byte where it belongs, checked; direct where possible; failures typed, with file and block."""

import errno
import logging
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby, pairwise

import chunk_files
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zinfer.chunks.table import HUGE_PAGE, PAGE, Read
from zinfer.config.machine import Link
from zinfer.errors import CheckpointError, IntegrityError, InternalError, MachineError
from zinfer.memory import nvme
from zinfer.memory.links import LinkLog, Pace, Ticket
from zinfer.memory.nvme import Files, Reader, joined
from zinfer.memory.slab import HostSlab


@pytest.fixture
def open_reader():
    """Readers that are closed at the end, with their slabs."""
    opened = []

    def make(table, **options):
        files = Files(table.files)
        reader = Reader(files, LinkLog(), **options)
        slab = HostSlab(max(chunk.nbytes for chunk in table.chunks))
        opened.extend([reader, files, slab])
        return reader, slab

    yield make
    for thing in opened:
        thing.close()


def fetch(reader, slab, chunk):
    """Read a chunk into the slab's beginning and wait; its ticket."""
    ticket = Ticket(chunk)
    reader.begin(ticket, slab.bytes_N[: chunk.nbytes].numpy(), ticket.land)
    ticket.join()
    return ticket


def data_of(slab, chunk):
    begin = chunk.tensors[0].offset
    return slab.bytes_N[begin : begin + chunk.weight_bytes].numpy().tobytes()


@pytest.mark.parametrize("shift", [0, 64, 8, 4090])
def test_chunks_arrive_where_they_belong(tmp_path, open_reader, shift):
    table, contents = chunk_files.write_chunks(tmp_path, [1, 9, 4, 2], shift=shift)
    reader, slab = open_reader(table)
    for chunk, content in zip(table.chunks, contents, strict=True):
        ticket = fetch(reader, slab, chunk)
        ticket.wait()
        assert data_of(slab, chunk) == content
        assert ticket.seconds > 0
    assert reader._log.num_bytes == {"disk": sum(chunk.read_bytes for chunk in table.chunks)}
    assert [movement.chunk for movement in reader._log.drain()] == [0, 1, 2, 3]
    assert all(file.is_direct for file in reader._files._files.values())


def test_a_chunk_without_reads_has_arrived(tmp_path, open_reader):
    table, _ = chunk_files.write_chunks(tmp_path, [1])
    reader, slab = open_reader(table)
    empty = type(table.chunks[0])(0, (0,), (), (), (), PAGE, 0)
    fetch(reader, slab, empty).wait()


def test_the_last_page_may_end_early(tmp_path, open_reader):
    """A published file ends where it ends: the last read is a page long, its valid bytes are fewer."""
    table, contents = chunk_files.write_chunks(tmp_path, [3], digests=False)
    path = table.files[0]
    os.truncate(path, len(contents[0]))
    chunk = table.chunks[0]
    *reads, last = chunk.reads
    last = type(last)(0, last.offset, last.nbytes, last.at, len(contents[0]) - last.offset)
    chunk = type(chunk)(0, (0,), chunk.tensors, (*reads, last), (), chunk.nbytes, chunk.weight_bytes)
    reader, slab = open_reader(table)
    fetch(reader, slab, chunk).wait()
    assert data_of(slab, chunk) == contents[0]
    os.truncate(path, len(contents[0]) - 100)
    with pytest.raises(IntegrityError, match=rf"ZI-6102.*{path.name} ends at byte {len(contents[0]) - 100}"):
        fetch(reader, slab, chunk).wait()


def test_a_flipped_bit_is_reported_with_file_and_block(tmp_path, open_reader):
    table, _ = chunk_files.write_chunks(tmp_path, [2, 6])
    path, read = table.files[0], table.chunks[1].reads[1]
    text = bytearray(path.read_bytes())
    text[read.offset + 1000] ^= 4
    path.write_bytes(text)
    reader, slab = open_reader(table)
    fetch(reader, slab, table.chunks[0]).wait()
    with pytest.raises(IntegrityError) as caught:
        fetch(reader, slab, table.chunks[1]).wait()
    assert caught.value.code == "ZI-6101"
    assert f"{path}: block 1 of chunk 1, bytes {read.offset} to" in str(caught.value)
    trusting, slab = open_reader(table, verify="off")
    fetch(trusting, slab, table.chunks[1]).wait()


@pytest.mark.parametrize("most", [1, 2, 3, 8, 100])
def test_blocks_that_continue_each_other_are_one_request(tmp_path, open_reader, monkeypatch, most):
    """Each block of a request is checked by itself, whatever lies in one with it."""
    table, contents = chunk_files.write_chunks(tmp_path, [2, 7, 1], piece=PAGE)
    chunk, sizes, real = table.chunks[1], [], os.preadv

    def preadv(fd, buffers, offset):
        sizes.append(real(fd, buffers, offset))
        return sizes[-1]

    monkeypatch.setattr(nvme.os, "preadv", preadv)
    monkeypatch.setattr(nvme, "PIECE_BYTES", most * PAGE)
    reader, slab = open_reader(table)
    fetch(reader, slab, chunk).wait()
    assert data_of(slab, chunk) == contents[1]
    assert sum(sizes) == len(chunk.reads) * PAGE and max(sizes) == min(most, 7) * PAGE
    assert len(sizes) == -(-7 // most)
    for number, read in enumerate(chunk.reads):
        text = bytearray(table.files[0].read_bytes())
        text[read.offset + 5] ^= 1
        broken = tmp_path / "broken.bin"
        broken.write_bytes(text)
        damaged, slab = open_reader(replace(table, files=(broken,)))
        with pytest.raises(IntegrityError, match=f"block {number} of chunk 1, bytes {read.offset} to"):
            fetch(damaged, slab, chunk).wait()


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 1), st.integers(1, 9))),
    st.integers(1, 12),
)
def test_joined_reads_are_the_reads(steps, most):
    """In order, none lost, none torn; what is joined continues in one file and one place, up to a length."""
    reads, offset, at = [], 0, 0
    for file, gap, hole, pages in steps:
        offset, at = offset + gap * PAGE, at + hole * PAGE
        reads.append(Read(file, offset, pages * PAGE, at, pages * PAGE))
        offset, at = offset + pages * PAGE, at + pages * PAGE
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(nvme, "PIECE_BYTES", most * PAGE)
        pieces = list(joined(reads))
    assert [read for piece in pieces for read in piece] == reads
    for piece in pieces:
        first, last = piece[0], piece[-1]
        assert len({read.file for read in piece}) == 1
        assert last.offset - first.offset == last.at - first.at
        total = sum(read.nbytes for read in piece)
        assert last.offset + last.nbytes - first.offset == total
        assert len(piece) == 1 or total <= most * PAGE
    for piece, follower in pairwise(pieces):  # nothing was left apart that could be joined
        last, first = piece[-1], follower[0]
        is_next = (first.file, first.offset, first.at) == (
            last.file,
            last.offset + last.nbytes,
            last.at + last.nbytes,
        )
        assert not is_next or sum(read.nbytes for read in piece) + first.nbytes > most * PAGE


@pytest.mark.parametrize("code", [errno.EIO, errno.ENODEV])
def test_a_read_error_is_reported_with_file_and_block(tmp_path, open_reader, monkeypatch, code):
    table, contents = chunk_files.write_chunks(tmp_path, [2, 6])
    bad = table.chunks[1].reads[2]
    real = os.preadv

    def preadv(fd, buffers, offset):
        if offset == bad.offset:
            raise OSError(code, os.strerror(code))
        return real(fd, buffers, offset)

    monkeypatch.setattr(nvme.os, "preadv", preadv)
    monkeypatch.setattr(nvme, "PIECE_BYTES", 2 * PAGE)  # as long as a block: none are joined
    reader, slab = open_reader(table)
    with pytest.raises(MachineError) as caught:
        fetch(reader, slab, table.chunks[1]).wait()
    assert caught.value.code == "ZI-5321"
    assert f"{table.files[0]}: block 2 of chunk 1, bytes {bad.offset}" in str(caught.value)
    fetch(reader, slab, table.chunks[0]).wait()
    assert data_of(slab, table.chunks[0]) == contents[0]


def test_pages_are_found_before_the_read_and_nothing_around_it_changes(tmp_path, open_reader, monkeypatch):
    """Each huge page that the read fills has been stored to when it begins, and no byte outside has."""
    table, _ = chunk_files.write_chunks(tmp_path, [7], piece=5 * PAGE)
    slab, stored = HostSlab(4 * HUGE_PAGE), []
    slab.bytes_N.fill_(9)
    monkeypatch.setattr(nvme, "memset", lambda address, value, count: stored.append(address - begin))
    begin = slab.bytes_N.data_ptr()
    nvme._find_pages(slab.bytes_N[PAGE : PAGE + 2 * HUGE_PAGE].numpy())
    assert stored == [PAGE, HUGE_PAGE, 2 * HUGE_PAGE]
    stored.clear()
    nvme._find_pages(slab.bytes_N[HUGE_PAGE : 2 * HUGE_PAGE].numpy())
    assert stored == [HUGE_PAGE]
    monkeypatch.undo()
    nvme._find_pages(slab.bytes_N[PAGE : PAGE + HUGE_PAGE].numpy())
    assert (slab.bytes_N != 9).nonzero().flatten().tolist() == [PAGE, HUGE_PAGE]
    slab.close()

    reader, slab = open_reader(table)
    real, order = os.preadv, []
    monkeypatch.setattr(nvme, "memset", lambda *_: order.append("store"))
    monkeypatch.setattr(nvme.os, "preadv", lambda *words: (order.append("read"), real(*words))[1])
    reader._pool.shutdown()
    reader._pool = ThreadPoolExecutor(1)
    fetch(reader, slab, table.chunks[0]).wait()
    found = [what for what, _ in groupby(order)]  # a read may reach into a second huge page
    assert found == ["store", "read"] * len(list(nvme.joined(table.chunks[0].reads)))


@pytest.mark.parametrize("most", [PAGE, PAGE + 512, 700])
def test_short_reads_are_gone_on_with(tmp_path, open_reader, monkeypatch, most):
    """Also where a direct read stops inside a page, or (700) never gets to the end of one."""
    table, contents = chunk_files.write_chunks(tmp_path, [7], shift=8, piece=5 * PAGE)
    real = os.preadv
    monkeypatch.setattr(nvme.os, "preadv", lambda fd, buffers, offset: min(real(fd, buffers, offset), most))
    reader, slab = open_reader(table)
    fetch(reader, slab, table.chunks[0]).wait()
    assert data_of(slab, table.chunks[0]) == contents[0]
    assert reader._files._files[0].is_direct == (most >= PAGE)


def test_who_sees_a_file_not_direct_may_read_from_any_byte(tmp_path, open_reader, monkeypatch):
    """Reads go on from any byte as soon as `is_direct` is gone, so the descriptor must have changed before."""
    table, contents = chunk_files.write_chunks(tmp_path, [7], shift=8, piece=5 * PAGE)
    reader, slab = open_reader(table)
    real, real_fcntl, seen = os.preadv, nvme.fcntl.fcntl, []

    def fcntl(fd, command, flags=0):
        if command == nvme.fcntl.F_SETFL and not flags & os.O_DIRECT:
            seen.append(reader._files._files[0].is_direct)
        return real_fcntl(fd, command, flags)

    monkeypatch.setattr(nvme.os, "preadv", lambda fd, buffers, offset: min(real(fd, buffers, offset), 700))
    monkeypatch.setattr(nvme.fcntl, "fcntl", fcntl)
    fetch(reader, slab, table.chunks[0]).wait()
    assert seen[0] and data_of(slab, table.chunks[0]) == contents[0]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("when", ["open", "read"])
def test_without_direct_reads_the_page_cache_serves(tmp_path, open_reader, monkeypatch, caplog, code, when):
    table, contents = chunk_files.write_chunks(tmp_path, [3, 20], shift=8)
    real_fcntl, real_preadv, direct = nvme.fcntl.fcntl, os.preadv, set()

    def fcntl(fd, command, flags=0):
        if command == nvme.fcntl.F_SETFL:
            direct.discard(fd)
            if flags & os.O_DIRECT:
                direct.add(fd)
                if when == "open":
                    raise OSError(code, os.strerror(code))
        return real_fcntl(fd, command, flags)

    def preadv(fd, buffers, offset):
        if fd in direct:
            raise OSError(code, os.strerror(code))
        return real_preadv(fd, buffers, offset)

    monkeypatch.setattr(nvme.fcntl, "fcntl", fcntl)
    monkeypatch.setattr(nvme.os, "preadv", preadv)
    reader, slab = open_reader(table)
    with caplog.at_level(logging.WARNING, "zinfer"):
        for chunk, content in zip(table.chunks, contents, strict=True):
            fetch(reader, slab, chunk).wait()
            assert data_of(slab, chunk) == content
    assert caplog.text.count("no direct reads") == 1


def test_a_file_that_is_not_there_is_a_typed_error(tmp_path, open_reader):
    table, _ = chunk_files.write_chunks(tmp_path, [1])
    reader, slab = open_reader(table)
    table.files[0].unlink()
    with pytest.raises(MachineError, match="cannot be read"):
        fetch(reader, slab, table.chunks[0]).wait()
    os.mkfifo(table.files[0])
    with pytest.raises(CheckpointError, match="not a regular file"):
        fetch(reader, slab, table.chunks[0]).wait()


def test_reading_beyond_the_place_is_refused(tmp_path, open_reader):
    table, _ = chunk_files.write_chunks(tmp_path, [4], shift=8)
    reader, slab = open_reader(table)
    ticket = Ticket(table.chunks[0])
    reader.begin(ticket, slab.bytes_N[: 2 * PAGE].numpy(), ticket.land)
    with pytest.raises(InternalError, match="beyond"):
        ticket.wait()


def test_what_is_cancelled_before_it_begins_reads_nothing(tmp_path, open_reader):
    table, _ = chunk_files.write_chunks(tmp_path, [4])
    reader, slab = open_reader(table)
    ticket = Ticket(table.chunks[0])
    ticket.cancel()
    reader.begin(ticket, slab.bytes_N.numpy(), ticket.land)
    with pytest.raises(MachineError, match="ZI-5301"):
        ticket.wait()
    assert not slab.bytes_N.any()


def test_pieces_are_read_in_the_order_of_issue_four_at_a_time(tmp_path, open_reader, monkeypatch):
    table, _ = chunk_files.write_chunks(tmp_path, [8, 8], piece=PAGE)
    real, lock, started, running, most = os.preadv, threading.Lock(), [], set(), []
    meet = threading.Barrier(4, timeout=20)

    def preadv(fd, buffers, offset):
        with lock:
            started.append(offset)
            running.add(offset)
            most.append(len(running))
        meet.wait()
        try:
            return real(fd, buffers, offset)
        finally:
            with lock:
                running.discard(offset)

    monkeypatch.setattr(nvme.os, "preadv", preadv)
    monkeypatch.setattr(nvme, "PIECE_BYTES", PAGE)
    reader, slab = open_reader(table)
    spare = HostSlab(8 * PAGE)
    tickets = [Ticket(chunk) for chunk in table.chunks]
    for ticket, place in zip(tickets, (slab, spare), strict=True):
        reader.begin(ticket, place.bytes_N.numpy(), ticket.land)
    for ticket in tickets:
        ticket.wait()
    in_order = [read.offset for chunk in table.chunks for read in chunk.reads]
    for four in range(0, 16, 4):  # within four at a time the threads race
        assert sorted(started[four : four + 4]) == in_order[four : four + 4]
    assert max(most) == nvme.IN_FLIGHT
    spare.close()


def test_the_switch_interval_is_short_while_any_files_are_open():
    before = sys.getswitchinterval()
    first, second = Files([]), Files([])
    assert sys.getswitchinterval() == pytest.approx(5e-4)
    first.close()
    first.close()
    assert sys.getswitchinterval() == pytest.approx(5e-4)
    second.close()
    assert sys.getswitchinterval() == before


def test_a_paced_link_takes_transfers_one_after_another(monkeypatch):
    now = [10.0]
    monkeypatch.setattr("zinfer.memory.links.time.perf_counter", lambda: now[0])
    pace = Pace(Link(bytes_per_s=100, latency_s=0.5))
    assert [pace.reserve(200), pace.reserve(100)] == [12.5, 13.5]  # their latencies overlap
    now[0] = 20.0
    assert pace.reserve(100) == 21.5


def test_a_ticket_lands_once_for_all_who_wait(tmp_path):
    table, _ = chunk_files.write_chunks(tmp_path, [1])
    ticket = Ticket(table.chunks[0])
    assert (ticket.done, ticket.error) == (False, None)
    threading.Timer(0.01, ticket.land, [MachineError("ZI-0000", "broken")]).start()
    for _ in range(2):
        with pytest.raises(MachineError, match="broken"):
            ticket.wait()
    assert ticket.done
