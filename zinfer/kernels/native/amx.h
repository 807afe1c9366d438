/* Tiles of the matrix unit ("AMX").  Python side: zinfer.kernels.native.calls. */
#ifndef ZINFER_AMX_H
#define ZINFER_AMX_H

#include "products.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__) && defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__linux__)
#define HAS_AMX

#define EDGE 16 /* rows of a tile, and numbers in single precision in one of them */
#define LINE 64 /* bytes of a tile's row */

/* Tiles are read and written behind the compiler's back: all stores to `at` are done before, and none begins before. */
#define FENCE(at) __asm__ volatile("" ::"r"(at) : "memory")

typedef struct {
    uint8_t palette, start, zeros[14];
    uint16_t bytes[16]; /* of a row */
    uint8_t rows[16];
} shapes_t;

static inline void use_shapes(const shapes_t *shapes) {
    FENCE(shapes);
    _tile_loadconfig(shapes);
}
#endif

#endif
