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

/* The first `count` tiles have `tall` rows, the others all; a row is a line. */
static inline void use_rows(size_t tall, int count) {
    shapes_t shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shapes.rows[i] = i < count ? (uint8_t)tall : EDGE;
        shapes.bytes[i] = LINE;
    }
    use_shapes(&shapes);
}

/* Sixteen registers of sixteen words, turned. */
static inline void turn(__m512i *x) {
    __m512i y[EDGE];
    UNROLL for (int i = 0; i < EDGE; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    UNROLL for (int i = 0; i < EDGE; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    UNROLL for (int i = 0; i < EDGE; i += 8) UNROLL for (int k = 0; k < 4; k++) {
        y[i + k] = _mm512_shuffle_i32x4(x[i + k], x[i + k + 4], 0x88);
        y[i + k + 4] = _mm512_shuffle_i32x4(x[i + k], x[i + k + 4], 0xdd);
    }
    UNROLL for (int k = 0; k < 8; k++) {
        x[k] = _mm512_shuffle_i32x4(y[k], y[k + 8], 0x88);
        x[k + 8] = _mm512_shuffle_i32x4(y[k], y[k + 8], 0xdd);
    }
}
#endif

#endif
