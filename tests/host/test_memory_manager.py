"""The chunk manager: whatever is called in whatever order, a lease shows the right bytes and the books balance."""

import errno
import os
import random
import time
from contextlib import ExitStack

import chunk_files
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from zinfer.chunks.table import RowTable
from zinfer.errors import BudgetError, IntegrityError, InternalError, MachineError
from zinfer.memory import nvme
from zinfer.memory.assemble import open_manager
from zinfer.memory.residency import State
from zinfer.plan.evict import Belady, Lru
from zinfer.plan.records import Budget, Tier

PAGES = [1, 3, 2, 3, 1, 2, 3]


def open_cpu(table, resident=(0, 4), slots=2, **options):
    """A manager with a budget that fits to the byte."""
    placement = chunk_files.cpu_placement(table, resident, slots)
    budget = Budget(host=chunk_files.needed_bytes(table, placement, Tier.HOST))
    return open_manager(table, placement, budget, **options)


def open_sim(table, resident=(0, 4), host=(1, 5), slots=2, staging=1, **options):
    """The same with a simulated device, a host tier and staging."""
    placement = chunk_files.sim_placement(table, resident, host, slots, staging)
    budget = Budget(*(chunk_files.needed_bytes(table, placement, tier) for tier in (Tier.HOST, Tier.DEVICE)))
    return open_manager(table, placement, budget, device="sim", machine=chunk_files.FAST, **options)


OPEN = {"cpu": open_cpu, "sim": open_sim}


@pytest.fixture(params=OPEN)
def open_either(request):
    """Open managers on both devices; all are closed, balanced, at the end."""
    with ExitStack() as closing:

        def opened(table, **options):
            manager = OPEN[request.param](table, **options)
            closing.callback(manager.close)
            closing.callback(manager.check)
            return manager

        yield opened


def shows(manager, number, contents):
    """Lease a chunk and compare what it shows with the file."""
    with manager.lease(number) as lease:
        return chunk_files.bytes_of(lease, manager.table.chunks[number]) == contents[number]


@pytest.mark.parametrize("shift", [0, 8])
def test_every_pass_shows_the_files_bytes(tmp_path, open_either, shift):
    table, contents = chunk_files.write_chunks(tmp_path, PAGES, shift=shift)
    manager = open_either(table)
    for _ in range(3):
        for number in range(len(PAGES)):
            manager.prefetch(number)
            assert shows(manager, number, contents)
            if not manager.placement.resident(number):
                manager.evict(number)
            manager.check()
    stats = manager.stats()
    assert stats.surprises == 0
    assert stats.num_fetches == 2 + 3 * 5
    assert stats.peak_bytes[manager.placement.compute_tier] <= chunk_files.needed_bytes(
        table, manager.placement, manager.placement.compute_tier
    )


def test_views_are_typed_aligned_and_the_same_each_time(tmp_path, open_either):
    table, _ = chunk_files.write_chunks(tmp_path, PAGES, shift=8)
    manager = open_either(table)
    for number, chunk in enumerate(table.chunks):
        with manager.lease(number) as lease:
            for piece in chunk.tensors:
                assert lease[piece.key].shape == piece.shape
                assert lease[piece.key].data_ptr() % 64 == 0
                assert lease[piece.key] is lease.views[piece.key]
            assert lease.views[chunk.tensors[1].key].dtype is torch.bfloat16
            with manager.lease(number) as again:
                assert again.views is lease.views
    assert manager.device.type == "cpu"


def test_prefetch_answers_with_the_ticket_that_is_there(tmp_path, open_either):
    table, _ = chunk_files.write_chunks(tmp_path, PAGES)
    manager = open_either(table)
    ticket = manager.prefetch(1)
    assert manager.prefetch(1) is ticket
    ticket.wait()
    assert manager.prefetch(1) is ticket
    assert ticket.done
    assert ticket.error is None
    with manager.lease(1):
        assert manager.prefetch(1) is ticket
    assert manager.stats().num_fetches == 1


def test_a_leased_chunk_cannot_be_evicted(tmp_path, open_either):
    table, contents = chunk_files.write_chunks(tmp_path, PAGES)
    manager = open_either(table, policy=Lru())
    with manager.lease(1), manager.lease(2):
        with pytest.raises(InternalError, match=r"ZI-0121.*chunk 1 is leased"):
            manager.evict(1)
        with pytest.raises(InternalError, match="ZI-5401"):
            manager.prefetch(3)  # both slots are leased, the policy may not touch them
        with pytest.raises(InternalError, match="ZI-5401"):
            manager.lease(3)
        manager.check()
    assert shows(manager, 3, contents)


def test_without_a_policy_a_fetch_too_many_is_the_schedules_mistake(tmp_path, open_either):
    table, _ = chunk_files.write_chunks(tmp_path, PAGES)
    manager = open_either(table)
    manager.prefetch(1)
    manager.prefetch(2)
    with pytest.raises(InternalError, match=r"no place for chunk 3 .* 2 slots"):
        manager.prefetch(3)
    manager.check()


def test_an_ended_lease_gives_nothing_and_knows_that_it_is_stale(tmp_path, open_either):
    table, _ = chunk_files.write_chunks(tmp_path, PAGES)
    manager = open_either(table)
    key = table.chunks[1].tensors[0].key
    with manager.lease(1) as lease:
        assert not lease.is_stale
    with pytest.raises(InternalError, match="ZI-0151"):
        lease[key]
    assert not lease.is_stale
    manager.evict(1)
    assert lease.is_stale
    with manager.lease(1) as again:  # the same slot again: still another generation
        assert again.views is lease.views
        assert lease.is_stale
    lease.release()


@pytest.mark.parametrize("order", [[6, 5, 4, 3, 2, 1, 0], [1, 1, 3, 5, 5, 2, 2, 6, 0], [2, 6, 2, 6, 3, 1]])
def test_an_order_that_was_not_planned_is_counted_and_right(tmp_path, open_either, order):
    """G6: the schedule fetches 0..6 in turn and again, the pass uses `order`."""
    table, contents = chunk_files.write_chunks(tmp_path, PAGES)
    manager = open_either(table)
    scheduled = 0
    for number in order:
        manager.prefetch(scheduled)
        assert shows(manager, number, contents)
        manager.check()
        if not manager.placement.resident(scheduled):
            manager.evict(scheduled)
        scheduled = (scheduled + 1) % len(PAGES)
    assert manager.surprises == manager.stats().surprises > 0


def test_a_late_fetch_waits_for_what_is_on_its_way(tmp_path, open_either, monkeypatch):
    table, contents = chunk_files.write_chunks(tmp_path, PAGES)
    real = os.preadv
    monkeypatch.setattr(nvme.os, "preadv", lambda *a: time.sleep(0.01) or real(*a))
    manager = open_either(table)
    manager.prefetch(1)
    manager.prefetch(2)
    assert shows(manager, 3, contents)  # no slot was free, and nothing had arrived
    assert shows(manager, 2, contents)
    assert manager.stats().wait_s > 0


def test_what_was_prefetched_can_be_evicted_before_it_arrives(tmp_path, open_either, monkeypatch):
    table, contents = chunk_files.write_chunks(tmp_path, PAGES)
    real = os.preadv
    monkeypatch.setattr(nvme.os, "preadv", lambda *a: time.sleep(0.005) or real(*a))
    manager = open_either(table)
    for number in (1, 2, 3, 5):
        manager.prefetch(number)
        manager.evict(number)
        manager.check()
    manager.evict(6)  # was never there
    assert shows(manager, 6, contents)


def break_reads(monkeypatch, table, numbers, code=errno.EIO):
    """Reads of these chunks fail until the list is emptied."""
    real = os.preadv

    def preadv(fd, buffers, offset):
        for number in numbers:
            if any(read.offset == offset for read in table.chunks[number].reads):
                raise OSError(code, os.strerror(code))
        return real(fd, buffers, offset)

    monkeypatch.setattr(nvme.os, "preadv", preadv)


def test_an_error_surfaces_at_the_lease_and_gives_the_bytes_back(tmp_path, open_either, monkeypatch):
    table, contents = chunk_files.write_chunks(tmp_path, PAGES)
    bad = [2, 0, 5]
    break_reads(monkeypatch, table, bad)
    manager = open_either(table)
    for number in list(bad):
        ticket = manager.prefetch(number)
        ticket.join()
        assert isinstance(ticket.error, MachineError)
        manager.check()  # books the failure, which is not forgotten
        with pytest.raises(MachineError, match=f"chunk {number}"):
            manager.lease(number)
        with pytest.raises(MachineError, match=f"chunk {number}"):
            manager.lease(number)  # a fresh try
        manager.check()
    ledger = manager._memory.tiers[manager.placement.compute_tier].ledger
    assert ledger.free_bytes == ledger.capacity_bytes
    bad.clear()
    for number in range(len(PAGES)):
        manager.prefetch(number)
        assert shows(manager, number, contents)
        manager.evict(number)


def test_a_flipped_bit_never_becomes_a_weight(tmp_path, open_either):
    table, contents = chunk_files.write_chunks(tmp_path, PAGES)
    path, read = table.files[0], table.chunks[3].reads[1]
    text = bytearray(path.read_bytes())
    text[read.offset] ^= 1
    path.write_bytes(text)
    manager = open_either(table)
    with pytest.raises(IntegrityError, match=f"{path.name}: block 1 of chunk 3"):
        manager.lease(3)
    assert shows(manager, 2, contents)


def test_after_an_error_the_streamed_chunks_are_dropped(tmp_path, open_either, monkeypatch):
    table, contents = chunk_files.write_chunks(tmp_path, PAGES)
    bad = [2]
    break_reads(monkeypatch, table, bad)
    manager = open_either(table)
    manager.prefetch(0)
    assert shows(manager, 0, contents)
    manager.prefetch(1)
    manager.prefetch(2)
    with pytest.raises(MachineError):
        manager.lease(2)
    manager.drop_streamed()
    manager.check()
    bad.clear()
    fetches = manager.stats().num_fetches
    for number in range(len(PAGES)):
        manager.prefetch(number)
        assert shows(manager, number, contents)
        if not manager.placement.resident(number):
            manager.evict(number)
    assert manager.stats().num_fetches == fetches + 6  # chunk 0 had stayed
    assert manager.surprises == 0


def test_a_lease_that_was_left_behind_ends_with_the_pass(tmp_path, open_either):
    """Ctrl-C between lease() and its `with` must not leave a slot leased for ever."""
    table, contents = chunk_files.write_chunks(tmp_path, PAGES)
    manager = open_either(table)
    left, kept = manager.lease(1), manager.lease(0)
    manager.lease(1)
    manager.drop_streamed()
    manager.check()
    assert left.is_stale
    assert not kept.is_stale
    with manager.lease(1):
        left.release()  # of another generation: no matter
        manager.check()
        with pytest.raises(InternalError, match="leased"):
            manager.evict(1)
    kept.release()
    for number in (2, 3):
        manager.prefetch(number)
        manager.evict(1)
        assert shows(manager, number, contents)


def test_rows_come_from_where_they_are(tmp_path, open_either):
    for number, home in ((0, "compute tier"), (1, "host below a device, or disk"), (3, "disk")):
        table, contents = chunk_files.write_chunks(tmp_path, PAGES, shift=8, seed=number)
        table = chunk_files.with_rows(table, number)
        manager = open_either(table)
        name, num_rows = f"w{number}", table.chunks[number].tensors[0].stop
        ids = torch.tensor([5, 0, num_rows - 1, 5, 7])
        want = torch.frombuffer(bytearray(contents[number]), dtype=torch.float32)[: num_rows * 16].view(
            -1, 16
        )
        for state in ("absent", "there"):
            rows = manager.rows(name, ids)
            assert torch.equal(rows.view(torch.int32), want[ids].view(torch.int32)), (home, state)
            assert shows(manager, number, contents)
            manager.check()
        before = manager.stats().link_bytes["disk"]
        manager.rows(name, ids)
        is_read = manager.placement.home[number] is Tier.DISK
        assert (manager.stats().link_bytes["disk"] > before) == is_read
        assert manager.rows(name, ids[:0]).shape == (0, 16)


def test_rows_are_put_together_from_parts(tmp_path):
    """A tied head that is cut into chunks: one part stays, the other is on disk."""
    table, _ = chunk_files.write_chunks(tmp_path, [2, 2])
    first, second = table.chunks
    rows = first.tensors[0].stop
    text = table.files[0].read_bytes()
    begin = second.reads[0].offset
    table.files[0].write_bytes(text[:begin] + text[:begin])  # the second part repeats the first's bytes

    def piece(chunk, start):
        slices = (type(chunk.tensors[0])("head", start, start + rows, (rows, 16), "F32", 0, rows * 64),)
        return type(chunk)(chunk.id, chunk.ops, slices, first.reads, (), chunk.nbytes, chunk.weight_bytes)

    tables = {"head": RowTable("head", 0, 0, 64, 2 * rows, (16,), "F32")}
    table = type(table)(table.files, (piece(first, 0), piece(second, rows)), tables)
    manager = open_cpu(table, resident=(0,), slots=1)
    manager.lease(0).release()
    head = torch.frombuffer(bytearray(table.files[0].read_bytes()), dtype=torch.float32)[: rows * 32].view(
        -1, 16
    )
    ids = torch.tensor([0, rows + 1, rows - 1, 3, rows])
    assert torch.equal(manager.rows("head", ids).view(torch.int32), head[ids].view(torch.int32))
    manager.close()


def test_a_row_table_goes_to_host_memory_also_below_a_device(tmp_path):
    table, contents = chunk_files.write_chunks(tmp_path, [2, 3, 2])
    chunk = table.chunks[0]
    bare = type(chunk)(chunk.id, (), chunk.tensors, chunk.reads, (), chunk.nbytes, chunk.weight_bytes)
    table = chunk_files.with_rows(type(table)(table.files, (bare, *table.chunks[1:])), 0)
    manager = open_sim(table, resident=(1,), host=(0,), slots=1)
    manager.prefetch(0)
    manager.evict(0)  # means the compute tier, where it never is
    manager.prefetch(0).wait()
    manager.check()
    before = manager.stats().link_bytes
    assert "h2d" not in before
    want = torch.frombuffer(bytearray(contents[0]), dtype=torch.int32)[:160].view(10, 16)
    assert torch.equal(manager.rows("w0", torch.arange(10)).view(torch.int32), want)
    assert manager.stats().link_bytes == before
    manager.close()
    manager = open_sim(table, resident=(1,), host=(), slots=1)
    with pytest.raises(InternalError, match="read by rows"):
        manager.prefetch(0)
    manager.close()


def test_reservations_and_weights_share_one_budget(tmp_path):
    table, _ = chunk_files.write_chunks(tmp_path, PAGES)
    placement = chunk_files.cpu_placement(table, (0, 4), 2)
    need = chunk_files.needed_bytes(table, placement, Tier.HOST)
    kv = {Tier.HOST: {"kv": 1000}}
    with pytest.raises(BudgetError, match="kv needs"):
        open_manager(table, placement, Budget(host=999), reservations=kv)
    manager = open_manager(table, placement, Budget(host=need + 1000), reservations=kv)
    for number in (0, 4, 1, 2):
        manager.prefetch(number).wait()
    assert manager.stats().peak_bytes == {"host": need + 1000}
    manager.close()
    manager = open_manager(table, placement, Budget(host=need + 999), reservations=kv)
    for number in (0, 4, 1):
        manager.prefetch(number)
    with pytest.raises(InternalError, match="ZI-5401"):
        manager.prefetch(2)
    manager.check()
    manager.close()


def test_a_device_and_a_placement_must_fit(tmp_path):
    table, _ = chunk_files.write_chunks(tmp_path, PAGES)
    placement = chunk_files.cpu_placement(table, (0, 4), 2)
    for device in ("sim", "cuda:0"):
        with pytest.raises(InternalError, match="ZI-5403"):
            open_manager(table, placement, Budget(host=2**20), device=device)


class Slow:
    """Adds a random delay in front of every read."""

    def __init__(self, seed, longest_s=0.002):
        self.random, self.real, self.longest_s, self.bad = random.Random(seed), os.preadv, longest_s, set()

    def __call__(self, fd, buffers, offset):
        time.sleep(self.random.random() * self.longest_s)
        if offset in self.bad:
            raise OSError(errno.EIO, "Input/output error")
        return self.real(fd, buffers, offset)


class ManagerMachine(RuleBasedStateMachine):
    """G1, G2, G3, G5, G7: any calls in any order, reads as slow as they like, disks that fail now and then."""

    device = "cpu"
    chunks = st.integers(0, len(PAGES) - 1)

    @classmethod
    def prepare(cls, folder):
        cls.table, cls.contents = chunk_files.write_chunks(folder, PAGES, shift=8)
        cls.table = chunk_files.with_rows(cls.table, 4)

    def __init__(self):
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.slow = Slow(0)
        self.patch.setattr(nvme.os, "preadv", self.slow)
        self.manager = OPEN[self.device](self.table, policy=Belady(range(len(PAGES))))
        self.leases = []

    @rule(chunk=chunks, as_guest=st.booleans())
    def prefetch(self, chunk, as_guest):
        try:
            self.manager.prefetch(chunk, as_guest=as_guest)
        except InternalError as error:  # every slot is leased or on its way
            assert error.code == "ZI-5401"
            assert as_guest or not self.manager.placement.resident(chunk)

    @precondition(lambda self: len({lease.chunk for lease in self.leases}) < 2)
    @rule(chunk=chunks)
    def lease(self, chunk):
        try:
            self.leases.append(self.manager.lease(chunk))
        except MachineError as error:
            assert self.slow.bad
            assert error.code in ("ZI-5321", "ZI-5301")

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data):
        lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        assert chunk_files.bytes_of(lease, self.table.chunks[lease.chunk]) == self.contents[lease.chunk]
        lease.release()

    @rule(chunk=chunks)
    def evict(self, chunk):
        if any(lease.chunk == chunk for lease in self.leases):
            with pytest.raises(InternalError, match="leased"):
                self.manager.evict(chunk)
        else:
            self.manager.evict(chunk)

    @rule(ids=st.lists(st.integers(0, 60), max_size=5))
    def rows(self, ids):
        if not self.slow.bad:
            rows = self.manager.rows("w4", torch.tensor(ids, dtype=torch.int64))
            want = [self.contents[4][64 * row :][:64] for row in ids]
            assert [row.numpy().tobytes() for row in rows] == want

    @rule(chunk=st.none() | chunks)
    def break_or_mend(self, chunk):
        self.slow.bad = (
            {read.offset for read in self.table.chunks[chunk].reads} if chunk is not None else set()
        )

    @precondition(lambda self: not self.leases)
    @rule()
    def drop_streamed(self):
        self.manager.drop_streamed()

    @invariant()
    def leases_show_their_chunks(self):
        for lease in self.leases:
            assert not lease.is_stale
            assert chunk_files.bytes_of(lease, self.table.chunks[lease.chunk]) == self.contents[lease.chunk]

    @invariant()
    def it_balances(self):
        self.manager.check()
        for memory in self.manager._memory.tiers.values():
            assert memory.ledger.peak_bytes <= memory.ledger.capacity_bytes

    def teardown(self):
        self.manager.close()
        self.patch.undo()
        for memory in self.manager._memory.tiers.values():
            memory.check()
            assert not memory.ledger.held


class SimMachine(ManagerMachine):
    device = "sim"


@pytest.mark.parametrize("machine", [ManagerMachine, SimMachine])
def test_any_sequence_of_calls(tmp_path, machine):
    machine.prepare(tmp_path)
    case = machine.TestCase()
    case.settings = settings(max_examples=15, stateful_step_count=25)
    case.runTest()


def test_states_are_what_they_seem(tmp_path):
    table, _ = chunk_files.write_chunks(tmp_path, PAGES)
    manager = open_sim(table)
    manager.prefetch(1).wait()
    manager.check()
    states = manager._residency
    assert states.state(1, Tier.DEVICE) is states.state(1, Tier.HOST) is State.RESIDENT
    manager.evict(1)
    assert states.state(1, Tier.DEVICE) is State.ABSENT
    assert states.state(1, Tier.HOST) is State.RESIDENT  # its lasting copy
    ticket = manager.prefetch(1)
    assert states.state(1, Tier.HOST) is State.LEASED  # by the copy
    ticket.wait()
    manager.check()
    assert states.state(1, Tier.HOST) is State.RESIDENT
    assert manager.log.num_bytes == {"disk": table.chunks[1].read_bytes, "h2d": 2 * table.chunks[1].nbytes}
    manager.close()
