"""Bytes that sampling needs beside the logits.  In: sequences and vocabulary.  Out: an upper bound, as an int."""

from __future__ import annotations

SLAB_LOGITS = 2**19  # logits worked on at once, whatever the batch; one row where a row has more
_BYTES_PER_LOGIT = 44  # logits as changed, divided, probabilities, sorted and summed up in fp64


def slab_rows(vocab: int) -> int:
    """Rows of logits that are sampled from together."""
    return max(1, SLAB_LOGITS // vocab)


def sampling_workspace_bytes(sequences: int, vocab: int) -> int:
    """Peak bytes of one `sample` call with every option in use; the logits themselves are not counted.

    Needed when the pass is over and its other activations are gone.
    """
    padded = vocab + -vocab % 256
    return _BYTES_PER_LOGIT * min(sequences, slab_rows(vocab)) * padded + 4096 * sequences
