"""How many rows a pass carries for free.  In: a plan's curve, what passes really took.  Out: T*, corrected."""

from __future__ import annotations

from collections.abc import Mapping

from zinfer.plan.curve import Curve

_SMOOTH = 0.3  # weight of the newest pass
_LIMITS = (0.25, 4.0)  # a measured pass corrects the profile within these; more is a disturbance
_WAITED = 0.02  # share of a pass spent waiting above which the link bound it
_PROMPT_ROWS = 16  # beside decoding sequences prompts go on, whatever binds; more wait for a pass with room


class TokenBudget:
    """T*: the rows at which computation begins to bind (architecture.md: T* = F b (1 - f) / 2 N B, here from
    measured curves).  Below it rows are free; above it they cost what they would cost in the next pass.

    `stream_s` is the busiest link's time per pass; with nothing to stream every pass may as well be full.  A job whose
    plan found fuller passes better carries `fill` times T*.
    `observe` corrects both sides by measured over predicted, computation by group of ops.
    """

    def __init__(
        self, curve: Curve, stream_s: float, *, batch: int, max_rows: int, fill: float = 1.0
    ) -> None:
        self._curve = curve
        self._stream_s = stream_s
        self._fill = fill
        self._least = min(batch + _PROMPT_ROWS, max_rows)
        self._max_rows = max_rows
        self.compute_scale = dict.fromkeys(curve.seconds, 1.0)
        self.stream_scale = 1.0
        self.rows = self._find()

    def follow(
        self,
        curve: Curve,
        stream_s: float,
        *,
        batch: int,
        max_rows: int,
        fill: float = 1.0,
        is_corrected: bool = False,
    ) -> None:
        """Another plan: its curve and its link time.  What was learnt holds on, unless they are corrected by it."""
        self._curve, self._stream_s, self._fill = curve, stream_s, fill
        if is_corrected:
            self.compute_scale = dict.fromkeys(curve.seconds, 1.0)
            self.stream_scale = 1.0
        self._least, self._max_rows = min(batch + _PROMPT_ROWS, max_rows), max_rows
        self.rows = self._find()

    def observe(self, rows: int, group_s: Mapping[str, float], wait_s: float, seconds: float) -> None:
        """Take one steady pass: its compute seconds by group, what it waited for chunks, and all of it."""
        for group, measured in group_s.items():
            predicted = self._curve.group_at(group, rows)
            self.compute_scale[group] = _towards(self.compute_scale[group], measured, predicted)
        if self._stream_s and wait_s > _WAITED * seconds:
            self.stream_scale = _towards(self.stream_scale, seconds, self._stream_s)
        self.rows = self._find()

    def pass_s(self, rows: int) -> float:
        """Corrected seconds of a pass."""
        return max(self._stream_s * self.stream_scale, self._curve.at(rows, self.compute_scale))

    def extra_s(self, rows: int) -> float:
        """What feeding `rows` more rows costs in compute time, spread over full passes."""
        return rows * self._curve.at(self._max_rows, self.compute_scale) / self._max_rows

    def _find(self) -> int:
        if not self._stream_s:
            return self._max_rows
        limit = self._stream_s * self.stream_scale
        low, high = self._least, self._max_rows
        while low < high:
            middle = (low + high + 1) // 2
            if self._curve.at(middle, self.compute_scale) <= limit:
                low = middle
            else:
                high = middle - 1
        return round(min(low * self._fill, self._max_rows))


def _towards(scale: float, measured: float, predicted: float) -> float:
    if predicted <= 0:
        return scale
    found = min(max(measured / predicted, _LIMITS[0]), _LIMITS[1])
    return scale + _SMOOTH * (found - scale)
