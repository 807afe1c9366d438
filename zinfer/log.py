"""One logger for the package.  In: a level.  Out: lines on stderr; a library user's handlers are left alone."""

from __future__ import annotations

import logging

logger = logging.getLogger("zinfer")
logger.addHandler(logging.NullHandler())


def log_to_stderr(verbosity: int) -> None:
    """What the command line does: warnings by default, -v info, -vv debug."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel({0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG))
