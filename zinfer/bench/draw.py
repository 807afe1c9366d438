"""Draw a run.  In: a Run.  Out: an SVG: passes over time beside their limit, latencies as cumulative shares."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import numpy as np

from zinfer.bench.report import Run
from zinfer.errors import MachineError

_BLUE, _ORANGE, _GREY = "#1f6feb", "#d9822b", "#6e7781"


def need_matplotlib() -> None:
    """Raises MachineError ZI-5921 where it is missing: asked before a run, not after it."""
    try:
        import matplotlib
    except ImportError as error:
        raise MachineError(
            "ZI-5921",
            "a picture was asked for, and drawing needs matplotlib, which is not installed",
            remedy="pip install 'zinfer[plots]'",
        ) from error
    matplotlib.use("Agg")


def draw(run: Run, path: Path) -> None:
    """Write the picture by way of a .partial file."""
    need_matplotlib()
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    seconds = [done.seconds for done in run.passes]
    left.plot(list(accumulate(seconds)), seconds, ".", color=_BLUE, label="passes")
    left.axhline(run.forecast.pass_s, color=_ORANGE, label="predicted decode pass")
    left.axhline(max(run.forecast.busy_s.values(), default=0.0), color=_GREY, ls="--", label="limit")
    left.set(xlabel="seconds into the run", ylabel="seconds per pass", ylim=(0, None))
    left.legend(frameon=False)
    ttft_s = [line.ttft_s for line in run.timelines]
    itl_s = [gap for line in run.timelines for gap in line.gaps_s]
    for name, values, colour in (("TTFT", ttft_s, _ORANGE), ("ITL", itl_s, _BLUE)):
        if values:
            right.step(np.sort(values), np.arange(1, len(values) + 1) / len(values), color=colour, label=name)
    right.set(xlabel="seconds", ylabel="share of events", xscale="log", ylim=(0, 1))
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="svg")
    pyplot.close(figure)
    partial.replace(path)
