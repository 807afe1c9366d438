"""What a run really did.  In: passes as they end, the plan.  Out: achieved beside predicted, in documented keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from zinfer.plan.records import Forecast

SLOW_SHARE = 0.7  # a run below this share of its predicted speed is announced


@dataclass(slots=True)
class PassRecord:
    """One pass: wall seconds, token rows, sequences, and bytes moved per link."""

    seconds: float
    wait_s: float  # of it, what computation waited for chunks
    rows: int
    sequences: int
    is_first: bool  # it also loaded what stays, or guests that come to stay
    is_decode: bool  # no prompt rows
    num_bytes: Mapping[str, int]
    group_s: Mapping[str, float]  # compute seconds by group of ops, as the engine that computes saw them
    schedule_s: float = 0.0  # beside it: composing the pass, sampling, text


@dataclass(slots=True)
class Stats:
    """Totals of one engine.  `forecast` is what the plan said before any weight was read."""

    forecast: Forecast
    passes: list[PassRecord] = field(default_factory=list)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    num_tokens: int = 0
    shared_tokens: int = 0  # of prompts: fed once for several continuations, and not again for each
    first_token_s: float | None = None
    surprises: int = 0  # chunks that were needed before the schedule had fetched them
    preemptions: dict[str, int] = field(default_factory=dict)  # "spilled", "dropped", "damaged": times
    locked_bytes: int = 0  # host memory that is page-locked for a device
    graph_replays: int = 0  # runs of ops that one recorded graph carried out
    token_rows: int = 0  # T*, as corrected by the passes so far

    @property
    def decode_passes(self) -> list[PassRecord]:
        """Steady passes that only decoded."""
        return [done for done in self.passes if done.is_decode and not done.is_first]

    @property
    def pass_s(self) -> float | None:
        """Median seconds of a steady decode pass; None when there was none."""
        return median(done.seconds for done in self.decode_passes) if self.decode_passes else None

    @property
    def bytes_per_pass(self) -> dict[str, float]:
        """Link -> mean bytes of a steady decode pass."""
        passes = self.decode_passes
        links = {link for done in passes for link in done.num_bytes}
        return {
            link: sum(done.num_bytes.get(link, 0) for done in passes) / len(passes) for link in sorted(links)
        }

    @property
    def schedule_share(self) -> float | None:
        """Composing passes, sampling and text beside all time."""
        steady = [done for done in self.passes if not done.is_first]
        own_s = sum(done.schedule_s for done in steady)
        return own_s / (own_s + sum(done.seconds for done in steady)) if steady else None

    @property
    def limit_s(self) -> float:
        """What no engine on this machine could beat: the busiest link's or engine's seconds in a decode pass."""
        return max(self.forecast.busy_s.values(), default=0.0)

    def is_slow(self) -> bool:
        """Whether decode passes took far longer than predicted."""
        return self.pass_s is not None and self.pass_s * SLOW_SHARE > self.forecast.pass_s

    def to_dict(self) -> dict[str, Any]:
        """Documented keys; seconds and bytes.  None where nothing of the kind was run."""
        pass_s = self.pass_s
        return {
            "passes": len(self.passes),
            "tokens": self.num_tokens,
            "shared_tokens": self.shared_tokens,
            "first_token_s": self.first_token_s,
            "predicted_first_token_s": self.forecast.first_token_s,
            "pass_s": pass_s,
            "predicted_pass_s": self.forecast.pass_s,
            "pass_seconds": [done.seconds for done in self.decode_passes],
            "bytes_per_pass": self.bytes_per_pass,
            "bytes": {
                link: sum(done.num_bytes.get(link, 0) for done in self.passes)
                for link in sorted({link for done in self.passes for link in done.num_bytes})
            },
            "peak_bytes": dict(self.peak_bytes),
            "locked_bytes": self.locked_bytes,
            "graph_replays": self.graph_replays,
            "limit_s": self.limit_s,
            "limit_share": self.limit_s / pass_s if pass_s else None,
            "binding": self.forecast.binding,
            "surprises": self.surprises,
            "rows_per_pass": sum(done.rows for done in self.passes) / len(self.passes)
            if self.passes
            else None,
            "token_rows": self.token_rows,
            "preemptions": dict(self.preemptions),
            "schedule_share": self.schedule_share,
        }
