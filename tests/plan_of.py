"""Plans of published shapes, from configs alone."""

import json
from pathlib import Path

from zinfer.chunks.source import imagined_source
from zinfer.config.load import load_settings
from zinfer.config.profiles import SIM_DEFAULT, load_machine
from zinfer.config.resolve import resolve
from zinfer.plan.make import make_plan
from zinfer.spec.read import read_spec
from zinfer.watch import unwatched

SHAPES = Path(__file__).resolve().parents[1] / "configs" / "shapes"
MACHINE = load_machine(SIM_DEFAULT)


def spec_of(name, **changes):
    return read_spec(json.loads((SHAPES / f"{name}.json").read_text()) | changes)


def small_llama(**changes):
    return spec_of("llama-3.2-1b", num_hidden_layers=4, vocab_size=32000, **changes)


def source_of(spec):
    return imagined_source(spec.program, spec.lookups, spec.dtype)


def plan_of(spec, workload=None, machine=MACHINE, batches=(), now=None, watch=unwatched, **flags):
    """Plan for a machine that is not this one; flags as in `load_settings`, dots written as double underscores."""
    flags = {name.replace("__", "."): value for name, value in flags.items()}
    resolved = resolve(load_settings(flags=flags, environ={}).settings, machine, limits=None)
    return make_plan(
        spec, source_of(spec), resolved, machine, workload, batches=batches, now=now, watch=watch
    )
