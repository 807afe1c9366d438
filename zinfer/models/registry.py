"""Which composition runs a model.  In: a ModelSpec.  Out: a fresh flow, and what runs one op on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from zinfer.models import decoder, encoder
from zinfer.spec.records import ModelSpec


class Flow(Protocol):
    """Activations of one micro-batch on their way through the ops."""

    rows: dict[str, Tensor]

    def move(self, carry: Callable[[Tensor], Tensor]) -> None:
        """Carry everything that waits for the next op elsewhere."""
        ...

    def take_logits(self) -> Tensor:
        """The result of a whole pass."""
        ...


def composition(spec: ModelSpec) -> tuple[Callable[[], Flow], Callable[..., None]]:
    """(makes a flow, runs one op); both compositions have the same signature."""
    if spec.encoder is None:
        return decoder.Flow, decoder.run_op
    made: tuple[Callable[[], Any], Callable[..., None]] = (encoder.EncoderFlow, encoder.run_op)
    return made
