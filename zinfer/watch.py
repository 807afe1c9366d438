"""Progress, as who does the work sees it.  In: how far it is.  Out: whatever the one who watches makes of it."""

from __future__ import annotations

from collections.abc import Callable

Watch = Callable[[int, int, str], None]  # (done, total, what): `what` names the work, another one begins anew


def unwatched(_done: int, _total: int, _what: str) -> None:
    """Progress that nobody looks at."""
