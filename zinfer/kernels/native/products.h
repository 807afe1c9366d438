/* What products share, whichever unit of the processor multiplies.  Python side: zinfer.kernels.native.calls. */
#ifndef ZINFER_PRODUCTS_H
#define ZINFER_PRODUCTS_H

#include "kernels.h"
#include "lossless.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

#define LANES 32  /* bfloat16 in a register */
#define BLOCK 256 /* most rows that are multiplied at a time */
#define ALONE 16  /* and on the matrix unit, where every piece packs its rows itself */
#define UNROLL _Pragma("GCC unroll 32")

typedef struct {
    const bf16 *x, *weight, *bias;
    const lossless_t *from; /* unless it is NULL what `weight` is unpacked from, piece by piece */
    bf16 *y, *packed; /* packed: NULL where every piece packs its rows itself */
    float *wide;      /* in place of y: the same numbers in single precision */
    size_t stride;    /* elements from one row of the result to the next */
    size_t rows, tiles, outputs, inputs, piece, num_threads;
    void (*run)(void *job, size_t start, size_t stop); /* of a piece, in units of so many outputs */
    size_t unit;
} dense_t;

/* A piece whose weights are unpacked first, onto the thread's stack, and then multiplied as if all had been there. */
static void unpacked_run(void *data, size_t start, size_t stop) {
    dense_t job = *(const dense_t *)data;
    const size_t first = start * job.unit, end = stop * job.unit < job.outputs ? stop * job.unit : job.outputs;
    __m512i room[(end - first) * job.inputs / LANES];
    zinfer_unpack_rows(job.from, (bf16 *)room, first, end);
    job.weight = (const bf16 *)room;
    job.outputs = end - first;
    if (job.bias) job.bias += first;
    if (job.wide) job.wide += first;
    if (job.y) job.y += first;
    job.run(&job, 0, stop - start);
}

/* All outputs, `job->piece` times `unit` at a time. */
static inline void share_outputs(void (*run)(void *, size_t, size_t), dense_t *job, size_t unit) {
    job->run = run, job->unit = unit;
    share_runs(job->from ? unpacked_run : run, job, (job->outputs + unit - 1) / unit, job->piece,
               (unsigned)job->num_threads);
}

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

#define GROUP 64 /* inputs that share a scale and a zero: zinfer.spec.quant */

typedef struct {
    const bf16 *x;
    const uint32_t *pairs; /* of inputs, packed: tiles of rows, a pair of each row in turn */
    const float *sums;     /* of each group's inputs: tile by tile likewise; on the matrix unit row by row */
    const uint8_t *nibbles, *low;
    const bf16 *scales;
    bf16 *y;
    size_t rows, outputs, inputs, half, width;
} quant_t;

/* bfloat16 of v - 8, and of 16 (v - 8), for v = 0 .. 15: twice over, for an index has a fifth bit. */
static const bf16 STEPS[16] = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                               0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
static const bf16 STEPS_16[16] = {0xc300, 0xc2e0, 0xc2c0, 0xc2a0, 0xc280, 0xc240, 0xc200, 0xc180,
                                  0x0000, 0x4180, 0x4200, 0x4240, 0x4280, 0x42a0, 0x42c0, 0x42e0};

static inline __m512i twice(const bf16 *table) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)table));
}

static inline void put_16(const quant_t *job, size_t row, size_t output, __m512 total) {
    if (output >= job->outputs) return;
    const size_t left = job->outputs - output;
    const __mmask16 mask = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
    _mm256_mask_storeu_epi16(job->y + row * job->outputs + output, mask, (__m256i)_mm512_cvtneps_pbh(total));
}

/* amx.c, amx_quant.c: whether the processor has a matrix unit that this process may use, and products on it: one block
 * of rows; all rows, of `units` times 32 outputs. */
int zinfer_has_amx(void);
void zinfer_dense_amx(dense_t *job);
void zinfer_quant_amx(quant_t *job, size_t units, unsigned num_threads);
#endif

#endif
