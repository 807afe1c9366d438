"""Measure this machine for a model.  In: its weight files and spec.  Out: a Machine, within two seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zinfer.config.machine import Machine
from zinfer.kernels.stored import any_linear
from zinfer.memory.measure import probe
from zinfer.plan.profile import matrix_shapes
from zinfer.runtime.quant_rates import makers, packer_for
from zinfer.runtime.small_model import SmallModel
from zinfer.spec.records import ModelSpec


def probed(files: Sequence[Path], spec: ModelSpec, *, exact: bool) -> Machine:
    """What a plan for this model needs, where no profile is saved; `skipped` names what there was no time for."""
    return probe(
        files,
        any_linear,
        SmallModel,
        dtype=spec.dtype,
        shapes=matrix_shapes(spec),
        modes=(exact,),
        formats=makers([spec.weights]),
        pack=packer_for(spec),
    )
