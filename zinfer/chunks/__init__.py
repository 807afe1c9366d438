"""Chunks.  In: an index of tensors.  Out: aligned, checksummed runs of bytes in execution order."""
