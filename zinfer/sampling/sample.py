"""Draw the next tokens.  In: fp32 logits [S, V] and the sequences.  Out: one Draw each.

A row's draw depends on the row, its parameters, its seed and its step: never on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zinfer.errors import MachineError
from zinfer.sampling.params import SamplingParams
from zinfer.sampling.philox import uniform
from zinfer.spec.sampling_cost import slab_rows

_GREEDY_BELOW = 1e-5  # colder than this only the largest logit has any weight
_MASS_BLOCK = 256


class Drawable(Protocol):
    """What sampling must know of a sequence."""

    @property
    def prompt_ids(self) -> Sequence[int]: ...
    @property
    def output_ids(self) -> Sequence[int]: ...
    @property
    def params(self) -> SamplingParams: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Draw:
    """A token and, where wanted, raw log probabilities: of the token first, then of the likeliest, falling."""

    token_id: int
    logprobs: dict[int, float] | None = None


def sample(logits_SV: Tensor, sequences: Sequence[Drawable], eos_ids: Sequence[int] = ()) -> list[Draw]:
    """Choose one token per row of fp32 logits [S, V]; `eos_ids` are withheld until `min_tokens`.

    Raises MachineError ZI-5501 when a row has no largest finite logit.
    """
    num_rows = slab_rows(logits_SV.shape[1])
    draws: list[Draw] = []
    for start in range(0, len(sequences), num_rows):
        rows = slice(start, start + num_rows)
        draws += _slab(logits_SV[rows], sequences[rows], eos_ids)
    return draws


def _slab(raw_SV: Tensor, sequences: Sequence[Drawable], eos_ids: Sequence[int]) -> list[Draw]:
    logits_SV = _processed(raw_SV, sequences, eos_ids)
    tops_S, ids_S = logits_SV.max(-1)
    if not bool(torch.isfinite(tops_S).all()):
        row = int(torch.isfinite(tops_S).logical_not().nonzero()[0])
        raise MachineError(
            "ZI-5501",
            f"the largest of {raw_SV.shape[1]} logits of sequence {row} of the batch is {float(tops_S[row])}",
            remedy="check the weights with `zinfer verify`; a float16 checkpoint may overflow: use its bfloat16 "
            "or float32 edition",
        )
    random_rows = [
        row for row, sequence in enumerate(sequences) if sequence.params.temperature >= _GREEDY_BELOW
    ]
    if random_rows:
        drawn = _random(logits_SV[random_rows], [sequences[row] for row in random_rows])
        ids_S[random_rows] = drawn
    logprobs = _logprobs(raw_SV, ids_S, sequences)
    return [Draw(token_id, found) for token_id, found in zip(ids_S.tolist(), logprobs, strict=True)]


def _processed(raw_SV: Tensor, sequences: Sequence[Drawable], eos_ids: Sequence[int]) -> Tensor:
    """Penalties and withheld end tokens; the raw logits themselves where no row asks for either."""
    logits_SV = raw_SV
    for row, sequence in enumerate(sequences):
        params = sequence.params
        withheld = [*eos_ids, *params.stop_token_ids] if len(sequence.output_ids) < params.min_tokens else []
        if params.repetition_penalty == 1 and not withheld:
            continue
        if logits_SV is raw_SV:
            logits_SV = raw_SV.clone()
        if params.repetition_penalty != 1:
            seen = torch.tensor(sorted({*sequence.prompt_ids, *sequence.output_ids}), device=raw_SV.device)
            old = logits_SV[row, seen]
            penalty = params.repetition_penalty
            logits_SV[row, seen] = torch.where(old > 0, old / penalty, old * penalty)
        logits_SV[row, withheld] = -torch.inf
    return logits_SV


def _random(logits_RV: Tensor, sequences: Sequence[Drawable]) -> Tensor:
    """Invert the distribution function of what top-k, top-p and min-p leave, one uniform number per row."""
    device = logits_RV.device
    params = [sequence.params for sequence in sequences]
    heat = torch.tensor([p.temperature for p in params], device=device)
    logits_RV = logits_RV / heat[:, None]
    k_rows = [row for row, p in enumerate(params) if 0 < p.top_k < logits_RV.shape[1]]
    if k_rows:
        _keep_top_k(logits_RV, k_rows, [params[row].top_k for row in k_rows])
    probs_RV = torch.softmax(logits_RV, -1)
    p_rows = [row for row, p in enumerate(params) if p.top_p < 1]
    if p_rows:
        floors = _nucleus_floor(
            probs_RV[p_rows], torch.tensor([params[row].top_p for row in p_rows], device=device)
        )
        probs_RV[p_rows] = probs_RV[p_rows].masked_fill(probs_RV[p_rows] < floors[:, None], 0)
    min_p = torch.tensor([p.min_p for p in params], device=device)
    if bool(min_p.any()):
        floors = min_p * probs_RV.amax(-1)
        probs_RV.masked_fill_(probs_RV < floors[:, None], 0)
    steps = [len(sequence.output_ids) for sequence in sequences]
    draws = torch.from_numpy(uniform([sequence.seed for sequence in sequences], steps)).to(device)
    return _invert(probs_RV, draws)


def _invert(probs_RV: Tensor, draws_R: Tensor) -> Tensor:
    """The first token at which the running sum of its row passes draw x the row's whole sum.

    Looks for the block of tokens first, then inside it: running sums in fp64 over a whole vocabulary are slow.
    """
    padded = F.pad(probs_RV, (0, -probs_RV.shape[1] % _MASS_BLOCK))
    blocks_RBW = padded.view(len(padded), -1, _MASS_BLOCK)
    mass_RB = blocks_RBW.sum(-1).cumsum(-1, dtype=torch.float64)
    targets = (draws_R * mass_RB[:, -1])[:, None]
    block = _first_above(mass_RB, targets)
    rows = torch.arange(len(padded), device=padded.device)[:, None]
    targets = targets - torch.where(block > 0, mass_RB.gather(-1, (block - 1).clamp(min=0)), 0.0)
    mass_RW = blocks_RBW[rows, block][:, 0].cumsum(-1, dtype=torch.float64)
    return (block * _MASS_BLOCK + _first_above(mass_RW, targets))[:, 0]


def _first_above(mass_RN: Tensor, targets_R1: Tensor) -> Tensor:
    """The first place where a running sum exceeds the target; never past the place where it reaches its end."""
    whole = mass_RN[:, -1:]
    # Just below the whole: rounding must not lead into a tail of zeros.
    capped = torch.minimum(targets_R1, torch.nextafter(whole, torch.zeros_like(whole)))
    return torch.searchsorted(mass_RN, capped, right=True)


def _keep_top_k(logits_RV: Tensor, rows: list[int], counts: list[int]) -> None:
    """Set to -inf what lies below each row's k-th largest; equals of the k-th stay."""
    best = logits_RV[rows].topk(max(counts), -1).values
    at = torch.tensor(counts, device=logits_RV.device)[:, None] - 1
    logits_RV[rows] = logits_RV[rows].masked_fill(logits_RV[rows] < best.gather(-1, at), -torch.inf)


def _nucleus_floor(probs_RV: Tensor, top_p: Tensor) -> Tensor:
    """The smallest probability in the smallest set of likeliest tokens whose mass reaches top_p (Holtzman 2019)."""
    # numpy sorts a row some ten times faster than torch.
    best = np.sort(-probs_RV.cpu().numpy(), axis=-1)
    mass = -best.cumsum(-1, dtype=np.float64)
    last = (mass < top_p.cpu().numpy()[:, None]).sum(-1)  # how many are in before the one that reaches it
    floors = -np.take_along_axis(best, last.clip(max=best.shape[1] - 1)[:, None], -1)[:, 0]
    return torch.from_numpy(floors).to(probs_RV.device)


def _logprobs(
    raw_SV: Tensor, ids_S: Tensor, sequences: Sequence[Drawable]
) -> Iterator[dict[int, float] | None]:
    for row, sequence in enumerate(sequences):
        count = sequence.params.logprobs
        if count is None:
            yield None
            continue
        logs_V = torch.log_softmax(raw_SV[row], -1)
        best = logs_V.topk(min(count, len(logs_V)))
        token_id = int(ids_S[row])
        likeliest = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        yield {token_id: float(logs_V[token_id])} | likeliest
