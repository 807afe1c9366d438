"""How long a pass computes, by its rows.  In: a model and an engine's rates.  Out: seconds at a few row counts."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from zinfer.config.machine import Compute, Machine
from zinfer.plan.cost import Kind, OpCosts, PassLoad, kind_of
from zinfer.plan.records import Workload
from zinfer.spec.records import DTYPE_BYTES, ModelSpec, Op

_GROUPS = {"q": "attention", "k": "attention", "v": "attention", "qkv": "attention", "o": "attention"}
_GROUPS |= {"gate": "mlp", "up": "mlp", "gate_up": "mlp", "down": "mlp"}


def group_of(kind: str) -> str:
    """What is measured and corrected together: "attention", "mlp", or "ends" (embedding, projections, head)."""
    return _GROUPS.get(kind, "ends")


@dataclass(frozen=True, slots=True)
class Curve:
    """Compute seconds of a whole pass at growing `rows`, by group of ops; linear in between and beyond the last."""

    rows: tuple[int, ...]
    seconds: dict[str, tuple[float, ...]]

    def at(self, rows: int, scale: Mapping[str, float] | None = None) -> float:
        """Seconds of a pass of `rows` rows, each group times its `scale` (1 where it has none)."""
        return sum(
            self.group_at(group, rows) * (scale.get(group, 1.0) if scale else 1.0) for group in self.seconds
        )

    def group_at(self, group: str, rows: int) -> float:
        """Seconds of one group."""
        points = self.seconds[group]
        if len(points) == 1 or rows <= self.rows[0]:
            return points[0]
        at = min(bisect_left(self.rows, rows), len(points) - 1)
        low, high = self.rows[at - 1], self.rows[at]
        return points[at - 1] + (points[at] - points[at - 1]) * (rows - low) / (high - low)

    def scaled(self, scale: Mapping[str, float]) -> Curve:
        """Each group times its `scale` (1 where it has none)."""
        return Curve(
            self.rows,
            {
                group: tuple(s * scale.get(group, 1.0) for s in points)
                for group, points in self.seconds.items()
            },
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"rows": list(self.rows), "seconds": {group: list(s) for group, s in self.seconds.items()}}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Curve:
        """What `to_dict` gave."""
        return cls(tuple(tree["rows"]), {group: tuple(s) for group, s in tree["seconds"].items()})


def compute_curve(
    spec: ModelSpec, engine: Compute, workload: Workload, *, exact: bool, machine: Machine | None = None
) -> Curve:
    """Half-way through the generation: up to `batch` rows decode, what is above them are prompts.

    Ops of one shape cost the same, so that a model of a hundred layers costs no more than one of a few.
    """
    alike: Counter[Kind] = Counter()
    example: dict[Kind, Op] = {}
    for op in spec.program:
        kind = kind_of(spec, op)
        alike[kind] += 1
        example.setdefault(kind, op)
    rows = _row_counts(workload)
    seconds: dict[str, list[float]] = {group_of(op.kind): [0.0] * len(rows) for op in example.values()}
    for at, count in enumerate(rows):
        costs = OpCosts(spec, engine, _mixed_load(workload, count), exact=exact, machine=machine)
        for kind, op in example.items():
            seconds[group_of(op.kind)][at] += alike[kind] * (costs.work(op) + costs.overhead_s)
        seconds["ends"][at] += _parking_s(spec, machine, workload, count)
        seconds["ends"][at] += engine.token_overhead_s * min(count, workload.batch)
    return Curve(rows, {group: tuple(points) for group, points in seconds.items()})


def _parking_s(spec: ModelSpec, machine: Machine | None, workload: Workload, rows: int) -> float:
    """Hidden states of all rows go down and come up about once per layer."""
    if machine is None or machine.h2d is None or not workload.parks or rows <= workload.rows_at_once:
        return 0.0
    nbytes = rows * spec.model_dim * DTYPE_BYTES[spec.dtype]
    return spec.num_layers * (machine.h2d.seconds(nbytes) + (machine.d2h or machine.h2d).seconds(nbytes))


def _row_counts(workload: Workload) -> tuple[int, ...]:
    """Powers of two, the batch, and the most rows of a pass."""
    counts = {1, workload.batch, workload.prefill_rows}
    count = 2
    while count < workload.prefill_rows:
        counts.add(count)
        count *= 2
    return tuple(sorted(counts))


def _mixed_load(workload: Workload, rows: int) -> PassLoad:
    """A pass of decode tokens and, where there are more rows than sequences, of pieces of prompts."""
    context = workload.prompt_len + ceil(workload.gen_len / 2)
    return PassLoad(rows, min(rows, workload.batch), context, workload.kv, workload.logits_of(rows))
