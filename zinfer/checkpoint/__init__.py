"""Checkpoints as hostile input.  In: a folder of safetensors.  Out: name -> (file, range, dtype, shape)."""
