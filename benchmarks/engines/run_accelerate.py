"""Accelerate's disk offload as transformers documents it.  In: a job with a budget.  Out: its result.

`device_map="auto"` fills the memory it is given and leaves the rest in the checkpoint's safetensors files, which
hooks read module by module.  The memory it is given is the budget.
"""

from __future__ import annotations

from typing import Any

import accelerate
import hf_passes
import job
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama  # noqa: F401  (imports are not part of loading)


def load(task: job.Job) -> tuple[Any, dict[str, Any]]:
    """The model with `budget_bytes` of it in memory and the rest on disk."""
    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        task.model,
        dtype=getattr(torch, task.dtype),
        device_map="auto",
        max_memory={"cpu": task.budget_bytes},
        offload_folder=task.options["folder"],
    ).eval()
    places = list(model.hf_device_map.values())
    settings = {
        "device_map": "auto",
        "max_memory": {"cpu": task.budget_bytes},
        "modules": {str(place): places.count(place) for place in dict.fromkeys(places)},
        "accelerate": accelerate.__version__,
    }
    return model, settings


if __name__ == "__main__":
    job.main(lambda task: hf_passes.run(task, load), "accelerate", "transformers", "torch", "safetensors")
