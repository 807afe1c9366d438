"""AirLLM on a GPU, layer by layer from disk.  In: a job whose model was split before.  Out: its result.

`--split MODEL FOLDER DEVICE` writes its own split of the checkpoint beforehand.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import airllm
import torch
import torch_job
from job import Job


class Untokenized(airllm.AirLLMBaseModel):
    """Its generic model; the benchmarks feed token ids, so no tokenizer files are asked for."""

    def get_tokenizer(self, hf_token: str | None = None) -> None:
        """None instead of the folder's tokenizer: an override that AirLLM provides for."""


def build(model: str, folder: str, device: str) -> Untokenized:
    """The model with its look-ahead on."""
    return Untokenized(
        Path(model), device=device, dtype=torch.bfloat16, layer_shards_saving_path=folder, prefetching=True
    )


def load(task: Job) -> tuple[Any, dict[str, Any]]:
    """The split model, as the transformers model that AirLLM hangs its hooks on, and what was set."""
    device = torch_job.capped(task.options)
    wrapper = build(task.model, task.options["folder"], device)
    return wrapper.model, {"device": device, "prefetching": wrapper.prefetching, "compression": None}


if __name__ == "__main__":
    if sys.argv[1] == "--split":
        build(*sys.argv[2:5])
    else:
        torch_job.main(load, "airllm", "accelerate", "transformers", "torch")
