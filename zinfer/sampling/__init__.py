"""Sampling.  In: logits and parameters.  Out: token ids and reasons to stop."""
