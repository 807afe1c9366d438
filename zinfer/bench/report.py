"""From moments to figures.  In: when each request and its tokens came.  Out: the result block, as a dict and as lines.

The definitions are vLLM's: TTFT is the first token minus arrival; TPOT is (end to end - TTFT) / (output tokens - 1),
one figure per request; ITL is each gap between neighbouring tokens.  Percentiles are over these raw events.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from zinfer.plan.records import Forecast
from zinfer.runtime.stats import PassRecord, Stats
from zinfer.units import Bytes, seconds_text

FORMULAS = (
    "TTFT first token - arrival · TPOT (end to end - TTFT) / (output tokens - 1) · ITL gap between two tokens"
)


@dataclass(frozen=True, slots=True)
class Timeline:
    """One request: seconds by one clock.  `arrival_s` is when it was due, whether or not the engine was ready."""

    arrival_s: float
    token_s: Sequence[float]
    num_prompt: int

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.token_s[0] - self.arrival_s

    @property
    def e2e_s(self) -> float:
        """Arrival to last token."""
        return self.token_s[-1] - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None of a single token."""
        return (self.e2e_s - self.ttft_s) / (len(self.token_s) - 1) if len(self.token_s) > 1 else None

    @property
    def gaps_s(self) -> list[float]:
        """Inter-token latencies."""
        return [later - earlier for earlier, later in pairwise(self.token_s)]


@dataclass(frozen=True, slots=True)
class Run:
    """What a load gave.  `passes` are those of the run, warm-up excluded; `failed` says why requests had no result."""

    kind: str
    timelines: Sequence[Timeline]
    duration_s: float
    passes: Sequence[PassRecord]
    forecast: Forecast
    config: dict[str, Any]
    failed: Sequence[str] = field(default_factory=tuple)

    def to_dict(self) -> dict[str, Any]:
        """The result block in documented keys; seconds and bytes."""
        num_input = sum(line.num_prompt for line in self.timelines)
        num_output = sum(len(line.token_s) for line in self.timelines)
        later = [line.tpot_s for line in self.timelines if line.tpot_s is not None]
        return {
            "kind": self.kind,
            "requests": len(self.timelines),
            "failed": len(self.failed),
            "duration_s": self.duration_s,
            "input_tokens": num_input,
            "output_tokens": num_output,
            "requests_per_s": len(self.timelines) / self.duration_s,
            "output_tokens_per_s": num_output / self.duration_s,
            "total_tokens_per_s": (num_input + num_output) / self.duration_s,
            "ttft_s": spread([line.ttft_s for line in self.timelines]),
            "tpot_s": spread(later),
            "itl_s": spread([gap for line in self.timelines for gap in line.gaps_s]),
            "e2e_s": spread([line.e2e_s for line in self.timelines]),
            **self._engine(num_output),
            "config": self.config,
        }

    def _engine(self, num_output: int) -> dict[str, Any]:
        """What only an offload engine has to say: passes, bytes per token, the limit, predicted beside achieved."""
        stats = Stats(self.forecast, list(self.passes))
        count = max(len(self.passes), 1)
        moved = stats.to_dict()["bytes"]
        return {
            "passes": len(self.passes),
            "tokens_per_pass": num_output / count,
            "rows_per_pass": sum(done.rows for done in self.passes) / count,
            "bytes_per_token": {link: total / max(num_output, 1) for link, total in moved.items()},
            "pass_s": stats.pass_s,
            "predicted_pass_s": self.forecast.pass_s,
            "predicted_duration_s": self.forecast.job_s if self.kind == "throughput" else None,
            "limit_s": stats.limit_s,
            "limit_share": stats.limit_s / stats.pass_s if stats.pass_s else None,
            "binding": self.forecast.binding,
        }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, p50 and p99 (linear between neighbours); None of nothing."""
    if not values:
        return None
    p50, p99 = np.percentile(values, (50, 99))
    return {"mean": float(np.mean(values)), "p50": float(p50), "p99": float(p99)}


def lines(block: dict[str, Any]) -> Iterator[str]:
    """The result block for people, with its formulas."""
    failed = f", {block['failed']} failed" if block["failed"] else ""
    yield f"requests            {block['requests']}{failed} in {seconds_text(block['duration_s'])}"
    yield (
        f"tokens              {block['input_tokens']} in, {block['output_tokens']} out · "
        f"{block['requests_per_s']:.3g} requests/s"
    )
    yield f"output throughput   {block['output_tokens_per_s']:.2f} tokens/s"
    yield f"total throughput    {block['total_tokens_per_s']:.2f} tokens/s"
    for key in ("ttft_s", "tpot_s", "itl_s", "e2e_s"):
        if (found := block[key]) is not None:
            cells = " · ".join(f"{name} {seconds_text(value)}" for name, value in found.items())
            yield f"{key[:-2].upper():<20}{cells}"
    yield f"passes              {block['passes']} · {block['tokens_per_pass']:.1f} output tokens a pass"
    for link, count in block["bytes_per_token"].items():
        yield f"{link:<20}{Bytes(round(count))} per output token"
    if block["pass_s"] is not None:
        share = block["limit_share"]
        told = f"{share:.0%} of the limit" if share <= 1 else "faster than the profile allows (zinfer doctor)"
        yield (
            f"decode pass         {seconds_text(block['pass_s'])}, predicted "
            f"{seconds_text(block['predicted_pass_s'])} · {told}, bound by {block['binding']}"
        )
    if block["predicted_duration_s"] is not None:
        yield (
            f"whole run           {seconds_text(block['duration_s'])}, predicted "
            f"{seconds_text(block['predicted_duration_s'])}"
        )
    yield FORMULAS
