"""What the torch peers share on a GPU.  In: a job's options.  Out: the capped device, and its peak when a job ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "engines"))

import hf_passes
import job


def capped(options: dict[str, Any]) -> str:
    """The device to compute on, made smaller where that is asked for."""
    device = str(options.get("device", "cpu"))
    if device.startswith("cuda") and options.get("cap_bytes"):
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(options["cap_bytes"] / total, 1.0), 0)
    return device


def main(load: Callable[[job.Job], tuple[Any, dict[str, Any]]], *packages: str) -> None:
    """Run the job's passes on the model that `load` gives."""

    def run(task: job.Job) -> job.Outcome:
        outcome = hf_passes.run(task, load)
        if torch.cuda.is_available():
            outcome.facts["device_peak_bytes"] = torch.cuda.max_memory_allocated()
        return outcome

    job.main(run, *packages)
