"""Cores for products and cores for requests.  In: settings.  Out: the same, with the threads that passes may use."""

from __future__ import annotations

import os

from zinfer.config.schema import Settings


def settings_beside(settings: Settings) -> Settings:
    """Where `runtime.threads` is left open, products use half of the cores: connections and texts are work, too.

    The threads of a product wait for one another, so one that has lost its core to a request stops them all: on two
    cores a server bears a third more with one thread than with two (benchmarks/students_burst.py).  Lanes, which take
    texts in turn and wait for nobody, are as many as there are cores.
    """
    if settings.runtime.threads != "auto":
        return settings
    cores = len(os.sched_getaffinity(0))
    lanes = cores if settings.runtime.lanes == "auto" else settings.runtime.lanes
    update = {"threads": max(cores // 2, 1), "lanes": lanes}
    return settings.model_copy(update={"runtime": settings.runtime.model_copy(update=update)})
