"""The functions of tests/gpu on the simulated device: they are known to work before a GPU sees them."""

import device_runs
import pytest
import torch
from tiny_models import write_tiny

SIM = "sim"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny("llama", tmp_path_factory.mktemp("runs") / "model", num_hidden_layers=6)


@pytest.mark.parametrize("placement", device_runs.PLACEMENTS)
def test_parity(placement, folder):
    device_runs.check_parity(folder, "bfloat16", placement, SIM, is_same_engine=True)


def test_parity_within_rounding(folder):
    device_runs.check_parity(folder, "bfloat16", "host", SIM)


def test_placements_agree(folder):
    device_runs.check_placements_agree(folder, SIM)


def test_nothing_is_recorded_here(folder):
    device_runs.check_recorded(folder, SIM, has_graphs=False)


def test_nothing_is_page_locked_here(folder):
    device_runs.check_pinned_is_planned(folder, SIM, has_pins=False)


def test_rounds_leave_nothing(folder):
    device_runs.check_rounds_leave_nothing(folder, SIM, 6, lambda: 0)


def test_out_of_memory(folder, monkeypatch):
    def full(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    device_runs.check_out_of_memory(folder, SIM, monkeypatch, full)
