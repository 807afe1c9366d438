"""Kernels.  In: (dtype, shape, rows).  Out: the measured choice of product or attention."""
