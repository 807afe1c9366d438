"""The figures that a GPU run must show.  In: records.  Out: one table and one picture, "not measured" where none is.

Each figure names the record that holds it and what is wanted of it.  A dry run's records count for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Figure:
    """One line: `value` is at least (or at most) `wanted`."""

    what: str
    bench: str
    name: str
    wanted: float
    at_least: bool = True
    is_share: bool = True

    def value(self, records: dict[str, dict[str, Any]]) -> float | None:
        """What the newest record says; None where there is none, or its answer was wrong."""
        record = records.get(self.bench)
        if record is None or record["answer_matches"] is False:
            return None
        found = record["median"].get(self.name)
        return float(found) if isinstance(found, int | float) else None

    def shown(self, value: float) -> str:
        """As a share or as a ratio."""
        return f"{value:.1%}" if self.is_share else f"{value:.2f} x"

    def is_met(self, value: float) -> bool:
        """Whether it is what was wanted."""
        return value >= self.wanted if self.at_least else value <= self.wanted


FIGURES = (
    Figure(
        "decode at batch 1 from host memory, share of the measured link",
        "gpu_decode",
        "host_link_share",
        0.95,
    ),
    Figure("decode from disk, share of the measured read rate", "gpu_decode", "disk_read_share", 0.90),
    Figure(
        "prefill of 16 k tokens, fully streamed, share of the GEMM rate", "gpu_prefill", "gemm_share", 0.80
    ),
    Figure(
        "throughput at the planner's batch, share of its roofline", "gpu_throughput", "roofline_share", 0.90
    ),
    Figure("prediction, largest error", "gpu_decode", "prediction_error", 0.10, at_least=False),
    Figure("batch 1 beside Accelerate, same budget", "gpu_peers", "accelerate_ratio", 5.0, is_share=False),
    Figure("batch 1 beside AirLLM, same budget", "gpu_peers", "airllm_ratio", 10.0, is_share=False),
    Figure(
        "FlexGen's metric beside FlexGen, its best batch", "gpu_peers", "flexgen_ratio", 1.5, is_share=False
    ),
    Figure("decode beside ZeRO-Inference, its best batch", "gpu_peers", "zero_ratio", 1.1, is_share=False),
    Figure("int4 over bf16, share of the bytes' ratio", "gpu_int4", "share_of_byte_ratio", 0.92),
    Figure("page-locked memory used over planned", "gpu_decode", "pinned_over_planned", 1.02, at_least=False),
    Figure("resident decode at batch 1, share of the memory rate", "gpu_resident", "bandwidth_share", 0.90),
    Figure(
        "resident decode beside transformers, compiled",
        "gpu_resident",
        "transformers_ratio",
        1.0,
        is_share=False,
    ),
)


def newest(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The newest record of each GPU block, dry runs and simulated machines left out."""
    found: dict[str, dict[str, Any]] = {}
    for record in sorted(records, key=lambda record: record["written"]):
        is_real = not record["config"].get("dry_run") and not record["machine"].get("simulated")
        if record["bench"].startswith("gpu_") and is_real:
            found[record["bench"]] = record
    return found


def table(records: list[dict[str, Any]]) -> list[str]:
    """Markdown: every figure, what is wanted, what was measured and on what."""
    latest = newest(records)
    lines = ["| figure | wanted | measured | machine, date |", "|---|--:|--:|---|"]
    for figure in FIGURES:
        wanted = f"{'≥' if figure.at_least else '≤'} {figure.shown(figure.wanted)}"
        value = figure.value(latest)
        if value is None:
            lines.append(f"| {figure.what} | {wanted} | not measured | |")
            continue
        record = latest[figure.bench]
        devices = (
            ", ".join(device["name"] for device in record["machine"]["devices"]) or record["machine"]["name"]
        )
        missed = "" if figure.is_met(value) else " (missed)"
        lines.append(
            f"| {figure.what} | {wanted} | {figure.shown(value)}{missed} | {devices}, {record['written'][:10]} |"
        )
    return lines


def draw(records: list[dict[str, Any]], out: Path) -> None:
    """Every measured figure over what is wanted of it, so that 1 is the line; those not measured say so."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    latest = newest(records)
    figure, axis = plt.subplots(figsize=(9, 0.45 * len(FIGURES) + 1))
    for row, each in enumerate(FIGURES):
        value = each.value(latest)
        if value is None:
            axis.text(0.02, row, "not measured", va="center", color="#9aa0a6")
            continue
        share = value / each.wanted if each.at_least else each.wanted / max(value, 1e-9)
        axis.barh(row, share, color="#1f6feb" if each.is_met(value) else "#d9822b")
        axis.text(share, row, f" {each.shown(value)}", va="center")
    axis.axvline(1.0, color="#333333", linestyle="--", linewidth=1)
    axis.set_yticks(range(len(FIGURES)), [each.what for each in FIGURES])
    axis.set_xlim(0, max(1.5, axis.get_xlim()[1]))
    axis.invert_yaxis()
    axis.set_xlabel("measured over wanted")
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    plt.close(figure)
