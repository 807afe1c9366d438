"""Packed tokens: the rows of one pass, no padding, and what a layer may ask of the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Packed:
    """T new token rows of S sequences, back to back.

    Sequence s owns rows bounds[s]:bounds[s+1] and has past[s] committed tokens in the cache.  Its new rows see all
    of its past (within the window) and, among themselves, what lies at or before them; where `ancestors[s]` is
    given (bool [n, n], row i sees column j) it replaces that causal rule, and positions may repeat.
    `logit_rows` are the rows whose logits are wanted, ascending.  `lengths[s]` is the sequence's known length, the
    part of a prompt that later passes bring included: rope kinds that switch on length must not depend on how a
    prompt is cut into pieces.  None: past and new rows.
    """

    tokens_T: Tensor
    positions_T: Tensor
    bounds: tuple[int, ...]
    past: tuple[int, ...]
    logit_rows: Tensor
    ancestors: tuple[Tensor | None, ...] | None = None
    lengths: tuple[int, ...] | None = None

    @property
    def num_rows(self) -> int:
        """T."""
        return self.bounds[-1]

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.past)


class KvView(Protocol):
    """Keys and values of the batch's sequences, whatever memory holds them."""

    def stage(self, layer: int, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Write the pass's new rows of one layer; they count only once committed."""
        ...

    def past(self, layer: int, sequence: int) -> Sequence[tuple[Tensor, Tensor]]:
        """Committed (k, v) of sequence s of the batch, each [n, K, D], oldest first.

        Cut at the same borders (multiples of a fixed block of tokens) wherever the pages lie.
        """
        ...

    def span(self, layer: int, sequence: int, start: int = 0) -> tuple[Tensor, Tensor]:
        """(k, v) [n, K, D] of all tokens of sequence s from `start` on, committed and staged."""
        ...
