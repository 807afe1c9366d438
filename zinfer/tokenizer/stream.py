"""Text as its tokens come.  In: token ids one by one.  Out: text that no later token can change."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set

_REPLACEMENT = "\ufffd"  # what decoders put where bytes make no character, an unfinished one included
_CONTEXT_TOKENS = 8


class IncrementalDecoder:
    """Turns a growing list of ids into pieces of text whose sum is the text of the whole list.

    Holds back what is not certain: a character whose bytes are not all there, and a run of byte-fallback tokens,
    which decodes as a whole or not at all.  `context` are ids whose text was shown before (a prompt): it decides
    only about a space at the border.  Decodes a short window each time, never the whole list.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        *,
        is_silent: Callable[[int], bool],
        byte_ids: Set[int] = frozenset(),
        context: Sequence[int] = (),
    ) -> None:
        self._decode = decode
        self._is_silent = is_silent
        self._byte_ids = byte_ids
        self._window = [id_ for id_ in context if not is_silent(id_)]
        if self._is_settled(decode(self._window[-_CONTEXT_TOKENS:])):
            del self._window[:-_CONTEXT_TOKENS]
        self._shown = decode(self._window)  # of the window
        self._num_shown = len(self._window)  # tokens of the window whose text is shown

    def push(self, token_id: int) -> str:
        """Take the next id, return the text that has become certain (often one word, at times nothing)."""
        if self._is_silent(token_id):
            return ""
        self._window.append(token_id)
        if token_id in self._byte_ids:
            return ""
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT) or not text.startswith(self._shown):
            return ""
        piece = text[len(self._shown) :]
        self._shown = text
        # The tokens of this piece alone become the window, once they have text of their own: decoders treat the
        # first token in a special way (a space is dropped), which must not reach what follows.
        recent = self._window[self._num_shown :]
        alone = self._decode(recent)
        if self._is_settled(alone):
            self._window, self._shown = recent, alone
        self._num_shown = len(self._window)
        return piece

    def finish(self) -> str:
        """The text held back, when no more ids come."""
        text = self._decode(self._window)
        piece = text[len(self._shown) :] if text.startswith(self._shown) else ""
        self._shown, self._num_shown = text, len(self._window)
        return piece

    @staticmethod
    def _is_settled(text: str) -> bool:
        return bool(text) and not text.startswith(_REPLACEMENT) and not text.endswith(_REPLACEMENT)
