"""Kernels in Triton.  Imported only where they run: on a CUDA device, or in tests by way of Triton's interpreter."""
