"""Attention of one new row per sequence over KV pages in place.  In: queries, pages, page tables.  Out: [S, H, D].

Nothing is gathered: the kernel follows the page table.  It is Triton's, for a device; a row's bits depend on the number
of splits and so on its batch mates.  Exact mode has other drivers, and the host another kernel (`zinfer.layers.tiles`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from zinfer.kernels import served
from zinfer.kernels.served import launching, num_cores, operand, power
from zinfer.log import logger

_BLOCK_KEYS = 64  # keys of one tile
_MIN_SPLIT_BLOCKS = 4  # tiles that a split has at least: fewer do not pay for the merge
_MAX_SPLITS = 64
_PROGRAMS_PER_CORE = 2  # of a full device
_TRIAL_TOKENS = 256  # of the self-test, two sequences' pages
_CLOSE = 0.03  # of values of about 1, rounded to half precision


@dataclass(frozen=True, slots=True)
class PageRows:
    """Where the tokens of S sequences lie: token t of sequence s in page table[s, t // page_tokens].

    `table` is int32 [S, pages of the longest], `lengths` int32 [S] the tokens that the newest row sees, itself
    included; `longest` is the largest of them, known to the host.
    """

    table: Tensor
    lengths: Tensor
    longest: int
    page_tokens: int

    def padded(self, longest: int) -> PageRows:
        """The same tokens as if the longest sequence had so many: other passes have that shape too.

        The pages that are then named are never read: the lengths are what they were.
        """
        missing = -(-longest // self.page_tokens) - self.table.shape[1]
        table = F.pad(self.table, (0, max(missing, 0)))
        return PageRows(table, self.lengths, max(longest, self.longest), self.page_tokens)


def paged_decode(
    q_SHD: Tensor,
    planes: Sequence[Tensor],
    pages: PageRows,
    *,
    scale: float,
    window: int | None = None,
    cap: float = 0.0,
    splits: int | None = None,
) -> Tensor:
    """[S, H, D] in q's dtype; H heads share K key-value heads.

    `planes` are one layer's [2, slots, K, D], and for int8 pages their fp32 scales [2, slots, K].  `cap` c puts
    c * tanh(score / c) in a score's place (0: off).  `splits` overrides the rule.
    """
    splits = splits or num_splits(q_SHD, planes[0].shape[2], pages, window)
    total, weight, top = _launch(q_SHD, planes, pages, scale, window, cap, splits)
    if splits == 1:
        return total
    from zinfer.kernels.jit.paged import merge_splits

    num_rows, num_heads, dim = q_SHD.shape
    out = torch.empty_like(q_SHD, memory_format=torch.contiguous_format)
    with launching(q_SHD):
        merge_splits[(num_rows * num_heads,)](
            total, weight, top, out, splits, DIM=dim, BLOCK_D=power(dim), BLOCK_S=power(splits)
        )
    return out


def paged_partials(
    q_SHD: Tensor,
    planes: Sequence[Tensor],
    pages: PageRows,
    *,
    scale: float,
    splits: int,
    window: int | None = None,
    cap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """What each of at least two splits has gathered, fp32: total [S, H, splits, D], weight and top [S, H, splits].

    The same value as `zinfer.layers.partial.Partial`: it merges with keys attended elsewhere.
    """
    assert splits > 1, "a lone split is the result itself"
    return _launch(q_SHD, planes, pages, scale, window, cap, splits)


def paged_decode_twin(
    q_SHD: Tensor,
    planes: Sequence[Tensor],
    pages: PageRows,
    *,
    scale: float,
    window: int | None = None,
    cap: float = 0.0,
) -> Tensor:
    """The slow twin: gather, fp32, softmax."""
    both = planes[0].float() if len(planes) == 1 else planes[0].float() * planes[1][..., None]
    group = q_SHD.shape[1] // both.shape[2]
    rows = []
    for q_HD, table, length in zip(q_SHD.float(), pages.table.long(), pages.lengths.tolist(), strict=True):
        at = torch.arange(0 if window is None else max(0, length - window), length, device=table.device)
        slots = table[at // pages.page_tokens] * pages.page_tokens + at % pages.page_tokens
        k_HnD, v_HnD = (x_nKD.transpose(0, 1).repeat_interleave(group, 0) for x_nKD in both[:, slots])
        scores_H1n = q_HD[:, None] @ k_HnD.transpose(1, 2) * scale
        if cap:
            scores_H1n = cap * torch.tanh(scores_H1n / cap)
        rows.append((scores_H1n.softmax(-1) @ v_HnD)[:, 0])
    return torch.stack(rows).to(q_SHD.dtype)


@cache
def paged_serves(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, is_int8: bool, device: str
) -> bool:
    """Whether `paged_decode` is right for such heads and pages on such a device: tried, once per process.

    That also compiles it; a device may have too little of its shared memory for a shape.
    """
    if not served.serves(device):
        return False
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(2, heads, head_dim, generator=draw).to(device, dtype)
    plain = torch.randn(2, _TRIAL_TOKENS, kv_heads, head_dim, generator=draw)
    planes = [plain.to(device, dtype)]
    if is_int8:
        scales = torch.rand(2, _TRIAL_TOKENS, kv_heads, generator=draw) / 64
        planes = [(plain * 40).round().clamp(-127, 127).to(device, torch.int8), scales.to(device)]
    table = torch.arange(2 * _TRIAL_TOKENS // 32, dtype=torch.int32).flip(0).view(2, -1).to(device)
    lengths = torch.tensor([37, table.shape[1] * 16 - 3], dtype=torch.int32, device=device)
    pages = PageRows(table, lengths, int(table.shape[1] * 16 - 3), 16)
    try:
        want = paged_decode_twin(q, planes, pages, scale=0.2, window=30).float()
        found = [paged_decode(q, planes, pages, scale=0.2, window=30, splits=n).float() for n in (1, 2)]
        is_right = all(bool(((each - want).abs() <= _CLOSE).all()) for each in found)
        reason = "it gives wrong numbers"
    except Exception as error:  # the compiler raises what it likes
        is_right, reason = False, str(error)
    if not is_right:
        logger.warning("attention over pages in place does not work for heads of %d (%s)", head_dim, reason)
    return is_right


def num_splits(q_SHD: Tensor, kv_heads: int, pages: PageRows, window: int | None) -> int:
    """How many programs share a sequence's keys: enough to fill the device, none of them with too little to do."""
    keys = min(pages.longest, window or pages.longest)
    wanted = _PROGRAMS_PER_CORE * num_cores(q_SHD.device) // (q_SHD.shape[0] * kv_heads)
    return max(min(wanted, keys // (_BLOCK_KEYS * _MIN_SPLIT_BLOCKS), _MAX_SPLITS), 1)


def _launch(
    q_SHD: Tensor,
    planes: Sequence[Tensor],
    pages: PageRows,
    scale: float,
    window: int | None,
    cap: float,
    splits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from zinfer.kernels.jit.paged import attend_pages

    num_rows, num_heads, dim = q_SHD.shape
    kv_heads = planes[0].shape[2]
    q_SHD = q_SHD.contiguous()
    total = torch.empty_like(q_SHD) if splits == 1 else q_SHD.new_empty(0)
    weight = top = pages.lengths  # not written by a lone split
    if splits > 1:
        shape = (num_rows, num_heads, splits)
        total = torch.empty((*shape, dim), dtype=torch.float32, device=q_SHD.device)
        weight, top = torch.empty((2, *shape), dtype=torch.float32, device=q_SHD.device)
    codes, scales = planes[0], planes[-1]  # plain pages have no scales, and the kernel reads none
    with launching(q_SHD):
        attend_pages[(num_rows, kv_heads, splits)](
            q_SHD,
            codes[0],
            codes[1],
            scales[0],
            scales[1],
            pages.table,
            pages.lengths,
            total,
            weight,
            top,
            scale,
            cap,
            window or 0,
            pages.table.stride(0),
            splits,
            HEADS=num_heads,
            KV_HEADS=kv_heads,
            DIM=dim,
            PAGE=pages.page_tokens,
            BLOCK_G=max(power(num_heads // kv_heads), 16),
            BLOCK_D=max(power(dim), 16),
            BLOCK_N=_BLOCK_KEYS,
            OPERAND=operand(q_SHD.dtype),
            HAS_SCALES=len(planes) > 1,
            HAS_CAP=cap > 0,
            IS_WHOLE=splits == 1,
        )
    return total, weight, top
