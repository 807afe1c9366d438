"""zinfer: run models larger than the memory they are given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zinfer.api import LLM
    from zinfer.classifier import Classifier
    from zinfer.errors import ZinferError
    from zinfer.sampling.params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "Classifier", "SamplingParams", "ZinferError", "__version__"]

_HOMES = {
    "LLM": "zinfer.api",
    "Classifier": "zinfer.classifier",
    "SamplingParams": "zinfer.sampling.params",
    "ZinferError": "zinfer.errors",
}


def __getattr__(name: str) -> Any:
    """Public names load on first use, so that `import zinfer` costs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'zinfer' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
