/* Products of bfloat16 rows with weights that are published as [inputs, outputs].  Python side: zinfer.kernels.columns.
 *
 * A weight's row is read along the outputs, DEPTH rows side by side, so that memory is read in long runs; two rows'
 * elements are laced together into the pairs of inputs that the processor multiplies.  Every element of y is one sum
 * over the pairs in their order, whatever the number of rows, threads and pieces. */
#include "columns.h"

#ifdef __AVX512BF16__

#define DEPTH 16      /* inputs of a step, whose laced weights stay in registers while all rows meet them */
#define PAIRS (DEPTH / 2)
#define TALL 32       /* rows whose sums lie together */
#define SUMS 16384    /* of a piece: they fit the second cache, those of one row the nearest */

/* Inputs [input, input + DEPTH) times LANES outputs of the piece, of `tall` rows; beyond `count` inputs there are
 * zeros in both. */
static inline void step(const columns_t *job, size_t row, size_t tall, size_t input, size_t count, size_t output,
                        __mmask32 mask, float *sums) {
    const bf16 *w = job->weight + input * job->outputs + output;
    __m512i low[PAIRS], high[PAIRS];
    UNROLL for (size_t p = 0; p < PAIRS; p++) {
        const __mmask32 first = 2 * p < count ? mask : 0, second = 2 * p + 1 < count ? mask : 0;
        _mm_prefetch((const char *)(w + (2 * p + DEPTH) * job->outputs), _MM_HINT_T1);
        _mm_prefetch((const char *)(w + (2 * p + 1 + DEPTH) * job->outputs), _MM_HINT_T1);
        lace(_mm512_maskz_loadu_epi16(first, w + 2 * p * job->outputs),
             _mm512_maskz_loadu_epi16(second, w + (2 * p + 1) * job->outputs), &low[p], &high[p]);
    }
    for (size_t m = 0; m < tall; m++) {
        uint32_t last[PAIRS] = {0};
        const bf16 *x = job->x + (row + m) * job->inputs + input;
        if (count < DEPTH) x = memcpy(last, x, count * sizeof(bf16));
        float *mine = sums + m * job->width;
        __m512 left = _mm512_loadu_ps(mine), right = _mm512_loadu_ps(mine + LANES / 2);
        UNROLL for (size_t p = 0; p < PAIRS; p++) {
            uint32_t pair;
            memcpy(&pair, x + 2 * p, sizeof pair);
            const __m512bh values = (__m512bh)_mm512_set1_epi32((int)pair);
            left = _mm512_dpbf16_ps(left, (__m512bh)low[p], values);
            right = _mm512_dpbf16_ps(right, (__m512bh)high[p], values);
        }
        _mm512_storeu_ps(mine, left);
        _mm512_storeu_ps(mine + LANES / 2, right);
    }
}

static void columns_piece(void *data, size_t piece) {
    const columns_t *job = data;
    const size_t start = piece * job->width, stop = end_of(piece, job->width, job->outputs);
    float sums[SUMS];
    for (size_t row = 0; row < job->rows; row += TALL) {
        const size_t tall = job->rows - row < TALL ? job->rows - row : TALL;
        memset(sums, 0, tall * job->width * sizeof(float));
        for (size_t input = 0; input < job->inputs; input += DEPTH) {
            const size_t count = job->inputs - input < DEPTH ? job->inputs - input : DEPTH;
            for (size_t output = start; output < stop; output += LANES) {
                const __mmask32 mask = stop - output < LANES ? (__mmask32)((1u << (stop - output)) - 1) : 0xffffffff;
                step(job, row, tall, input, count, output, mask, sums + output - start);
            }
        }
        for (size_t m = 0; m < tall; m++)
            for (size_t output = start; output < stop; output++) {
                const float sum = sums[m * job->width + output - start];
                job->y[(row + m) * job->outputs + output] =
                    narrow(job->bias ? sum + widen(job->bias[output]) : sum);
            }
    }
}

/* x [rows, inputs] times the weight [inputs, outputs], plus bias [outputs] unless it is NULL. */
void zinfer_columns(const bf16 *x, const bf16 *weight, const bf16 *bias, bf16 *y, size_t rows, size_t outputs,
                    size_t inputs, unsigned num_threads) {
    const size_t most = SUMS / (rows < TALL ? rows : TALL) / LANES * LANES, shared = 2 * (size_t)num_threads;
    const size_t num_pieces = (outputs + most * num_threads - 1) / (most * num_threads) * num_threads;
    const size_t each = outputs / (num_pieces < shared ? shared : num_pieces) + 1;
    const size_t wide = (each + LANES - 1) / LANES * LANES, width = wide < most ? wide : most;
    columns_t job = {x, weight, bias, y, rows, outputs, inputs, width};
    if (zinfer_has_amx()) {
        zinfer_columns_amx(&job, num_threads);
        return;
    }
    share(columns_piece, &job, (outputs + width - 1) / width, num_threads);
}
#endif
