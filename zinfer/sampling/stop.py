"""When a request ends.  In: text and tokens as they come.  Out: text that may be shown, and why it ended."""

from __future__ import annotations

from collections.abc import Sequence

from zinfer.sampling.params import SamplingParams


class StopScanner:
    """Finds stop strings in text that comes in pieces, and holds back what may be the beginning of one.

    The stop string that is complete first wins; of two complete at the same place the longer.  Text before it is
    released, itself and what follows never.  How the text is cut into pieces changes nothing.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.matched: str | None = None
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str, *, is_heeded: bool = True) -> str:
        """Take the next piece of text, return what may be shown now.

        With `is_heeded` false (before min_tokens) the text is let through and no stop string begins in it.
        """
        if self.matched is not None:
            return ""
        text = self._held + text
        if not is_heeded:
            return text
        found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stop if stop in text]
        if found:
            end, _, self.matched = min(found)
            self._held = ""
            return text[: end - len(self.matched)]
        held = self._possible_start(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """The text held back, when no more comes."""
        rest, self._held = self._held, ""
        return rest

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[len(text) - length :]) for stop in self._stop):
                return length
        return 0


def ending(
    token_id: int, num_output: int, params: SamplingParams, eos_ids: Sequence[int], matched: str | None
) -> tuple[str | None, str | int | None]:
    """(finish_reason, stop_reason) after `num_output` tokens, the last being `token_id`; (None, None) to go on.

    The stop reason is the stop string or stop token id, None for an end-of-sequence token.
    """
    if num_output >= params.min_tokens:
        if token_id in eos_ids and not params.ignore_eos:
            return "stop", None
        if token_id in params.stop_token_ids:
            return "stop", token_id
        if matched is not None:
            return "stop", matched
    return ("length", None) if num_output >= params.max_tokens else (None, None)
