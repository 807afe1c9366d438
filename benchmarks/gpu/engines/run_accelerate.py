"""Accelerate's offload on a GPU: layers beyond `options.max_memory` of the device wait in host memory or on disk.

In: a job.  Out: its result.
"""

from __future__ import annotations

from typing import Any

import accelerate
import torch
import torch_job
from job import Job
from transformers import AutoModelForCausalLM


def load(task: Job) -> tuple[Any, dict[str, Any]]:
    """The model with as much on the device as it is given."""
    torch_job.capped(task.options)
    memory = {
        int(place) if place.isdigit() else place: size for place, size in task.options["max_memory"].items()
    }
    model = AutoModelForCausalLM.from_pretrained(
        task.model,
        dtype=getattr(torch, task.dtype),
        device_map="auto",
        max_memory=memory,
        offload_folder=task.options["folder"],
    ).eval()
    places = list(model.hf_device_map.values())
    settings = {
        "device_map": "auto",
        "max_memory": task.options["max_memory"],
        "modules": {str(place): places.count(place) for place in dict.fromkeys(places)},
        "accelerate": accelerate.__version__,
    }
    return model, settings


if __name__ == "__main__":
    torch_job.main(load, "accelerate", "transformers", "torch")
