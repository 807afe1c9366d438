"""Weights in a store's formats to be timed.  In: format names.  Out: what `measure` makes its products' rates from."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from zinfer.kernels import lossless
from zinfer.kernels.quant import made_up, native_layout
from zinfer.kernels.stored import StoredWeight
from zinfer.memory.measure import Pack
from zinfer.memory.measure_products import MakeWeight, Shape
from zinfer.spec.lossless import LOSSLESS
from zinfer.spec.quant import GROUP, PANELS
from zinfer.spec.records import ModelSpec
from zinfer.spec.stored import FORMATS, PUBLISHED, RATE_NAMES


def packer_for(spec: ModelSpec) -> Pack | None:
    """What packs the model's weights while it runs, where a plan may want that."""
    return lossless.packed if spec.weights == PUBLISHED and spec.dtype == "BF16" else None


def makers(formats: Iterable[str] = FORMATS) -> dict[str, MakeWeight]:
    """By the name under which a profile has the format ("BF12", "I8", "I4"); what is published is left out."""

    def maker(weights: str) -> MakeWeight:
        def make(shape: Shape, device: torch.device) -> StoredWeight:
            if weights == LOSSLESS:
                return lossless.made_up(*shape).to(device)
            inputs = max(shape[1] // GROUP, 1) * GROUP
            return made_up(weights, PANELS[native_layout()], shape[0], inputs).to(device)

        return make

    return {RATE_NAMES[weights]: maker(weights) for weights in formats if weights in RATE_NAMES}
