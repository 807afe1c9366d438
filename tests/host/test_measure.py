"""The machine's measurement, on tiny inputs: all is measured, positive and consistent; no seconds are asserted."""

from types import SimpleNamespace

import pytest
import torch
from chunk_bytes import write_noise
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONFIGS

from zinfer.chunks.table import PAGE
from zinfer.config.machine import Compute, Machine, Overlap, ProductRate
from zinfer.config.profiles import fingerprint
from zinfer.kernels.products import linear
from zinfer.kernels.stored import any_linear
from zinfer.memory import measure as measuring
from zinfer.memory import measure_links, measure_products
from zinfer.memory.measure import for_files, measure_compute, probe
from zinfer.memory.measure_links import typical
from zinfer.plan.cost import OpCosts, PassLoad, stored_seconds_per_byte
from zinfer.runtime.quant_rates import makers, packer_for
from zinfer.runtime.small_model import SmallModel
from zinfer.spec.read import read_spec
from zinfer.spec.stored import as_stored, op_bytes

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

    def replay(self, context, *, exact):
        return None

    def recorded(self, run, *, exact):
        return None


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(measuring, "_MANY_TOKENS", 96)
    monkeypatch.setattr(measuring, "_PREFILL_ROWS", 8)
    monkeypatch.setattr(measuring, "_POOL_BYTES", MIB)
    monkeypatch.setattr(measure_products, "ROWS", (1, 16, 4))


@pytest.fixture
def files(tmp_path):
    return write_noise(tmp_path, (3 * MIB + 100, 5 * PAGE, PAGE))


@pytest.fixture
def ample(monkeypatch):
    """A clock that allows everything, on a busy machine too."""
    monkeypatch.setattr(measuring.Clock, "allows", lambda *_args: True)


def test_a_probe_fills_in_what_a_plan_needs(files, ample):
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
    assert machine.skipped == ()
    assert machine.host.op_overhead_s > 0
    assert 0 < machine.host.chunk_overhead_s != Compute.model_fields["chunk_overhead_s"].default
    assert min(machine.overlap.disk, machine.overlap.compute) >= 1
    assert machine.host.step_cost(exact=True).op_overhead_s > 0
    assert Machine.model_validate_json(machine.model_dump_json()) == machine


def test_what_a_recorded_op_costs_is_measured_where_passes_are_recorded(files, ample):
    plain = probe(files, linear, Idle, dtype="BF16", shapes=SHAPES, seconds=0.05).host
    assert plain.replayed_op_s is plain.step_cost(exact=False).replayed_op_s is None
    replay = SmallModel(torch.device("cpu")).replay(64, exact=True)
    recorded = probe(files, linear, SmallModel, dtype="BF16", shapes=SHAPES, seconds=0.05).host
    assert (recorded.replayed_op_s is None) is (replay is None)
    assert (recorded.step_cost(exact=True).replayed_op_s is None) is (replay is None), "exact passes are too"
    for _ in range(3 if replay else 0):
        replay()


@pytest.mark.parametrize("exact", [True, False])
def test_products_of_few_rows_are_timed_as_recorded_passes_have_them(exact):
    """Python calls them once, for the recording; more rows, and other dtypes, are called every time."""
    small = SmallModel(torch.device("cpu"))
    is_recorded = small.replay(64, exact=exact) is not None
    for dtype, rows, is_once in (
        (torch.bfloat16, 3, is_recorded),
        (torch.bfloat16, 65, False),
        (torch.float32, 3, False),
    ):
        pool = [torch.randn(shape).to(dtype) for shape in SHAPES * 2]
        seen = []

        def product(x_TI, weight, *, exact, seen=seen):
            seen.append(weight)
            return linear(x_TI, weight, exact=exact)

        turns = measure_products.Turns(product, pool, len(SHAPES), small.recorded, exact)
        assert turns.seconds_per_gb(rows, 0.02 if is_once else 0) > 0
        if is_once:
            assert len(seen) == len(pool)
        else:  # one round, and the first product of a recording that was refused
            refused = dtype != torch.bfloat16 and is_recorded
            assert len(seen) == len(SHAPES) + refused
    assert SmallModel(torch.device("cpu"), "F32").replay(64, exact=False) is None


def test_a_probe_without_time_says_what_it_skipped(files):
    """Two points of the first product, and the disk, are measured all the same."""
    machine = probe(files, linear, Idle, dtype="F32", shapes=SHAPES, seconds=0.0)
    assert {name: len(points) for name, points in machine.host.products.items()} == {"F32": 2}
    assert "F32 exact" in machine.skipped
    assert "F32, 4 rows" in machine.skipped
    assert "fixed costs and attention" in machine.skipped
    assert "reads beside products" in machine.skipped
    assert len(set(machine.skipped)) == len(machine.skipped)
    assert machine.overlap == Overlap()
    assert Machine.model_validate_json(machine.model_dump_json()) == machine


def test_reads_beside_products_are_measured_at_two_moments(files, ample, monkeypatch):
    """Before and after all that is computed, by the same product; what both saw counts."""
    order = []

    def overlap_turns(paths, work, _seconds):
        work()
        order.append(paths)
        return [Overlap(disk=1 + len(order) / 10)] * 4

    def measure_compute(*_args):
        order.append("compute")
        return Compute(products={}, attention_flops_per_s=1.0, op_overhead_s=0.0)

    monkeypatch.setattr(measuring.Clock, "left_s", property(lambda _self: 0.05))
    monkeypatch.setattr("zinfer.memory.measure_beside.overlap_turns", overlap_turns)
    monkeypatch.setattr(measuring, "measure_compute", measure_compute)
    machine = probe(files, linear, Idle, dtype="F32", shapes=SHAPES, seconds=0.05)
    assert order == [files, "compute", files]
    assert machine.overlap.disk == pytest.approx(1.1)


def test_only_the_wanted_mode_is_measured(files, ample):
    machine = probe(files, linear, Idle, dtype="F32", shapes=SHAPES, modes=(True,), seconds=0.0)
    assert set(machine.host.products) == {"F32 exact"}
    assert machine.host.seconds_per_byte("F32", 1) > 0


def test_without_files_the_disk_is_guessed():
    machine = probe([], linear, Idle, shapes=SHAPES, seconds=0.01)
    assert machine.disk_read.bytes_per_s == 1e9
    assert machine.disk_device == ""


def test_a_saved_profile_takes_the_disk_as_it_is_now(files):
    machine = probe(files, linear, Idle, shapes=SHAPES, seconds=0.01)
    assert for_files(machine, []) is machine
    stays = for_files(
        machine.model_copy(update={"fresh_bytes_per_s": 7.0, "disk_row_latency_s": 5.0}), files, 0.02
    )
    assert (stays.fresh_bytes_per_s, stays.disk_row_latency_s) == (7.0, 5.0)
    assert stays.disk_read.latency_s == machine.disk_read.latency_s
    moved = machine.model_copy(update={"disk_device": "7:7", "disk_row_latency_s": 1e9})
    again = for_files(moved, files, seconds=0.02)
    assert again.disk_device == machine.disk_device
    assert again.disk_row_latency_s < 1e9
    for other in ({"measured": False}, {"fingerprint": "another machine"}):
        assert for_files(moved.model_copy(update=other), files).disk_row_latency_s == 1e9


def test_the_usual_time_is_the_mean_of_the_machines_own_speeds():
    assert typical([2.0]) == 2.0
    assert typical([1.0] * 5 + [1.3] * 5) == pytest.approx(1.15)
    assert typical([1.0] * 5 + [1.3] * 5 + [9.0, 40.0]) == pytest.approx(1.15), "others' work is left out"
    assert typical([5.0, 1.0, 1.2]) == pytest.approx(1.1), "in any order"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-6, 10), min_size=1, max_size=40))
def test_the_usual_time_lies_between_the_best_and_half_above_the_lowest_decile(times):
    decile = sorted(times)[len(times) // 10]
    assert min(times) * (1 - 1e-9) <= typical(times) <= 1.5 * decile * (1 + 1e-9)


def test_a_products_rate_is_what_passes_get_slow_rounds_and_all(monkeypatch):
    """A third of the rounds are another guest's; a stall is nobody's pass.  `typical` would leave both out."""
    rounds = [1.0, 1.1, 1.9, 1.0, 2.0, 1.05, 1.8, 1.0, 1.1, 9.0]
    now, steps = [0.0], iter(rounds)

    def product(x, weight, *, exact):
        now[0] += next(steps)
        return x.new_zeros(len(x), weight.shape[0])

    monkeypatch.setattr(measure_links.time, "perf_counter", lambda: now[0])
    pool = measure_products.pool_of(
        measure_products.dense(torch.bfloat16), torch.device("cpu"), [(16, 16)], 0
    )
    turns = measure_products.Turns(product, pool, 1, lambda run, *, exact: None, exact=False)
    per_gb = turns.seconds_per_gb(512, sum(rounds) - 0.5)
    wanted = sum(rounds[:-1]) / (len(rounds) - 1)
    assert per_gb == pytest.approx(wanted / pool[0].nbytes * 1e9)
    assert typical(rounds) < 0.9 * wanted, "this test cannot tell the two apart"


def test_exact_mode_is_measured_apart(monkeypatch, ample):
    monkeypatch.setattr(measuring, "typical_seconds", lambda run, *_args: run() or 1e-3)
    calls = []

    def product(x, weight, *, exact):
        calls.append((tuple(x.shape), exact))
        return linear(x, weight, exact=exact)

    compute = measure_compute(
        product, Idle, torch.device("cpu"), ("BF16",), SHAPES, 2**30, measuring.Clock(0.0)
    )
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


def test_quantised_formats_are_measured_by_their_own_bytes(files, ample):
    machine = probe(
        files,
        any_linear,
        Idle,
        dtype="BF16",
        shapes=SHAPES,
        formats=makers(["int4", "published"]),
        seconds=0.05,
    )
    assert machine.skipped == ()
    assert set(machine.host.products) == {"BF16", "BF16 exact", "I4", "I4 exact"}
    spec = as_stored(read_spec(CONFIGS["llama"] | {"torch_dtype": "bfloat16"}), "int4", "panels-64")
    measured = stored_seconds_per_byte(machine.host, "int4", 1, exact=True)
    assert measured == machine.host.seconds_per_byte("I4 exact", 1)
    op = next(op for op in spec.program if op.stored)
    costs = OpCosts(spec, machine.host, PassLoad(1, 1, 16), exact=True)
    assert costs.work(op) == pytest.approx(measured * op_bytes(spec, op))


def test_packing_is_timed_where_weights_may_be_packed_and_a_model_is_asked_about(files, ample, monkeypatch):
    monkeypatch.setattr(measuring, "typical_seconds", lambda run, *_args: run() or 1e-3)
    packed = []
    machine = probe(files, any_linear, Idle, shapes=SHAPES, pack=packed.append, seconds=0.05)
    (matrix,) = packed
    assert matrix.dtype is torch.bfloat16
    assert machine.host.packing_s_per_gb == pytest.approx(1e-3 / matrix.nbytes * 1e9)
    assert probe(files, any_linear, Idle, shapes=SHAPES, seconds=0.05).host.packing_s_per_gb is None
    spec = read_spec(CONFIGS["llama"] | {"torch_dtype": "bfloat16"})
    assert packer_for(spec) is not None
    assert packer_for(as_stored(spec, "int4", "panels-64")) is None
    assert packer_for(read_spec(CONFIGS["llama"] | {"torch_dtype": "float32"})) is None


def test_a_declared_machine_unpacks():
    bf16 = Compute(
        products={"BF16": (ProductRate(rows=1, seconds_per_gb=0.1), ProductRate(rows=100, seconds_per_gb=1))},
        attention_flops_per_s=1e9,
        op_overhead_s=0,
    )
    few, many = (stored_seconds_per_byte(bf16, "int4", rows, exact=False) for rows in (1, 100))
    assert few * 0.5625 == pytest.approx((2.5625 * 0.1 + 2 * 0.1) / 1e9)
    assert many * 0.5625 == pytest.approx((2.5625 * 0.1 + 2 * 1.0) / 1e9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_made_up_weights_lie_as_published_ones_do(dtype):
    """Aligned ones are multiplied faster on some processors than what a file holds."""
    weight = measure_products.dense(dtype)((32, 64), torch.device("cpu"))
    assert weight.shape == (32, 64) and weight.is_contiguous()
    assert weight.data_ptr() % 64 == 8
    assert float(weight.float().std()) > 0.5


def test_attention_that_was_not_measured_is_guessed_from_products():
    """A device is a hundred times a host: one number for both would keep the cache off the device."""
    fast = [ProductRate(rows=1, seconds_per_gb=3.5e-4), ProductRate(rows=4096, seconds_per_gb=6.7e-3)]
    found = measuring._with_guesses(measuring._GUESS, fast)
    assert found.attention_flops_per_s == pytest.approx(0.5e9 / 3.5e-4)
    assert found.prefill_attention_flops_per_s == pytest.approx(0.1e9 * 4096 / 6.7e-3)
    assert found.op_overhead_s == measuring._GUESS.op_overhead_s
    measured = found.model_copy(update={"attention_flops_per_s": 2e9, "prefill_attention_flops_per_s": 3e9})
    assert measuring._with_guesses(measured, fast) == measured
    slow = [ProductRate(rows=1, seconds_per_gb=1.0), ProductRate(rows=8, seconds_per_gb=8.0)]
    assert measuring._with_guesses(measuring._GUESS, slow) == measuring._GUESS


def test_fixed_costs_come_before_products_have_taken_the_time(files):
    """A clock that products run down: what an op costs beside its weights has been measured by then."""
    clock = measuring.Clock(30.0)

    def slow(x, weight, *, exact):
        clock.end_s = 0.0
        return linear(x, weight, exact=exact)

    compute = measure_compute(slow, Idle, torch.device("cpu"), ("F32",), SHAPES, 2**20, clock, (False,))
    assert compute.op_overhead_s != measuring._GUESS.op_overhead_s
    assert "fixed costs and attention" not in clock.skipped


def test_a_device_is_measured_first_and_in_most_of_the_time(files, ample, monkeypatch):
    seen = []
    monkeypatch.setattr(measuring, "visible_devices", lambda: SimpleNamespace(count=1))
    monkeypatch.setattr(measuring, "_first_use", lambda product, dtype, devices: seen.append(devices))
    monkeypatch.setattr(
        measuring, "_device_fields", lambda *_args: seen.append("device") or {"device_bytes": 5 * 2**30}
    )

    def host(*_args):
        seen.append("host")
        return Compute(
            products={}, attention_flops_per_s=1.0, prefill_attention_flops_per_s=1.0, op_overhead_s=0
        )

    monkeypatch.setattr(measuring, "measure_compute", host)
    machine = probe(files, linear, Idle, dtype="F32", shapes=SHAPES, seconds=0.05)
    assert seen == [["cpu", "cuda"], "device", "host"]
    assert machine.device_bytes == 5 * 2**30


def test_a_device_waits_once_for_many_products():
    """The meta device stands for one: it computes nothing, and is not the host."""
    weights = [torch.empty(shape, device="meta") for shape in SHAPES]
    calls = []

    def product(x, weight, *, exact):
        calls.append(len(x))
        return linear(torch.zeros(len(x), 1), torch.zeros(1, 1), exact=exact)

    turns = measure_products.Turns(product, weights, len(SHAPES), lambda run, *, exact: None, exact=False)
    assert turns.rows == measure_products.DEVICE_ROWS
    assert turns.seconds_per_gb(512, 0) > 0
    assert calls == [512] * (1 + 8) * len(SHAPES)
    calls.clear()
    turns.seconds_per_gb(4096, 0)
    assert calls == [4096] * 2 * len(SHAPES), "wide rounds take long enough one by one"


@pytest.mark.parametrize(
    ("sweeps", "want"),
    [([1.0], 1.0), ([1.0, 1.1], 1.05), ([1.0, 1.4], 1.2), ([2.0, 1.0], 1.0), ([1.0, 1.6], 1.0)],
)
def test_a_second_that_somebody_else_took_is_in_one_of_two_sweeps(sweeps, want):
    assert measure_products.undisturbed(sweeps) == pytest.approx(want)


def test_products_are_measured_twice_in_turn_while_there_is_time():
    class Counted:
        rows, round_bytes = (1, 64, 8), 10**6

        def __init__(self):
            self.asked = []

        def seconds_per_gb(self, rows, seconds):
            self.asked.append(rows)
            return float(len(self.asked))

    ample, none = Counted(), Counted()
    rates = measure_products.product_rates(ample, measuring.Clock(60.0), "BF16")
    assert ample.asked == [1, 64, 8, 1, 64, 8]
    assert [(rate.rows, rate.seconds_per_gb) for rate in rates] == [(1, 1.0), (8, 3.0), (64, 2.0)]
    measure_products.product_rates(none, measuring.Clock(0.0), "BF16")
    assert none.asked == [1, 64]
