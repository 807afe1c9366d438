"""One row per text.  In: token rows [T, M] and where each text begins.  Out: [S, M per mode] in the same dtype.

The modes are those of sentence-transformers (Reimers and Gurevych 2019, arXiv 1908.10084, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

MODES: dict[str, Callable[[Tensor], Tensor]] = {
    "cls": lambda rows: rows[0],
    "max": lambda rows: rows.amax(0),
    "mean": lambda rows: rows.sum(0) / rows.shape[0],
    "mean_sqrt_len": lambda rows: rows.sum(0) / rows.shape[0] ** 0.5,
}


def pool(x_TM: Tensor, bounds: Sequence[int], modes: Sequence[str]) -> Tensor:
    """Each text's rows by each mode, side by side.  Texts are summed one by one: none depends on its batch mates."""
    texts = [x_TM[start:stop] for start, stop in pairwise(bounds)]
    return torch.stack([torch.cat([MODES[mode](rows) for mode in modes]) for rows in texts])


def normalised(x_SM: Tensor) -> Tensor:
    """Rows of length 1, computed in fp32."""
    return F.normalize(x_SM.float(), dim=-1)
