"""Whether an engine's answer is right.  In: its logits and the reference's, of the same prefixes.  Out: a verdict.

Engines round differently, so nothing is compared bit for bit: wherever the reference's two best tokens are more than
`gap` apart the arg-max must be equal, and where they are not it must be one of those within `gap` of the best.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BF16_GAP = 0.25  # logits of order 1 that went through some tens of bf16 layers


@dataclass(frozen=True, slots=True)
class Answer:
    """`matches` needs every position; `decided` counts those where the gap left one token only."""

    matches: bool
    positions: int
    decided: int
    wrong: tuple[int, ...]  # positions
    largest_difference: float
    why: str = ""


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities of [n, vocab] logits."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def acceptable(reference: np.ndarray, tokens: np.ndarray, gap: float) -> np.ndarray:
    """For each of [n] tokens: is its logit in reference [n, vocab] at most `gap` below the best?"""
    return reference.max(-1) - np.take_along_axis(reference, tokens[:, None], -1)[:, 0] <= gap


def compare(
    reference: np.ndarray,
    logits: np.ndarray | None,
    *,
    gap: float = BF16_GAP,
    log_probabilities: bool = False,
) -> Answer:
    """Judge `logits` [n, vocab] against `reference` [n, vocab], row by row of the same prefixes.

    With `log_probabilities` the engine gave no raw logits and the reference is normalised too.
    """
    if logits is None or logits.shape != reference.shape:
        shape = None if logits is None else logits.shape
        return Answer(False, 0, 0, (), float("nan"), f"logits {reference.shape} were wanted, {shape} came")
    if log_probabilities:
        reference = log_softmax(reference)
    if not np.isfinite(logits).all():
        return Answer(False, len(logits), 0, (), float("nan"), "logits are not all finite")
    good = acceptable(reference, logits.argmax(-1), gap)
    two = np.partition(reference, -2, axis=-1)[:, -2:]
    return Answer(
        matches=bool(good.all()),
        positions=len(good),
        decided=int((two[:, 1] - two[:, 0] > gap).sum()),
        wrong=tuple(int(position) for position in np.flatnonzero(~good)),
        largest_difference=float(np.abs(logits - reference).max()),
    )


def stream_error(reference: np.ndarray, forced: list[int], tokens: list[int], gap: float = BF16_GAP) -> str:
    """What is wrong with an engine's own greedy `tokens`; "" if nothing.

    They are compared up to the first that differs from the reference's: after it the prefixes are not the same.
    """
    for position, (wanted, came) in enumerate(zip(forced, tokens, strict=False)):
        if came != wanted:
            row = reference[position]
            short = float(row.max() - row[came])
            return f"token {position} is {came}, {short:.3f} below the best" if short > gap else ""
    return "" if len(tokens) >= len(forced) else f"{len(forced)} tokens were wanted, {len(tokens)} came"
