"""`zinfer trace`: draw a trace file.  In: the Chrome trace that `generate --trace` wrote.  Out: a PNG or SVG."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import click

from zinfer.cli.options import check_seconds
from zinfer.cli.texts import check_suffix
from zinfer.errors import CheckpointError, MachineError
from zinfer.units import seconds_text
from zinfer.whole import refuse_unwritable

PICTURES = (".png", ".svg", ".pdf")
COLOURS = {
    "peer": "#64b5cd",
    "disk": "#4c72b0",
    "h2d": "#dd8452",
    "compute": "#55a868",
    "wait": "#c44e52",
    "rows": "#8172b3",
}


@click.command()
@click.argument("trace_file", type=click.Path(path_type=Path))
@click.option("--png", "out", type=click.Path(path_type=Path), required=True, help="Picture to write.")
@click.option("--last", default=0.0, help="Draw only the last N seconds (0: all).")
def trace(trace_file: Path, out: Path, last: float) -> None:
    """Draw TRACE_FILE: one lane per link and engine, and each lane's busy share."""
    check_seconds("--last", last, may_be_none=True)
    check_suffix(out, PICTURES, "--png")
    refuse_unwritable(out)
    lanes = read_lanes(trace_file)
    end_s = max(begin_s + length_s for spans in lanes.values() for begin_s, length_s in spans)
    begin_s = max(0.0, end_s - last) if last else 0.0
    draw_lanes(lanes, begin_s, end_s, out)
    for lane, spans in sorted(lanes.items()):
        click.echo(
            f"{lane:<10} busy {busy_share(spans, begin_s, end_s):6.1%} of {seconds_text(end_s - begin_s)}"
        )
    click.echo(f"wrote {out}")


def read_lanes(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Lane name -> (begin, length) in seconds.  Raises CheckpointError ZI-4901 when it is no trace."""
    lanes: dict[str, list[tuple[float, float]]] = defaultdict(list)
    try:
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
        names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
        for event in events:
            if event["ph"] == "X":
                lanes[names[event["tid"]]].append((event["ts"] / 1e6, event["dur"] / 1e6))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            "ZI-4901",
            f"{path} is not a trace: {error}",
            remedy="zinfer generate -p hello --trace trace.json",
        ) from error
    if not lanes:
        raise CheckpointError(
            "ZI-4902", f"{path} holds no spans", remedy="trace a run that has at least one pass"
        )
    return lanes


def busy_share(spans: list[tuple[float, float]], begin_s: float, end_s: float) -> float:
    """Share of [begin, end] covered by at least one span: overlapping reads count once."""
    covered_s, reach_s = 0.0, begin_s
    for start_s, length_s in sorted(spans):
        low_s, high_s = max(start_s, reach_s), min(start_s + length_s, end_s)
        covered_s += max(0.0, high_s - low_s)
        reach_s = max(reach_s, high_s)
    return covered_s / (end_s - begin_s) if end_s > begin_s else 0.0


def draw_lanes(lanes: dict[str, list[tuple[float, float]]], begin_s: float, end_s: float, out: Path) -> None:
    """One horizontal lane per engine or link.  Raises MachineError ZI-5901 without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise MachineError(
            "ZI-5901",
            "drawing needs matplotlib, which is not installed",
            remedy="pip install 'zinfer[plots]'",
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(12, 0.7 * len(lanes) + 1.2), layout="constrained")
    for row, (lane, spans) in enumerate(sorted(lanes.items(), reverse=True)):
        axes.broken_barh(
            spans,
            (row - 0.4, 0.8),
            color=COLOURS.get(lane.partition(":")[0], "#937860"),
            edgecolor="white",
            linewidth=0.2,
        )
        axes.text(end_s, row, f" {busy_share(spans, begin_s, end_s):.0%}", va="center")
    axes.set_yticks(range(len(lanes)), sorted(lanes, reverse=True))
    axes.set_xlim(begin_s, end_s)
    axes.set_xlabel("seconds")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
