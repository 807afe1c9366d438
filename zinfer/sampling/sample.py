"""Draw the next tokens.  In: fp32 logits [S, V] and the sequences.  Out: one Draw each.

All work is done where the logits lie: ids, and the log probabilities that were asked for, are all that leaves.  A
row's draw depends on the row, its parameters, its seed and its step: never on the rows beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zinfer.errors import MachineError
from zinfer.kernels.native.calls import kernels
from zinfer.memory.upload import indices, upload
from zinfer.sampling.params import SamplingParams
from zinfer.sampling.philox import uniform
from zinfer.spec.sampling_cost import slab_rows

_GREEDY_BELOW = 1e-5  # colder than this only the largest logit has any weight
_MASS_BLOCK = 256
_SEVERAL = 8  # rows from which threads find the largest of each sooner than numpy by itself


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


@dataclass(frozen=True, slots=True)
class Drawn:
    """Draws that lie where their logits do: `numbers` fp64, sequence by sequence within each slab of rows.

    Of a slab: S ids, S largest logits; then for every distinct `logprobs` count n its sequences' log probability of
    the id, their n likeliest ids and those log probabilities.  fp64 holds ids and fp32 exactly: one dtype, one copy.
    """

    numbers: Tensor
    counts: list[int | None]  # logprobs wanted, by sequence
    vocab: int


def sample(logits_SV: Tensor, sequences: Sequence[Drawable], eos_ids: Sequence[int] = ()) -> list[Draw]:
    """Choose one token per row of fp32 logits [S, V]; `eos_ids` are withheld until `min_tokens`.

    Raises MachineError ZI-5501 when a row has no largest finite logit.
    """
    return collect([draw(logits_SV, sequences, eos_ids)])[0]


def draw(logits_SV: Tensor, sequences: Sequence[Drawable], eos_ids: Sequence[int] = ()) -> Drawn:
    """The same without waiting for a device: nothing comes to the host before `collect`."""
    num_rows = slab_rows(logits_SV.shape[1])
    found = [
        _slab(logits_SV[start : start + num_rows], sequences[start : start + num_rows], eos_ids)
        for start in range(0, len(sequences), num_rows)
    ]
    numbers = torch.cat(found) if found else logits_SV.new_empty(0, dtype=torch.float64)
    return Drawn(numbers, [sequence.params.logprobs for sequence in sequences], logits_SV.shape[1])


def collect(drawn: Sequence[Drawn]) -> list[list[Draw]]:
    """Bring all draws of a pass to the host in one copy.  Raises MachineError ZI-5501."""
    if not drawn:
        return []
    numbers = iter(torch.cat([part.numbers for part in drawn]).tolist())
    return [_read(part, numbers) for part in drawn]


def _read(drawn: Drawn, numbers: Iterator[float]) -> list[Draw]:
    num_rows, draws = slab_rows(drawn.vocab), list[Draw]()
    for start in range(0, len(drawn.counts), num_rows):
        counts = drawn.counts[start : start + num_rows]
        ids = [int(next(numbers)) for _ in counts]
        for row in range(len(counts)):
            top = next(numbers)
            if not math.isfinite(top):
                raise _no_numbers(drawn.vocab, start + row, top)
        logprobs: dict[int, dict[int, float]] = {}
        for count, rows in _by_count(counts):
            own = [next(numbers) for _ in rows]
            size = min(count, drawn.vocab)
            likeliest = [[int(next(numbers)) for _ in range(size)] for _ in rows]
            for row, log, tokens in zip(rows, own, likeliest, strict=True):
                logprobs[row] = {ids[row]: log} | {token: next(numbers) for token in tokens}
        draws += [Draw(token_id, logprobs.get(row)) for row, token_id in enumerate(ids)]
    return draws


def _no_numbers(vocab: int, row: int, top: float) -> MachineError:
    return MachineError(
        "ZI-5501",
        f"the largest of {vocab} logits of sequence {row} of the batch is {top}",
        remedy="check the weights with `zinfer verify`; a float16 checkpoint may overflow: use its bfloat16 "
        "or float32 edition",
    )


def _slab(raw_SV: Tensor, sequences: Sequence[Drawable], eos_ids: Sequence[int]) -> Tensor:
    logits_SV = _processed(raw_SV, sequences, eos_ids)
    tops_S, ids_S = _largest(logits_SV)
    random = [row for row, sequence in enumerate(sequences) if sequence.params.temperature >= _GREEDY_BELOW]
    if random:
        which = _which(random, len(sequences), raw_SV.device)
        ids_S[which] = _random(logits_SV[which], [sequences[row] for row in random])
    del logits_SV
    numbers = [ids_S, tops_S]
    for count, rows in _by_count([sequence.params.logprobs for sequence in sequences]):
        which = _which(rows, len(sequences), raw_SV.device)
        logs_RV = torch.log_softmax(raw_SV[which], -1)
        best = logs_RV.topk(min(count, logs_RV.shape[1]))
        numbers += [logs_RV.gather(-1, ids_S[which, None]), best.indices, best.values]
    return torch.cat([part.flatten().double() for part in numbers])


def _largest(logits_SV: Tensor) -> tuple[Tensor, Tensor]:
    """Of every row the largest logit and its id, of equals the first; a row that holds a NaN gives that."""
    if logits_SV.device.type != "cpu":
        tops_S, ids_S = logits_SV.max(-1)
        return tops_S, ids_S
    is_much = len(logits_SV) >= _SEVERAL and logits_SV.dtype == torch.float32
    if is_much and (compiled := kernels()) is not None:
        return compiled.largest(logits_SV)
    # numpy looks through a row some four times faster than torch, which would wake its threads for every slab.
    ids_S = torch.from_numpy(logits_SV.numpy().argmax(-1))
    return logits_SV.gather(-1, ids_S[:, None])[:, 0], ids_S


def _by_count(counts: Sequence[int | None]) -> list[tuple[int, list[int]]]:
    """Rows that want as many log probabilities: a top-k of another size may order equals differently."""
    found: dict[int, list[int]] = {}
    for row, count in enumerate(counts):
        if count is not None:
            found.setdefault(count, []).append(row)
    return list(found.items())


def _which(rows: Sequence[int], total: int, device: torch.device) -> slice | Tensor:
    """Rows as an index; a slice, which copies nothing, where it is all of them."""
    return slice(None) if len(rows) == total else indices(rows, device)


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
            seen = indices(sorted({*sequence.prompt_ids, *sequence.output_ids}), raw_SV.device)
            old = logits_SV[row, seen]
            penalty = params.repetition_penalty
            logits_SV[row, seen] = torch.where(old > 0, old / penalty, old * penalty)
        if withheld:
            logits_SV[row, indices(withheld, raw_SV.device)] = -torch.inf
    return logits_SV


def _random(logits_RV: Tensor, sequences: Sequence[Drawable]) -> Tensor:
    """Invert the distribution function of what top-k, top-p and min-p leave, one uniform number per row."""
    device, num_rows = logits_RV.device, len(sequences)
    params = [sequence.params for sequence in sequences]
    draws = uniform([sequence.seed for sequence in sequences], [len(each.output_ids) for each in sequences])
    asked = [[p.temperature, p.top_p, p.min_p, u] for p, u in zip(params, draws.tolist(), strict=True)]
    table_4R = upload(torch.tensor(asked, dtype=torch.float64).t().contiguous(), device)
    heat_R, top_p_R, min_p_R = table_4R[:3].float()
    logits_RV = logits_RV / heat_R[:, None]
    if cut := [row for row, p in enumerate(params) if 0 < p.top_k < logits_RV.shape[1]]:
        _keep_top_k(logits_RV, _which(cut, num_rows, device), [params[row].top_k for row in cut])
    probs_RV = torch.softmax(logits_RV, -1)
    if cut := [row for row, p in enumerate(params) if p.top_p < 1]:
        which = _which(cut, num_rows, device)
        chosen_RV = probs_RV[which]
        floors = _nucleus_floor(chosen_RV, top_p_R[which])
        probs_RV[which] = chosen_RV.masked_fill(chosen_RV < floors[:, None], 0)
    if any(p.min_p for p in params):
        floors = min_p_R * probs_RV.amax(-1)
        probs_RV.masked_fill_(probs_RV < floors[:, None], 0)
    return _invert(probs_RV, table_4R[3])


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
    # Sums that are no numbers are refused later; until then they must not lead out of the row.
    return torch.searchsorted(mass_RN, capped, right=True).clamp_(max=mass_RN.shape[1] - 1)


def _keep_top_k(logits_RV: Tensor, which: slice | Tensor, counts: list[int]) -> None:
    """Set to -inf what lies below each row's k-th largest; equals of the k-th stay."""
    chosen_RV = logits_RV[which]
    best = chosen_RV.topk(max(counts), -1).values
    at = indices(counts, logits_RV.device)[:, None] - 1
    logits_RV[which] = chosen_RV.masked_fill(chosen_RV < best.gather(-1, at), -torch.inf)


def _nucleus_floor(probs_RV: Tensor, top_p_R: Tensor) -> Tensor:
    """The smallest probability in the smallest set of likeliest tokens whose mass reaches top_p (Holtzman 2019)."""
    best_RV = _falling(probs_RV)
    mass_RV = best_RV.cumsum(-1, dtype=torch.float64)
    last = (mass_RV < top_p_R[:, None]).sum(-1)  # how many are in before the one that reaches it
    return best_RV.gather(-1, last.clamp_(max=best_RV.shape[1] - 1)[:, None])[:, 0]


def _falling(probs_RV: Tensor) -> Tensor:
    """Every row sorted, the largest first."""
    if probs_RV.device.type != "cpu":
        return probs_RV.sort(-1, descending=True).values
    # numpy sorts a row some ten times faster than torch.
    rising = np.negative(probs_RV.numpy())
    rising.sort(-1)
    return torch.from_numpy(np.negative(rising, out=rising))
