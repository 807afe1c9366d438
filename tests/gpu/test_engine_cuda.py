"""Whole models on a real device: parity, graphs, hazards on both streams, rounds, a full device.  Under three minutes.

The checks are functions of tests/device_runs.py, which the CPU suite runs on the simulated device.
"""

import random

import device_runs
import pytest
import torch
from tiny_models import CONFIGS, write_tiny

from zinfer import LLM
from zinfer.memory.cuda import CudaTransfer

pytestmark = pytest.mark.gpu

CUDA = "cuda:0"
DELAY_CYCLES = 2_000_000  # about 1 ms of a stream's time


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny("llama", tmp_path_factory.mktemp("runs") / "model", num_hidden_layers=6)


@pytest.mark.parametrize("placement", device_runs.PLACEMENTS)
@pytest.mark.parametrize("dtype", device_runs.TOLERANCE)
@pytest.mark.parametrize("family", CONFIGS)
def test_parity_with_the_cpu(family, dtype, placement, tmp_path):
    folder = write_tiny(family, tmp_path / "model", dtype, num_hidden_layers=4, n_layer=4)
    device_runs.check_parity(folder, dtype, placement, CUDA)


@pytest.mark.parametrize("family", CONFIGS)
def test_placements_and_recorded_passes_agree_bit_for_bit(family, tmp_path):
    folder = write_tiny(family, tmp_path / "model", num_hidden_layers=4, n_layer=4)
    device_runs.check_placements_agree(folder, CUDA)


@pytest.mark.parametrize("family", CONFIGS)
def test_decode_passes_are_replayed(family, tmp_path):
    device_runs.check_recorded(write_tiny(family, tmp_path / "model"), CUDA, has_graphs=True)


def test_page_locked_memory_is_what_the_plan_says(folder):
    device_runs.check_pinned_is_planned(folder, CUDA, has_pins=True)


@pytest.mark.parametrize("placement", ["host", "disk"])
@pytest.mark.parametrize("seed", range(2))
def test_late_copies_and_late_computation_change_nothing(placement, seed, folder, monkeypatch):
    options = device_runs.options_for(placement, folder, CUDA)
    want, want_logits, _ = device_runs.answers(folder, **options)
    chance, issue, ready = random.Random(seed), CudaTransfer._issue, CudaTransfer.ready

    def late_copy(self, trip):
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(int(chance.random() * DELAY_CYCLES))
        issue(self, trip)

    def late_computation(self, ticket):
        torch.cuda._sleep(int(chance.random() * DELAY_CYCLES))
        ready(self, ticket)

    monkeypatch.setattr(CudaTransfer, "_issue", late_copy)
    monkeypatch.setattr(CudaTransfer, "ready", late_computation)
    tokens, logits, _ = device_runs.answers(folder, **options)
    assert tokens == want
    assert torch.equal(logits, want_logits)


def test_parked_micro_batches_change_nothing_when_copies_are_late(folder, monkeypatch):
    from zinfer.memory.crossing import Crossing

    options = device_runs.options_for("host", folder, CUDA) | {"micro_rows": 4}
    want, _, _ = device_runs.answers(folder, **options, park="never")
    copy, chance = Crossing._copy, random.Random(0)

    def late(self, link, stream, target, source):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(int(chance.random() * DELAY_CYCLES))
        return copy(self, link, stream, target, source)

    monkeypatch.setattr(Crossing, "_copy", late)
    tokens, _, _ = device_runs.answers(folder, **options, park="always")
    assert tokens == want


@pytest.mark.parametrize("placement", ["resident", "host"])
def test_a_steady_pass_synchronises_nothing(placement, folder):
    """torch raises at whatever makes the host wait; drawing tokens comes after the pass."""
    with LLM(folder, **device_runs.options_for(placement, folder, CUDA)) as llm:
        llm.generate(device_runs.PROMPTS, device_runs.PARAMS)
        executor = llm._session._engine.loop.executor
        run = executor.run

        def strict(batches):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return run(batches)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        executor.run = strict
        llm.generate(device_runs.PROMPTS, device_runs.PARAMS)


def test_fifty_rounds_leave_nothing(folder):
    def device_bytes():
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info(0)
        return total - free

    device_runs.check_rounds_leave_nothing(folder, CUDA, 50, device_bytes)


def test_a_full_device(folder, monkeypatch):
    def full(*_args, **_options):
        torch.empty(2**60, dtype=torch.uint8, device=CUDA)  # torch's own error, from its own allocator

    device_runs.check_out_of_memory(folder, CUDA, monkeypatch, full)


def test_another_process_holds_the_memory(folder):
    """A ballast in this process stands for it: what is left does not hold the model."""
    free, _ = torch.cuda.mem_get_info(0)
    ballast = torch.empty(max(free - 48 * 2**20, 1), dtype=torch.uint8, device=CUDA)
    options = device_runs.FIXED | {"device": CUDA, "memory": {"device": "4GiB", "host": "1GiB"}}
    try:
        with LLM(folder, **options) as llm:
            assert llm.model.resolved.device_bytes < 48 * 2**20
            llm.generate(device_runs.PROMPTS, device_runs.PARAMS)
    except Exception as error:
        assert getattr(error, "code", "").startswith("ZI-2"), error
    del ballast
    torch.cuda.empty_cache()
    with LLM(folder, **options) as llm:
        assert llm.generate(device_runs.PROMPTS, device_runs.PARAMS)
