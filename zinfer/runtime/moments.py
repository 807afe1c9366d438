"""What each moment of a pass needs beside weights.  In: a pass that is watched.  Out: room, made before the need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from zinfer.memory.manager import ChunkManager
from zinfer.runtime.live_bytes import LiveBytes

_UNWATCHED = nullcontext()  # one for all


class Moments:
    """Moments of a pass, one per chunk that computes.  This one knows nothing and costs nothing."""

    @contextmanager
    def of_pass(self, rows: int) -> Iterator[None]:
        """A pass of so many rows; its moments follow in order."""
        yield

    def moment(self, chunk: int) -> AbstractContextManager[None]:
        """A chunk computes."""
        return _UNWATCHED


class WatchedMoments(Moments):
    """The first pass shows the order of use and the bytes that are alive; later ones are met (PatrickStar 1.1).

    `order` and `needs` are the chunks of the watched pass and the most bytes of tensors that were alive while each
    computed.  The plan has reserved `planned_bytes` for them: what a moment needs beyond that is taken from the
    weights before it begins.  A pass of more rows than any before is watched anew.
    """

    def __init__(self, manager: ChunkManager, planned_bytes: int) -> None:
        self._manager = manager
        self._planned_bytes = planned_bytes
        self._rows = 0
        self._at = 0  # how many moments of this pass have begun
        self._live: LiveBytes | None = None
        self.order: list[int] = []
        self.needs: list[int] = []

    @contextmanager
    def of_pass(self, rows: int) -> Iterator[None]:
        """Watch the pass, or meet what an earlier one has shown."""
        self._at = 0
        if rows <= self._rows:
            yield
            return
        self.order, self.needs = [], []
        try:
            with LiveBytes() as self._live:
                yield
        finally:
            self._live = None
        self._rows = rows
        excess = [max(need - self._planned_bytes, 0) for need in self.needs]
        self._manager.expect(self.order, excess)

    @contextmanager
    def moment(self, chunk: int) -> Iterator[None]:
        """Make room for what the chunk's turn needs; while watching, note it."""
        if self._live is None:
            self._manager.advance(self._at)
            self._at += 1
            yield
            return
        self._live.reset_peak()
        yield
        self.order.append(chunk)
        self.needs.append(self._live.reset_peak())
