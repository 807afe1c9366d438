"""What the bundled classifier is worth.  In: folders, windows of test files.  Out: right answers, and paired bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from demo_windows import Window

from zinfer import Classifier

Hits = npt.NDArray[np.bool_]
DRAWS = 10_000


def hits_of(
    folder: Path, windows: Sequence[Window], *, students: int | None = None, threads: int = 1
) -> Hits:
    """Which windows a model, or the first `students` of a group, labels rightly: [N]."""
    settings = {"device": "cpu", "machine": "sim-default", "exact": False, "threads": threads}
    with Classifier(folder, students=students, **settings) as classifier:  # type: ignore[arg-type]
        found = classifier.classify([one.text for one in windows])
    return np.array([one["label"] == window.label for one, window in zip(found, windows, strict=True)])


@dataclass(frozen=True)
class Paired:
    """A difference of two accuracies: its value, a 95 % interval, and the share of draws in which it is not above 0."""

    difference: float
    low: float
    high: float
    p: float

    def to_dict(self) -> dict[str, float]:
        """As JSON."""
        return {name: round(value, 5) for name, value in asdict(self).items()}


def paired(ours: Hits, theirs: Hits, files: Sequence[str], *, seed: int = 0, draws: int = DRAWS) -> Paired:
    """Bootstrap by file (Efron and Tibshirani 1993): files are drawn with replacement, all of their windows at once.

    Windows of one file resemble each other, so to draw windows would claim more than was seen.  `p` is one-sided.
    """
    _, place = np.unique(np.asarray(files), return_inverse=True)
    counts = np.bincount(place).astype(float)
    gains = np.bincount(place, weights=ours.astype(float) - theirs.astype(float))
    random = np.random.default_rng(seed)
    weights = random.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=draws)
    drawn = (weights @ gains) / (weights @ counts)
    low, high = np.quantile(drawn, [0.025, 0.975])
    p = (1 + np.count_nonzero(drawn <= 0)) / (1 + draws)
    return Paired(float(gains.sum() / counts.sum()), float(low), float(high), float(p))
