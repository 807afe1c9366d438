"""Packed tokens: the rows of one pass, no padding, and what a layer may ask of the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from zinfer.kernels.paged import PageRows
from zinfer.memory.upload import upload


@dataclass(frozen=True, slots=True)
class Packed:
    """T new token rows of S sequences, back to back.

    Sequence s owns rows bounds[s]:bounds[s+1] and has past[s] committed tokens in the cache.  Its new rows see all
    of its past (within the window) and, among themselves, what lies at or before them; where `ancestors[s]` is
    given (bool [n, n], row i sees column j) it replaces that causal rule, and positions may repeat.
    `logit_rows` are the rows whose logits are wanted, ascending.  `lengths[s]` is the sequence's known length, the
    part of a prompt that later passes bring included: rope kinds that switch on length must not depend on how a
    prompt is cut into pieces.  None: past and new rows.  `forked` are the sequences that are a branch of another one:
    their past is partly its tokens, which may be rows of this very batch.  `segments_T` are token types, which only
    encoders have; an encoder's sequence is a whole text, without past, and each of its rows sees all of them.  `memo`
    keeps what layers work out once for all of them.  With `is_padded` shapes grow in steps where that changes nothing
    but rounding, so that passes have the shapes of earlier ones.
    """

    tokens_T: Tensor
    positions_T: Tensor
    bounds: tuple[int, ...]
    past: tuple[int, ...]
    logit_rows: Tensor
    ancestors: tuple[Tensor | None, ...] | None = None
    lengths: tuple[int, ...] | None = None
    forked: frozenset[int] = frozenset()
    segments_T: Tensor | None = None
    is_padded: bool = False
    memo: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def on(self, name: Literal["positions_T", "logit_rows"], device: torch.device) -> Tensor:
        """A field where the activations are, sent there once for all layers.  The fields themselves are the host's."""
        key = ("on", name, device)
        if key not in self.memo:
            self.memo[key] = upload(getattr(self, name), device)
        found: Tensor = self.memo[key]
        return found

    @property
    def num_rows(self) -> int:
        """T."""
        return self.bounds[-1]

    def ids(self, role: str) -> Tensor:
        """[T] row numbers of the embedding table with that RowLookup role; without token types all are 0."""
        if role == "segments":
            return torch.zeros_like(self.tokens_T) if self.segments_T is None else self.segments_T
        return self.tokens_T if role == "tokens" else self.positions_T

    def without_segments(self) -> Packed:
        """The same rows, all of token type 0."""
        return replace(self, segments_T=None)

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.past)


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens start .. stop - 1 of sequence `sequence` of the batch, counted from its first token."""

    sequence: int
    start: int
    stop: int


class KvView(Protocol):
    """Keys and values of the batch's sequences, whatever memory holds them and in whatever format.

    `device` is where `read` gives keys and `bring` brings queries; `is_resident` says that nothing of an attention
    crosses a link.
    """

    device: torch.device

    @property
    def is_resident(self) -> bool: ...

    def stage(self, layer: int, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Write the pass's new rows of one layer; they count only once committed."""
        ...

    def bring(self, q_THD: Tensor) -> Tensor:
        """Queries to where `read` gives keys: themselves, or a copy in other memory."""
        ...

    def take_back(self, out_THD: Tensor) -> Tensor:
        """Results to where the queries came from."""
        ...

    def locate(self, spans: Sequence[Span], size: int) -> Any:
        """Where tokens, committed or staged, lie: the same in every layer, so worked out once and read often."""
        ...

    def read(self, layer: int, place: Any) -> tuple[Tensor, Tensor]:
        """(k, v) [S, size, K, D] of what `locate` found, in q's dtype or fp32.

        Rows behind the end of a span are finite where its sequence's own rows are.
        """
        ...

    def pages(self, sequences: Sequence[int]) -> PageRows | None:
        """Where the tokens of these sequences, staged ones included, lie in `planes`: the same in every layer.

        Pages have one token each where a branch is among them, whose tokens begin within a page.  None where `read`
        brings them from other memory than that of `device`, or there are no pages.
        """
        ...

    def planes(self, layer: int) -> Sequence[Tensor]:
        """One layer of the pages themselves, [2, slots, K, D]; for int8 pages also their scales [2, slots, K]."""
        ...

    def past(self, layer: int, sequence: int) -> Sequence[tuple[Tensor, Tensor]]:
        """Committed (k, v) of sequence s of the batch, each [n, K, D], oldest first.

        Cut at the same borders (multiples of a fixed block of tokens) wherever the pages lie.
        """
        ...
