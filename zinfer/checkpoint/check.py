"""Does a checkpoint fit its model?  In: what a spec says it needs, an index.  Out: nothing, or what differs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Protocol

from zinfer.checkpoint.folder import quoted
from zinfer.checkpoint.index import CheckpointIndex
from zinfer.checkpoint.strict_json import shown
from zinfer.errors import CheckpointError

WEIGHT_DTYPES = ("BF16", "F16", "F32")
# What upstream libraries leave behind in files and never read: rope tables, causal masks, pads of a store.
HARMLESS = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|masked_bias|__pad__\.\d+)$"
    r"|(^|\.)(h\.\d+\.attn|layers\.\d+\.attention)\.bias$"
    r"|(^|\.)embeddings\.(position_ids|token_type_ids)$"
)
HEADS = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
LISTED = 8


class Slice(Protocol):
    """Rows of a published tensor, as `zinfer.spec.records.WeightRef` has them."""

    @property
    def role(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def stop(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class Product(Protocol):
    """What reads weights: an `Op`."""

    @property
    def kind(self) -> str: ...
    @property
    def weights(self) -> Sequence[Slice]: ...


class Table(Protocol):
    """What is read by rows: a `RowLookup`."""

    @property
    def name(self) -> str: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def width(self) -> int: ...


class Needs(Protocol):
    """A `ModelSpec` as far as a checkpoint is concerned; `checkpoint` and `spec` do not know each other."""

    @property
    def program(self) -> Sequence[Product]: ...
    @property
    def lookups(self) -> Sequence[Table]: ...
    @property
    def tied_head(self) -> bool: ...
    @property
    def transposed(self) -> bool: ...
    @property
    def unread(self) -> Sequence[str]: ...


def published_shapes(spec: Needs) -> dict[str, tuple[int, ...]]:
    """Every tensor the model reads and its full shape, in order of first use: the blocks of one are joined."""
    shapes: dict[str, tuple[int, ...]] = {table.name: (table.num_rows, table.width) for table in spec.lookups}
    for op in spec.program:
        for weight in op.weights:
            rows = max(weight.stop, shapes.get(weight.name, (0,))[0])
            shapes[weight.name] = (rows, *weight.shape[1:])
    return shapes


def check_weights(index: CheckpointIndex, spec: Needs) -> None:
    """Every tensor the model reads is there, with the right shape and a dtype we compute in, and no other is.

    Tensors that upstream libraries leave behind, and the copy of a tied head, are ignored.  Raises
    CheckpointError ZI-4151 (missing; says what stands there unexpected), ZI-4152 (unexpected), ZI-4153 (shape),
    ZI-4154 (dtype).
    """
    shapes, found = published_shapes(spec), index.weights
    missing = [name for name in shapes if name not in found]
    unexpected = [name for name in found if name not in shapes and not _is_harmless(name, spec)]
    if missing:
        beside = f"; unexpected: {_listed(unexpected)}" if unexpected else ""
        raise _misfit("ZI-4151", index, f"lacks {len(missing)} tensors: {_listed(missing)}{beside}")
    if unexpected:
        raise _misfit("ZI-4152", index, f"has {len(unexpected)} unexpected tensors: {_listed(unexpected)}")
    wrong = [
        f"{shown(name)} is {found[name].shape} instead of {shape}"
        for name, shape in shapes.items()
        if found[name].shape != shape
    ]
    if wrong:
        raise _misfit("ZI-4153", index, f"has {len(wrong)} tensors of another shape: {_first(wrong)}")
    foreign = [
        f"{shown(name)} is {found[name].dtype}" for name in shapes if found[name].dtype not in WEIGHT_DTYPES
    ]
    if foreign:
        what = f"has {len(foreign)} weights in no dtype of {', '.join(WEIGHT_DTYPES)}: {_first(foreign)}"
        raise _misfit("ZI-4154", index, what)


def _is_harmless(name: str, spec: Needs) -> bool:
    is_unread = any(f".{stem}" in f".{name}" for stem in spec.unread)
    return bool(HARMLESS.search(name)) or is_unread or (spec.tied_head and bool(HEADS.search(name)))


def _listed(names: Iterable[str]) -> str:
    return _first([shown(name) for name in names])


def _first(words: list[str]) -> str:
    more = f" and {len(words) - LISTED} more" if len(words) > LISTED else ""
    return ", ".join(words[:LISTED]) + more


def _misfit(code: str, index: CheckpointIndex, what: str) -> CheckpointError:
    return CheckpointError(
        code,
        f"{index.folder} {what}",
        remedy=f"zinfer inspect {quoted(index.folder)}   # config.json and weights must be of one model",
    )
