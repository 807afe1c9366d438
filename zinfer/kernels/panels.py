"""How quantised weights lie in memory.  In: integers [O, I].  Out: panels of nibbles, and numbers again.

The formulas and the tensors' shapes are those of `zinfer.spec.quant`.  The panels are what torch's int4 kernel reads
(aten/src/ATen/native/cpu/int4mm_kernel.cpp, `weight_to_int4pack_kernel`), for AVX-512 64 outputs wide, for AVX2 32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from zinfer.spec.quant import GROUP


@dataclass(frozen=True, slots=True)
class QuantWeight:
    """A matrix [O, I] as a store holds it: views of nibbles and scales; `low` for int8."""

    nibbles: Tensor  # uint8 [P, I, panel / 2]
    scales: Tensor  # bf16 [I / GROUP, P * panel, 2]
    low: Tensor | None
    outputs: int

    @property
    def inputs(self) -> int:
        """I."""
        return self.nibbles.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.outputs, self.inputs

    def new_ones(self, *shape: int) -> Tensor:
        """Activations to try it with."""
        return torch.ones(shape, dtype=torch.bfloat16, device=self.nibbles.device)

    @property
    def panel(self) -> int:
        """Outputs per panel."""
        return 2 * self.nibbles.shape[2]

    @property
    def weights(self) -> str:
        """The format: "int8" or "int4"."""
        return "int4" if self.low is None else "int8"

    @property
    def nbytes(self) -> int:
        """All parts together."""
        low = 0 if self.low is None else self.low.nbytes
        return self.nibbles.nbytes + low + self.scales.nbytes

    def to(self, device: torch.device) -> QuantWeight:
        """The same on a device."""
        low = None if self.low is None else self.low.to(device)
        return QuantWeight(self.nibbles.to(device), self.scales.to(device), low, self.outputs)

    def rows(self, start: int, stop: int) -> QuantWeight:
        """Outputs [start, stop), both at panels' borders (or at the end); views."""
        panels = slice(start // self.panel, -(-stop // self.panel))
        low = None if self.low is None else self.low[panels]
        span = slice(panels.start * self.panel, panels.stop * self.panel)
        return QuantWeight(self.nibbles[panels], self.scales[:, span], low, stop - start)


def quant_weight(parts: Mapping[str, Tensor], outputs: int) -> QuantWeight:
    """Compose the views of one op, by role."""
    return QuantWeight(parts["nibbles"], parts["scales"], parts.get("low"), outputs)


def pack_nibbles(values_OI: Tensor, panel: int) -> Tensor:
    """uint8 values below 16, O a multiple of `panel`: [P, I, panel / 2]."""
    halves = values_OI.view(-1, 2, panel // 2, values_OI.shape[1])
    return (halves[:, 0] | (halves[:, 1] << 4)).transpose(1, 2).contiguous()


def unpack_nibbles(nibbles: Tensor) -> Tensor:
    """The inverse: uint8 [P * panel, I]."""
    halves = torch.stack((nibbles & 15, nibbles >> 4), 1)
    return halves.transpose(2, 3).flatten(0, 2)


def dequantise(weight: QuantWeight) -> Tensor:
    """The slow twin: fp32 [O, I], nothing rounded but by fp32."""
    steps = unpack_nibbles(weight.nibbles).float() - 8
    zeros = 1.0
    if weight.low is not None:
        steps = 16 * steps + unpack_nibbles(weight.low).float() - 8
        zeros = 17.0
    scale, zero = weight.scales.float().unbind(2)
    grouped = steps.view(steps.shape[0], -1, GROUP)
    whole = grouped * scale.t()[:, :, None] + zeros * zero.t()[:, :, None]
    return whole.flatten(1)[: weight.outputs]
