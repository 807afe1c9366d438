"""What the compiled kernels must get right before they are trusted.  In: the kernels.  Out: what they get wrong."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zinfer.kernels.exponents import packed_without_loss, unpacked_by_torch
from zinfer.kernels.panels import QuantWeight, dequantise, pack_nibbles
from zinfer.spec.quant import GROUP

_NUMBERS = 2**16  # of bfloat16
_CLOSE = 0.02  # of the largest number: a few roundings of bfloat16


def wrong(found: Any) -> str:
    """The first kernel of `found`, a `Kernels`, that is not right on a small case; empty where all are."""
    draw = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(torch.bfloat16)

    x, weight, bias, octets = noise(5, 200), noise(37, 200), noise(37), noise(2, 3, 70)
    table = noise(_NUMBERS)
    wide = x.float()
    pairs = {
        "norm": (found.norm(x, weight[0], 1e-5), F.rms_norm(wide, (200,), weight[0].float(), 1e-5)),
        "layer norm": (
            found.layer_norm(x, weight[0], weight[1], 1e-5),
            F.layer_norm(wide, (200,), weight[0].float(), weight[1].float(), 1e-5),
        ),
        "activation": (found.activated(x, table), _looked_up(table, x)),
        "gate": (found.gated(x, weight[:5], table), _looked_up(table, x) * weight[:5].float()),
        "rotation": (
            found.rotate(octets, octets[:, 0, :35], octets[:, 1, :35]),
            _rotated(octets.float(), octets[:, 0, :35].float(), octets[:, 1, :35].float()),
        ),
    }
    tall = wide.repeat(1, 6)  # equals far apart
    pairs["largest"] = (torch.stack([*found.largest(tall)]), torch.stack([*tall.max(-1)]))
    odd = torch.tensor([[1, torch.nan, 2]])
    pairs["largest of what is no number"] = (found.largest(odd)[1], torch.tensor([1]))
    pages = torch.tensor([[1], [0]], dtype=torch.int32), torch.tensor([3, 4], dtype=torch.int32)
    q, k, v = noise(2, 2, 32), noise(8, 1, 32), noise(8, 1, 32)
    pairs["attention"] = (
        found.attend(q, k, v, *pages, 4, scale=0.2, window=3, cap=0),
        torch.stack([_attended(q[0], k[4:7], v[4:7]), _attended(q[1], k[1:4], v[1:4])]),
    )
    q, k, seen = noise(20, 2, 64), noise(150, 1, 64), torch.arange(131, 151, dtype=torch.int32)
    tile = torch.tensor([0, 20], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    pairs["attention of a prompt"] = (
        found.attend(q, k, k, tile[1][None], seen, 150, scale=0.2, window=None, cap=0, tiles=tile),
        torch.stack([_attended(row, k[:end], k[:end]) for row, end in zip(q, seen.tolist(), strict=True)]),
    )
    if found.has_products:
        values = torch.randint(0, 16, (64, 2 * GROUP), generator=draw, dtype=torch.uint8)
        nibbles, scales = pack_nibbles(values, 64), noise(2, 64, 2)
        turned = weight.t().contiguous()
        for count in (1, 5, 40):  # a row by itself, a tile of rows, several
            rows = x.repeat(8, 1)[:count]
            want = rows.float() @ turned.float() + bias.float()
            pairs[f"product of columns and {count} rows"] = (found.columns(rows, turned, bias), want)
        for count in (1, 8):  # few rows, and several tiles of them
            rows = x.repeat(count, 1)
            want = rows.float() @ weight.float().t() + bias.float()
            pairs[f"product of {len(rows)} rows"] = (found.dense(rows, weight, bias), want)
        listed = packed_without_loss(weight[:, :GROUP].repeat(1, 2))
        parts, want = (listed.rest, listed.codes, listed.exponents), unpacked_by_torch(listed)
        again = [torch.empty_like(part) for part in parts]
        found.pack(want, again)
        listed_wrongly = sum((one != two).sum() for one, two in zip(again, parts, strict=True))
        pairs["packing"] = (1 + listed_wrongly, torch.ones(()))
        differing = (found.unpack(parts, len(want)).view(torch.int16) != want.view(torch.int16)).sum()
        pairs["unpacking"] = (1 + differing, torch.ones(()))  # every bit counts
        for count in (1, 8):
            rows = x[:, : 2 * GROUP].repeat(count, 1)
            pairs[f"lossless product of {len(rows)} rows"] = (
                found.lossless(rows, parts, len(want), bias),
                rows.float() @ want.float().t() + bias.float(),
            )
        for name, low in (("int4", None), ("int8", nibbles.flip(1))):
            packed = QuantWeight(nibbles, scales, low, 60)
            rows = x[:, : 2 * GROUP].contiguous()
            pairs[name] = (found.quant(rows, packed), rows.float() @ dequantise(packed).t())
    return next((name for name, (y, want) in pairs.items() if not _is_close(y, want)), "")


def _looked_up(table: Tensor, x: Tensor) -> Tensor:
    return table[x.view(torch.int16).long() % _NUMBERS].float()


def _attended(q_HD: Tensor, k_n1D: Tensor, v_n1D: Tensor) -> Tensor:
    weights_Hn = (0.2 * q_HD.float() @ k_n1D[:, 0].float().t()).softmax(-1)
    return weights_Hn @ v_n1D[:, 0].float()


def _rotated(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x_THD.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


def _is_close(y: Tensor, want: Tensor) -> bool:
    return bool((y.float() - want).abs().max() <= _CLOSE * want.abs().max())
