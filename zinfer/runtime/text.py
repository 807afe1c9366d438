"""The text of one request as it grows.  In: token ids.  Out: what may be shown, and whether the request has ended."""

from __future__ import annotations

from collections.abc import Sequence

from zinfer.runtime.request import Request
from zinfer.sampling.stop import StopScanner, ending
from zinfer.tokenizer import IncrementalDecoder, Tokenizer


class TextState:
    """Joins the incremental decoder (never half a character) and the stop scanner (nothing of a stop string).

    Without a tokenizer the text stays empty and only token ids end a request.
    """

    def __init__(self, tokenizer: Tokenizer | None, request: Request, eos_ids: Sequence[int]) -> None:
        self._request = request
        self._eos_ids = eos_ids
        self._decoder: IncrementalDecoder | None = (
            tokenizer.incremental(request.prompt_ids) if tokenizer is not None else None
        )
        self._scanner = StopScanner(request.params.stop)
        self.text = ""

    def push(self, token_id: int) -> str:
        """Take the token just drawn (already in the request's outputs); sets the request's end when it has come.

        Returns the text that is certain now.
        """
        request = self._request
        num_output = len(request.output_ids)
        is_end_token = token_id in self._eos_ids or token_id in request.params.stop_token_ids
        delta = ""
        if self._decoder is not None and not is_end_token:
            is_heeded = num_output >= request.params.min_tokens
            delta = self._scanner.push(self._decoder.push(token_id), is_heeded=is_heeded)
        request.finish_reason, request.stop_reason = ending(
            token_id, num_output, request.params, self._eos_ids, self._scanner.matched
        )
        if request.finish_reason is not None and self._scanner.matched is None:
            rest = self._decoder.finish() if self._decoder is not None else ""
            delta += self._scanner.push(rest) + self._scanner.finish()
        self.text += delta
        return delta
