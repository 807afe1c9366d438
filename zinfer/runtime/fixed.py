"""Values at fixed addresses.  In: whatever a pass works out for its rows.  Out: the same, in buffers that stay.

A recorded graph reads and writes the addresses that it was recorded with, and bakes in every number that was not in a
tensor.  So all tensors a pass works out are copied into buffers of their own, and everything else is part of the key.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from zinfer.errors import InternalError
from zinfer.kvcache.cache import PagedView
from zinfer.layers.packed import Packed, Span


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with other tensors: dataclasses, lists, tuples and dicts are gone through."""
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(
            **{field.name: mapped(getattr(value, field.name), change) for field in fields(value)}
        )
    if isinstance(value, list | tuple):
        return type(value)(mapped(part, change) for part in value)
    if isinstance(value, dict):
        return {key: mapped(part, change) for key, part in value.items()}
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of a structure, in its order."""
    found: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        found.append(x)
        return x

    mapped(value, note)
    yield from found


def outline(value: Any) -> Hashable:
    """What two structures must share so that one's tensors can stand for the other's.

    Spans are left out: where a sequence's tokens lie is in the tensors that were made from them.
    """
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, value.device)
    if isinstance(value, Span):
        return "span"
    if isinstance(value, slice):
        return ("slice", value.start, value.stop, value.step)
    if is_dataclass(value) and not isinstance(value, type):
        return (type(value), *(outline(getattr(value, field.name)) for field in fields(value)))
    if isinstance(value, list | tuple):
        return tuple(outline(part) for part in value)
    if isinstance(value, dict):
        return tuple((key, outline(part)) for key, part in value.items())
    if not isinstance(value, Hashable):
        raise InternalError("ZI-5371", f"{type(value).__name__} cannot be part of a graph's key")
    return value


class FixedView:
    """The cache as a recorded pass sees it: rows go to the slots of a buffer, places were found before.

    Whatever would be worked out on the host, and so be baked in, is refused.
    """

    def __init__(self, view: PagedView, slots_T: Tensor) -> None:
        self._view = view
        self._slots_T = slots_T
        self.device = view.device
        self.is_resident = view.is_resident

    def stage(self, layer: int, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Write the pass's new rows of one layer."""
        self._view.stage_at(layer, self._slots_T, k_TKD, v_TKD)

    def bring(self, q_THD: Tensor) -> Tensor:
        """They are there."""
        return q_THD

    take_back = bring

    def read(self, layer: int, place: Any) -> tuple[Tensor, Tensor]:
        """As the view reads a place that it has located."""
        return self._view.read(layer, place)

    def planes(self, layer: int) -> Sequence[Tensor]:
        """The pages themselves, which stay where they are."""
        return self._view.planes(layer)

    def pages(self, sequences: Sequence[int]) -> Any:
        """Raises InternalError ZI-5372."""
        raise InternalError(
            "ZI-5372", f"the pages of {len(sequences)} sequences were asked for in a recorded pass"
        )

    def locate(self, spans: Sequence[Span], size: int) -> Any:
        """Raises InternalError ZI-5372."""
        raise InternalError(
            "ZI-5372", f"{len(spans)} places of {size} rows were looked for in a recorded pass"
        )

    def past(self, layer: int, sequence: int) -> Any:
        """Raises InternalError ZI-5372."""
        raise InternalError("ZI-5372", f"the past of sequence {sequence} was asked for in a recorded pass")


class PassBuffers:
    """What one kind of pass works out for its rows, in buffers: a batch and a view that graphs are recorded with.

    The batch knows no lengths and no past, so that whatever would bake them in fails while it is recorded.
    """

    def __init__(self, batch: Packed, view: PagedView) -> None:
        self._state: dict[str, Any] = mapped(pass_state(batch, view), torch.clone)
        self.view = FixedView(view, self._state["slots"])
        memo = zip(self._state["keys"], self._state["memo"], strict=True)
        self.batch = Packed(
            tokens_T=batch.tokens_T,
            positions_T=batch.positions_T,
            bounds=batch.bounds,
            past=(),
            logit_rows=batch.logit_rows,
            memo={_replaced(key, _VIEW, self.view): value for key, value in memo},
        )

    @property
    def nbytes(self) -> int:
        """Of all buffers."""
        return sum(x.nbytes for x in tensors(self._state))

    def load(self, batch: Packed, view: PagedView) -> None:
        """Another pass of the same outline."""
        for target, source in zip(tensors(self._state), tensors(pass_state(batch, view)), strict=True):
            target.copy_(source)


_VIEW = "the pass's view"  # stands for it in keys of a memo


def pass_state(batch: Packed, view: PagedView) -> dict[str, Any]:
    """What was worked out for a pass: the slots of its new rows, and the batch's memo, ordered by its keys."""
    memo = sorted(((_replaced(key, view, _VIEW), value) for key, value in batch.memo.items()), key=_by_name)
    return {
        "slots": view.slots_T,
        "keys": tuple(key for key, _ in memo),
        "memo": [value for _, value in memo],
    }


def _by_name(item: tuple[Any, Any]) -> str:
    return repr(item[0])


def _replaced(key: Any, old: object, new: object) -> Any:
    """A key of a memo in which one part stands for another."""
    if not isinstance(key, tuple):
        return key
    return tuple(new if part is old else part for part in key)
