"""The machine's measurement, on tiny inputs: all is measured, positive and consistent; no seconds are asserted."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from zinfer.chunks.table import PAGE, PIECE_BYTES
from zinfer.config.machine import Machine
from zinfer.config.profiles import fingerprint
from zinfer.kernels.products import linear
from zinfer.memory import measure as measuring
from zinfer.memory.measure import for_files, measure_compute, probe
from zinfer.memory.measure_links import _ranges, measure_disk
from zinfer.runtime.small_model import SmallModel

MIB = 2**20
SHAPES = ((256, 64), (64, 256), (64, 64))


class Idle:
    """A small model whose passes cost nothing."""

    num_ops = 4

    def __init__(self, device):
        self.device = device

    def attention_flops(self, rows, context):
        return float(rows * context)

    def run(self, rows, context, *, exact):
        pass


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(measuring, "_MANY_TOKENS", 96)
    monkeypatch.setattr(measuring, "_PREFILL_ROWS", 8)
    monkeypatch.setattr(measuring, "_POOL_BYTES", MIB)
    monkeypatch.setattr(measuring, "ROWS", (1, 16, 4))


@pytest.fixture
def files(tmp_path):
    sizes = (3 * MIB + 100, 5 * PAGE, PAGE)
    paths = [tmp_path / f"{at}.safetensors" for at in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(np.random.default_rng(0).bytes(size))
    return paths


def test_a_probe_fills_in_what_a_plan_needs(files):
    machine = probe(files, linear, SmallModel, dtype="F32", shapes=SHAPES, seconds=0.05)
    assert machine.measured
    assert machine.fingerprint == fingerprint()
    assert machine.disk_read.bytes_per_s > 0
    assert machine.disk_row_latency_s > 0
    assert set(machine.host.products) == {"F32", "F32 exact"}
    for points in machine.host.products.values():
        rows = [point.rows for point in points]
        assert rows == sorted(rows)
        assert {1, 16} <= set(rows)
    assert machine.host.op_overhead_s > 0
    assert machine.host.step_cost(exact=True).op_overhead_s > 0
    assert Machine.model_validate_json(machine.model_dump_json()) == machine


def test_files_too_small_to_read_directly_are_guessed_too(tmp_path):
    (tmp_path / "small").write_bytes(b"x")
    assert measure_disk([tmp_path / "small"], 0.01) == measure_disk([], 0.01)


def test_without_files_the_disk_is_guessed():
    machine = probe([], linear, Idle, shapes=SHAPES, seconds=0.01)
    assert machine.disk_read.bytes_per_s == 1e9
    assert machine.disk_device == ""


def test_another_disk_is_measured_again_and_the_same_is_not(files):
    machine = probe(files, linear, Idle, shapes=SHAPES, seconds=0.01)
    assert for_files(machine, files) is machine
    assert for_files(machine, []) is machine
    moved = machine.model_copy(update={"disk_device": "7:7", "disk_row_latency_s": 1e9})
    again = for_files(moved, files, seconds=0.02)
    assert again.disk_device == machine.disk_device
    assert again.disk_row_latency_s < 1e9
    declared = moved.model_copy(update={"measured": False})
    assert for_files(declared, files) is declared


def test_ranges_are_direct_reads_inside_the_files(files):
    for nbytes in (PIECE_BYTES, 256 * 1024):
        reads = _ranges(files, nbytes)
        assert {read.file for read in reads} == {0, 1, 2}
        for read in reads:
            assert read.offset % PAGE == read.nbytes % PAGE == 0
            assert 0 < read.nbytes <= nbytes
            assert read.offset + read.nbytes <= files[read.file].stat().st_size


def test_reading_leaves_no_thread_and_no_open_file(files):
    before = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    measure_disk(files, 0.02)
    assert (threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))) == before


def test_exact_mode_is_measured_apart():
    calls = []

    def product(x, weight, *, exact):
        calls.append((tuple(x.shape), exact))
        return linear(x, weight, exact=exact)

    compute = measure_compute(product, Idle, torch.device("cpu"), ("BF16",), SHAPES, 2**30, 0.02)
    assert {exact for _, exact in calls} == {True, False}
    assert {shape[0] for shape, _ in calls} >= {1, 16}
    assert compute.exact is not None


def test_a_small_pass_can_be_repeated_at_any_length():
    small = SmallModel(torch.device("cpu"))
    for rows, context in ((1, 64), (1, 600), (20, 20), (1, 64)):
        small.run(rows, context, exact=False)
    small.run(1, 64, exact=True)
    assert small.num_ops == 2 * 7 + 2
    assert small.attention_flops(1, 100) == 2 * 4 * 100 * 32 * 128
