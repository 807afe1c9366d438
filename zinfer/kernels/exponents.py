"""Weights packed without loss, and as they were.  In: a bf16 matrix.  Out: what a store holds of it.

The format is that of `zinfer.spec.lossless`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from zinfer.spec.lossless import HEAD, LISTED, RUN, SHARED, most_exceptions

_SIGN, _FRACTION, _FRACTION_BITS = 0x80, 0x7F, 7


@dataclass(frozen=True, slots=True)
class LosslessWeight:
    """A matrix [O, I] as a store holds it; views."""

    rest: Tensor  # uint8 [P, SHARED, I]
    codes: Tensor  # uint8 [P, SHARED, I / 2]
    exponents: Tensor  # uint8 [P, HEAD + I / 8]
    outputs: int

    @property
    def inputs(self) -> int:
        """I."""
        return self.rest.shape[2]

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.outputs, self.inputs

    @property
    def nbytes(self) -> int:
        """All parts together."""
        return self.rest.nbytes + self.codes.nbytes + self.exponents.nbytes

    def new_ones(self, *shape: int) -> Tensor:
        """Activations to try it with."""
        return torch.ones(shape, dtype=torch.bfloat16, device=self.rest.device)

    def to(self, device: torch.device) -> LosslessWeight:
        """The same on a device."""
        return LosslessWeight(
            self.rest.to(device), self.codes.to(device), self.exponents.to(device), self.outputs
        )

    def rows(self, start: int, stop: int) -> LosslessWeight:
        """Outputs [start, stop), both at tiles' borders (or at the end); views."""
        tiles = slice(start // SHARED, -(-stop // SHARED))
        return LosslessWeight(self.rest[tiles], self.codes[tiles], self.exponents[tiles], stop - start)


class TooManyExponentsError(ValueError):
    """Outputs whose weights need more exceptions than there is room for."""


def lossless_weight(parts: Mapping[str, Tensor], outputs: int) -> LosslessWeight:
    """Compose the views of one op, by role."""
    return LosslessWeight(parts["rest"], parts["codes"], parts["exponents"], outputs)


def unpacked_by_torch(weight: LosslessWeight) -> Tensor:
    """The slow twin, and what devices do: bf16 [O, I].  Nothing waits for a device, so that graphs can have it."""
    tiles, _, inputs = weight.rest.shape
    codes = _split(weight.codes).view(tiles, SHARED * inputs)
    tile = torch.arange(tiles, dtype=torch.int32, device=codes.device)[:, None]
    is_exception = codes == LISTED
    lists, room = weight.exponents[:, :SHARED].reshape(-1), weight.exponents.shape[1] - HEAD
    exponents = lists.index_select(0, (codes.add_(tile * SHARED)).view(-1))
    # The order of a tile's outputs and inputs is that of its exceptions.
    rank = codes.copy_(is_exception.cumsum(1, dtype=torch.int32)).sub_(1)
    is_there = (rank < room) & is_exception
    taken = (
        weight.exponents[:, HEAD:]
        .reshape(-1)
        .index_select(0, (rank.clamp_(0, room - 1).add_(tile * room)).view(-1))
    )
    taken = torch.where(is_there.view(-1), taken, 0)
    exponents = torch.where(is_exception.view(-1), taken, exponents)
    bits = (exponents.to(torch.int16) << _FRACTION_BITS).view(tiles * SHARED, inputs)
    rest = weight.rest.view(tiles * SHARED, inputs).to(torch.int16)
    bits |= rest & _FRACTION
    bits |= rest.bitwise_and_(_SIGN) << 8
    return bits.view(torch.bfloat16)[: weight.outputs]


def check_exceptions(count: int, room: int) -> None:
    """Raises TooManyExponentsError where a tile has no room for so many."""
    if count > room:
        raise TooManyExponentsError(
            f"{SHARED} outputs hold {count} weights with other exponents than their {LISTED} most frequent; "
            f"there is room for {room}"
        )


def packed_without_loss(matrix_OI: Tensor) -> LosslessWeight:
    """The slow twin of `lossless.packed`: bf16 [O, I], I a multiple of RUN; the same bytes every time.

    Raises TooManyExponentsError where a tile has more exceptions than there is room for.
    """
    outputs, inputs = matrix_OI.shape
    bits = torch.nn.functional.pad(matrix_OI.view(torch.int16), (0, 0, 0, -outputs % SHARED)).int()
    tiles = bits.shape[0] // SHARED
    exponents = ((bits >> _FRACTION_BITS) & 0xFF).view(tiles, -1).long()
    lists, code_of = _frequent(exponents, (len(bits) - outputs) * inputs)
    codes = code_of.gather(1, exponents).view(-1, inputs)
    codes[outputs:] = 0
    is_exception = codes == LISTED
    counts = is_exception.sum(1).view(tiles, SHARED)
    ends, room = counts.cumsum(1), most_exceptions(inputs)
    check_exceptions(int(ends.max()), room)
    head = torch.zeros(tiles, HEAD + room, dtype=torch.uint8)
    head[:, :LISTED] = lists
    head[:, SHARED:HEAD] = (ends - counts).to(torch.int16).view(torch.uint8).view(tiles, -1)
    flat, where = exponents.view(-1), is_exception.view(-1).nonzero()[:, 0]
    owner = where // (SHARED * inputs)
    head[owner, HEAD + torch.arange(len(where)) - (ends[:, -1].cumsum(0) - ends[:, -1])[owner]] = flat[
        where
    ].byte()
    rest = (bits & _FRACTION) | ((bits >> 8) & _SIGN)
    return LosslessWeight(
        rest.byte().view(tiles, SHARED, inputs),
        _joined(codes.byte()).view(tiles, SHARED, inputs // 2),
        head,
        outputs,
    )


def _frequent(exponents: Tensor, num_added: int) -> tuple[Tensor, Tensor]:
    """Of each tile's exponents [P, n] the most frequent, [P, LISTED], of equals the smaller; codes [P, 256].

    The last `num_added` are zeros that fill the last tile, and count for nothing.
    """
    tiles = exponents.shape[0]
    counts = torch.zeros(tiles, 256, dtype=torch.int32)
    counts.scatter_add_(1, exponents, torch.ones((), dtype=torch.int32).expand(exponents.shape))
    counts[-1, 0] -= num_added
    lists = counts.sort(dim=1, descending=True, stable=True).indices[:, :LISTED]
    code_of = torch.full((tiles, 256), LISTED)
    code_of.scatter_(1, lists, torch.arange(LISTED).expand(tiles, LISTED))
    return lists.byte(), code_of


def _joined(codes_OI: Tensor) -> Tensor:
    """Codes below 16: two in a byte."""
    halves = codes_OI.view(codes_OI.shape[0], -1, 2, RUN // 2)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).flatten(1)


def _split(codes: Tensor) -> Tensor:
    """The inverse, as int32."""
    runs = codes.reshape(-1, RUN // 2)
    return torch.stack((runs & 15, runs >> 4), 1).int()
