"""AirLLM, layer by layer from disk.  In: a job whose model was split before.  Out: its result.

`options.folder` holds AirLLM's own split of the checkpoint; `--split MODEL FOLDER` writes it beforehand, without a
memory limit, since AirLLM splits once per model.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import airllm
import hf_passes
import job
import torch
from transformers.models.llama import modeling_llama  # noqa: F401  (imports are not part of loading)


class Untokenized(airllm.AirLLMBaseModel):
    """Its generic model; the benchmarks feed token ids, so no tokenizer files are asked for."""

    def get_tokenizer(self, hf_token: str | None = None) -> None:
        """None instead of the folder's tokenizer: an override that AirLLM provides for."""


def build(model: str, folder: str, dtype: str = "bfloat16") -> Untokenized:
    """The model on the CPU with its look-ahead on."""
    return Untokenized(
        Path(model),
        device="cpu",
        dtype=getattr(torch, dtype),
        layer_shards_saving_path=folder,
        prefetching=True,
    )


def load(task: job.Job) -> tuple[Any, dict[str, Any]]:
    """The split model, as the transformers model that AirLLM hangs its hooks on, and what was set."""
    wrapper = build(task.model, task.options["folder"], task.dtype)
    return wrapper.model, {"device": "cpu", "prefetching": wrapper.prefetching, "compression": None}


if __name__ == "__main__":
    if sys.argv[1] == "--split":
        build(sys.argv[2], sys.argv[3])
    else:
        job.main(lambda task: hf_passes.run(task, load), "airllm", "accelerate", "transformers", "torch")
