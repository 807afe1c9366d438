"""Spilled pages: what comes back is what went, or nothing does; the disk may be full, slow to tell, or lie."""

import errno
import os
import subprocess
import sys

import pytest
import torch
from faulty_disk import ShortDisk, StepDisk, disk_full, io_error
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from zinfer.errors import BudgetError, InternalError, MachineError, UsageError
from zinfer.kvcache.cache import PagedKv
from zinfer.kvcache.pages import PAGE_TOKENS, pages_for
from zinfer.kvcache.spill import spill_folder

NUM_PAGES, LAYERS, HEADS, DIM = 12, 2, 2, 4


def cache(folder, **options):
    return PagedKv(
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        head_dim=DIM,
        num_pages=NUM_PAGES,
        dtype="BF16",
        spill_folder=folder,
        **options,
    )


def feed(kv, id_, count, seed):
    """Commit rows that a seed names; returns them as [layers, 2, count, K, D]."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(LAYERS, 2, count, HEADS, DIM, generator=draw).bfloat16()
    view = kv.view([id_], (0, count))
    for layer in range(LAYERS):
        view.stage(layer, *rows[layer])
    view.commit()
    return rows


def held(kv, id_):
    """All committed rows as [layers, 2, n, K, D]."""
    view = kv.view([id_], (0, 0))
    layers = [list(zip(*view.past(layer, 0), strict=True)) for layer in range(LAYERS)]
    if not layers[0]:
        return torch.empty(LAYERS, 2, 0, HEADS, DIM, dtype=torch.bfloat16)
    return torch.stack([torch.stack([torch.cat(kind) for kind in both]) for both in layers])


def damage(kv, id_):
    """Flip one bit in the middle of the copy on disk."""
    copy = kv._spilled[id_]
    at = copy.nbytes // 2
    (byte,) = os.pread(copy._fd, 1, at)
    os.pwrite(copy._fd, bytes([byte ^ 4]), at)


class Sequences(RuleBasedStateMachine):
    """Growth, spill, restore and closing against plain tensors."""

    ids = Bundle("ids")

    def __init__(self):
        super().__init__()
        self.kv = cache(None)
        self.rows, self.pages, self.spilled, self.next_id = {}, {}, set(), 0

    def free(self):
        return NUM_PAGES - sum(count for id_, count in self.pages.items() if id_ not in self.spilled)

    @rule(target=ids, tokens=st.integers(0, 60))
    def open(self, tokens):
        try:
            self.kv.open(self.next_id, tokens)
        except BudgetError:
            assert pages_for(tokens) > self.free()
            return multiple()
        self.pages[self.next_id] = pages_for(tokens)
        self.rows[self.next_id] = torch.empty(LAYERS, 2, 0, HEADS, DIM, dtype=torch.bfloat16)
        self.next_id += 1
        return self.next_id - 1

    @rule(id_=ids, count=st.integers(1, 40), seed=st.integers(0, 99))
    def feed(self, id_, count, seed):
        if id_ not in self.rows or id_ in self.spilled:
            return
        total = self.rows[id_].shape[2] + count
        missing = max(pages_for(total) - self.pages[id_], 0)
        is_grown = self.kv.grow(id_, total)
        assert is_grown == (missing <= self.free())
        if is_grown:
            self.pages[id_] += missing
            self.rows[id_] = torch.cat([self.rows[id_], feed(self.kv, id_, count, seed)], 2)

    @rule(id_=ids)
    def spill(self, id_):
        if id_ in self.rows and id_ not in self.spilled:
            assert self.kv.spill(id_) == self.rows[id_].nbytes
            self.spilled.add(id_)

    @rule(id_=ids, extra=st.integers(0, 40), is_damaged=st.booleans())
    def restore(self, id_, extra, is_damaged):
        if id_ not in self.spilled:
            return
        length = self.rows[id_].shape[2]
        is_damaged = is_damaged and length > 0
        if is_damaged:
            damage(self.kv, id_)
        try:
            is_whole = self.kv.restore(id_, length + extra)
        except BudgetError:
            assert pages_for(length + extra) > self.free()
            if is_damaged:  # put the bit right again: the copy stays
                damage(self.kv, id_)
            return
        self.spilled.remove(id_)
        assert is_whole != is_damaged
        self.pages[id_] = pages_for(length + extra)
        if not is_whole:
            del self.rows[id_], self.pages[id_]

    @rule(id_=consumes(ids))
    def close(self, id_):
        if id_ in self.rows:
            self.kv.close(id_)
            self.spilled.discard(id_)
            del self.rows[id_], self.pages[id_]

    @invariant()
    def every_page_and_every_row_is_where_it_should_be(self):
        self.kv.check()
        assert self.kv.free_tokens == self.free() * PAGE_TOKENS
        for id_, rows in self.rows.items():
            assert self.kv.length(id_) == rows.shape[2]
            assert self.kv.spilled_tokens(id_) == (rows.shape[2] if id_ in self.spilled else None)
            if id_ not in self.spilled:
                assert torch.equal(held(self.kv, id_), rows)

    def teardown(self):
        self.kv.end()


TestSequences = Sequences.TestCase
TestSequences.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_sequence_comes_back_into_other_pages(tmp_path):
    kv = cache(tmp_path)
    kv.open(1, 40)
    rows = feed(kv, 1, 37, seed=1)
    before = list(kv.tables[1].runs)
    assert kv.spill(1) == rows.nbytes
    assert kv.free_tokens == kv.capacity_tokens
    kv.open(2, 5)
    feed(kv, 2, 5, seed=2)
    assert kv.restore(1, 60)
    assert kv.tables[1].runs != before
    assert kv.tables[1].room >= 60
    assert torch.equal(held(kv, 1), rows)
    assert kv.spilled_tokens(1) is None


def test_the_file_has_no_name_and_leaves_nothing(tmp_path):
    kv = cache(tmp_path)
    kv.open(1, 16)
    feed(kv, 1, 16, seed=1)
    kv.spill(1)
    assert list(tmp_path.iterdir()) == []
    fd = kv._spilled[1]._fd
    kv.end()
    with pytest.raises(OSError):
        os.fstat(fd)


def test_a_killed_process_leaves_nothing(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from zinfer.kvcache.cache import PagedKv\n"
        "kv = PagedKv(num_layers=1, num_kv_heads=1, head_dim=4, num_pages=4, dtype='F32',"
        " spill_folder=Path(sys.argv[1]))\n"
        "kv.open(0, 16)\n"
        "kv.tables[0].length = 16\n"
        "assert kv.spill(0) > 0\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", [disk_full, io_error])
def test_a_disk_that_refuses_costs_nothing_but_the_spill(fault, tmp_path):
    for at in range(5):  # the opening, and each of the writes
        kv = cache(tmp_path, disk=StepDisk(at, fault))
        kv.open(1, 40)
        rows = feed(kv, 1, 37, seed=1)
        num_files = len(os.listdir("/proc/self/fd"))
        with pytest.raises(MachineError, match="refused") as caught:
            kv.spill(1)
        assert caught.value.code == "ZI-5501"
        assert len(os.listdir("/proc/self/fd")) == num_files
        assert kv.spilled_tokens(1) is None
        assert torch.equal(held(kv, 1), rows)
        kv.check()
        kv.close(1)
        assert kv.free_tokens == kv.capacity_tokens


def test_a_folder_that_is_not_there_is_a_refusal(tmp_path):
    kv = cache(tmp_path / "missing")
    kv.open(1, 5)
    with pytest.raises(MachineError) as caught:
        kv.spill(1)
    assert "memory.disk" in caught.value.remedy
    assert kv.length(1) == 0


def test_where_copies_go(tmp_path):
    assert spill_folder(str(tmp_path), tmp_path / "model") == tmp_path
    assert spill_folder(None, tmp_path) == tmp_path
    assert spill_folder(None, tmp_path / "missing").is_dir()
    with pytest.raises(UsageError, match="no folder"):
        spill_folder(str(tmp_path / "missing"), tmp_path)


def test_a_disk_that_takes_little_at_a_time(tmp_path):
    kv = cache(tmp_path, disk=ShortDisk())
    kv.open(1, 40)
    rows = feed(kv, 1, 40, seed=3)
    kv.spill(1)
    assert kv.restore(1, 40)
    assert torch.equal(held(kv, 1), rows)


@pytest.mark.parametrize("fault", ["bit", "short", "io"])
def test_a_damaged_copy_never_becomes_tokens(fault, tmp_path, monkeypatch):
    kv = cache(tmp_path)
    kv.open(1, 40)
    feed(kv, 1, 37, seed=1)
    kv.spill(1)
    copy = kv._spilled[1]
    if fault == "bit":
        damage(kv, 1)
    elif fault == "short":
        os.ftruncate(copy._fd, copy.nbytes - 1)
    else:

        def fail(*_):
            raise OSError(errno.EIO, "no")

        monkeypatch.setattr("zinfer.kvcache.spill.os.readv", fail)
    assert not kv.restore(1, 40)
    assert kv.spilled_tokens(1) is None
    assert 1 not in kv.tables
    assert kv.free_tokens == kv.capacity_tokens
    kv.open(1, 40)  # and is computed again


def test_every_bit_is_guarded(tmp_path):
    """The first and last byte of every piece: layers, keys and values."""
    kv = cache(tmp_path)
    kv.open(1, 5)
    rows = feed(kv, 1, 5, seed=1)
    piece = rows.nbytes // (2 * LAYERS)
    for at in [edge for i in range(2 * LAYERS) for edge in (i * piece, (i + 1) * piece - 1)]:
        kv.spill(1)
        copy = kv._spilled[1]
        (byte,) = os.pread(copy._fd, 1, at)
        os.pwrite(copy._fd, bytes([byte ^ 128]), at)
        assert not kv.restore(1, 5), at
        kv.open(1, 5)
        feed(kv, 1, 5, seed=1)


def test_a_sequence_is_in_one_place(tmp_path):
    kv = cache(tmp_path)
    kv.open(1, 5)
    kv.spill(1)
    with pytest.raises(InternalError):
        kv.open(1, 5)
    kv.open(2, NUM_PAGES * PAGE_TOKENS)
    with pytest.raises(BudgetError):
        kv.restore(1, 5)
    assert kv.spilled_tokens(1) == 0
    kv.close(2)
    assert kv.restore(1, 5)
