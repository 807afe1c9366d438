"""Hugging Face transformers with all weights in memory.  In: a job.  Out: its result.  Also the oracle, in float32."""

from __future__ import annotations

from typing import Any

import hf_passes
import job
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama  # noqa: F401  (imports are not part of loading)


def load(task: job.Job) -> tuple[Any, dict[str, Any]]:
    """The model as its documentation loads it, in the job's dtype."""
    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=getattr(torch, task.dtype)).eval()
    return model, {"dtype": task.dtype, "attention": model.config._attn_implementation}


if __name__ == "__main__":
    job.main(lambda task: hf_passes.run(task, load), "transformers", "torch")
