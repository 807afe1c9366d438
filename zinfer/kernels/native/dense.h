/* What dense products share, whichever unit of the processor multiplies.  Python side: zinfer.kernels.native.calls. */
#ifndef ZINFER_DENSE_H
#define ZINFER_DENSE_H

#include "kernels.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

#define LANES 32  /* bfloat16 in a register */
#define BLOCK 256 /* most rows that are multiplied at a time */
#define ALONE 16  /* and on the matrix unit, where every piece packs its rows itself */
#define UNROLL _Pragma("GCC unroll 32")

typedef struct {
    const bf16 *x, *weight, *bias;
    bf16 *y, *packed; /* packed: NULL where every piece packs its rows itself */
    float *wide;      /* in place of y: the same numbers in single precision */
    size_t stride;    /* elements from one row of the result to the next */
    size_t rows, tiles, outputs, inputs, piece, num_threads;
} dense_t;

/* Inputs with the zeros that fill their last register. */
static inline size_t padded(size_t inputs) { return (inputs + LANES - 1) / LANES * LANES; }

/* The same as narrow() of each. */
static inline __m256i narrow_16(__m512 wide) {
    const __m512i bits = _mm512_castps_si512(wide), one = _mm512_set1_epi32(1);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    const __m512i above = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(wide, wide, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(_mm512_srli_epi32(above, 16), is_nan, 0x7fc0));
}

/* amx.c: whether the processor has a matrix unit that this process may use, and one block of rows on it. */
int zinfer_has_amx(void);
void zinfer_dense_amx(dense_t *job);
#endif

#endif
