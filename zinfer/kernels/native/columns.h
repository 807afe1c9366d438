/* What products with weights published as [inputs, outputs] share.  Python side: zinfer.kernels.columns. */
#ifndef ZINFER_COLUMNS_H
#define ZINFER_COLUMNS_H

#include "products.h"

#ifdef __AVX512BF16__
typedef struct {
    const bf16 *x, *weight, *bias;
    bf16 *y;
    size_t rows, outputs, inputs, width; /* width: outputs of a piece, and from row to row of sums */
} columns_t;

/* Elements 0 to 15 of two rows in turn, and 16 to 31. */
static inline void lace(__m512i even, __m512i odd, __m512i *low, __m512i *high) {
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    *low = _mm512_permutex2var_epi16(even, first, odd);
    *high = _mm512_permutex2var_epi16(even, second, odd);
}

/* amx_columns.c */
void zinfer_columns_amx(columns_t *job, unsigned num_threads);
#endif

#endif
