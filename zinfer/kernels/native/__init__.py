"""Kernels for a processor, in C: `build` compiles them on this machine, `calls` runs them."""
