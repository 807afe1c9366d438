"""What the compiled library is made of, and the arguments of what it exports.  As the C files beside this one say."""

from __future__ import annotations

import ctypes

SOURCES = (
    "attention.c",
    "activations.c",
    "amx.c",
    "amx_attention.c",
    "amx_columns.c",
    "amx_quant.c",
    "columns.c",
    "lossless.c",
    "products.c",
    "rows.c",
    "tape.c",
    "amx.h",
    "attention.h",
    "columns.h",
    "common.h",
    "kernels.h",
    "lossless.h",
    "products.h",
)
FLAGS = ("-std=c11", "-fno-math-errno", "-fno-trapping-math")
POINTER, SIZE, THREADS = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint
ROW_KERNELS = {
    "zinfer_norm": [*[POINTER] * 3, ctypes.c_double, *[SIZE] * 2, THREADS],
    "zinfer_layer_norm": [*[POINTER] * 4, ctypes.c_double, *[SIZE] * 2, THREADS],
    "zinfer_rotate": [*[POINTER] * 4, *[SIZE] * 6, THREADS],
    "zinfer_attend": [*[POINTER] * 6, *[ctypes.c_double] * 2, *[SIZE] * 7, THREADS],
    "zinfer_attend_tiles": [*[POINTER] * 8, *[ctypes.c_double] * 2, *[SIZE] * 7, THREADS],
    "zinfer_activate": [*[POINTER] * 3, SIZE, THREADS],
    "zinfer_gate": [*[POINTER] * 4, *[SIZE] * 4, THREADS],
    "zinfer_unpack": [*[POINTER] * 4, *[SIZE] * 2, THREADS],
    "zinfer_pack": [*[POINTER] * 5, *[SIZE] * 2, THREADS],
    "zinfer_largest": [*[POINTER] * 3, *[SIZE] * 2, THREADS],
}
PRODUCTS = {
    "zinfer_dense": [*[POINTER] * 5, *[SIZE] * 5, THREADS],
    "zinfer_lossless": [*[POINTER] * 7, *[SIZE] * 5, THREADS],
    "zinfer_columns": [*[POINTER] * 4, *[SIZE] * 3, THREADS],
    "zinfer_quant": [*[POINTER] * 6, *[SIZE] * 5, THREADS],
}
STEPS = (  # of a tape, in the order of tape.c
    "zinfer_norm",
    "zinfer_layer_norm",
    "zinfer_rotate",
    "zinfer_attend",
    "zinfer_activate",
    "zinfer_gate",
    "add",
    "widen",
    "move",
    "zinfer_dense",
    "zinfer_columns",
    "zinfer_quant",
    "zinfer_lossless",
)
