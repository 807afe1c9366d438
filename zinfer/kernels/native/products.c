/* Products of a few bfloat16 rows with a weight.  Python side: zinfer.kernels.native.
 *
 * Every element of y is one sum over the inputs in one order, whatever the number of rows and threads. */
#include "products.h"

int zinfer_has_products(void) {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

#ifdef __AVX512BF16__
#define TALL 6   /* most rows of a tile of a dense product */
#define WIDE 4   /* and outputs */
#define LEAST 16 /* outputs of a piece that several tiles meet */
#define KEPT (320 * 1024) /* so many bytes of weights stay in the second cache meanwhile */
#define RUN (256 * 1024)  /* and so many a thread takes at a time for a row, or a tile, by itself */
#define UNPACKED (128 * 1024) /* and so many that it unpacks first, whatever they meet */

/* Tiles are of about one height: a last row by itself would ask for all weights once more. */
static inline size_t first_row(const dense_t *job, size_t tile) { return tile * job->rows / job->tiles; }

/* Four registers' sums, of halves and of quarters: four numbers each, one sum after the other. */
static inline __m512 quarters_of(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
}

/* Pairs and neighbours of four such registers, a row's each: the sums, row by row.  The order in which a sum is added
 * up is the same wherever among the sixteen it stands. */
static inline __m512 sums_of(const __m512 *x) {
    const __m512 ab = _mm512_add_ps(_mm512_shuffle_ps(x[0], x[1], 0x44), _mm512_shuffle_ps(x[0], x[1], 0xee));
    const __m512 cd = _mm512_add_ps(_mm512_shuffle_ps(x[2], x[3], 0x44), _mm512_shuffle_ps(x[2], x[3], 0xee));
    const __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x88), _mm512_shuffle_ps(ab, cd, 0xdd));
    return _mm512_permutexvar_ps(_mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0), sums);
}

/* Up to four rows' sums of four outputs from `output` on. */
static inline void put_wide(const dense_t *job, size_t row, size_t output, int count, __m512 sums) {
    if (job->bias) {
        const __m128i bias = _mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i *)(job->bias + output)));
        sums = _mm512_add_ps(sums, _mm512_broadcast_f32x4(_mm_castsi128_ps(_mm_slli_epi32(bias, 16))));
    }
    const __m256i all = narrow_16(sums);
    const size_t at = row * job->stride + output;
    if (job->wide) {
        float each[16];
        _mm512_storeu_si512(each, _mm512_slli_epi32(_mm512_cvtepu16_epi32(all), 16));
        for (int m = 0; m < count; m++)
            memcpy(job->wide + at + m * job->stride, each + m * WIDE, WIDE * sizeof(float));
        return;
    }
    bf16 each[16];
    _mm256_storeu_si256((__m256i *)each, all);
    for (int m = 0; m < count; m++) memcpy(job->y + at + m * job->stride, each + m * WIDE, WIDE * sizeof(bf16));
}

static inline void put(const dense_t *job, size_t row, size_t output, float sum) {
    const bf16 rounded = narrow(job->bias ? sum + widen(job->bias[output]) : sum);
    if (job->wide)
        job->wide[row * job->stride + output] = widen(rounded);
    else
        job->y[row * job->stride + output] = rounded;
}

/* The next 32 inputs of M rows times N outputs; those of `count` outputs are asked for that come later. */
#define STEP(M, N, LOAD, count)                                                                               \
    do {                                                                                                      \
        __m512bh weights[N];                                                                                  \
        UNROLL for (int n = 0; n < (count); n++)                                                              \
            _mm_prefetch((const char *)(ahead + n * inputs + i), _MM_HINT_T1);                                \
        UNROLL for (int n = 0; n < N; n++) weights[n] = (__m512bh)LOAD(w + n * inputs + i);                   \
        UNROLL for (int m = 0; m < M; m++) {                                                                  \
            const __m512bh values = (__m512bh)_mm512_loadu_si512(x + i * M + m * LANES);                      \
            UNROLL for (int n = 0; n < N; n++) sums[m][n] = _mm512_dpbf16_ps(sums[m][n], weights[n], values); \
        }                                                                                                     \
    } while (0)
#define STEPS(M, N, count) \
    for (; i < whole; i += LANES) STEP(M, N, _mm512_loadu_si512, count)
#define LAST(from) _mm512_maskz_loadu_epi16(mask, from)

/* Rows [row, row + M) times outputs [output, output + N), all sums in registers. */
#define TILE(M, N)                                                                                              \
    static void tile_##M##_##N(const dense_t *job, const bf16 *x, size_t row, size_t output, const bf16 *ahead, \
                               size_t count) {                                                                  \
        const size_t inputs = job->inputs, whole = inputs / LANES * LANES;                                      \
        const bf16 *w = job->weight + output * inputs;                                                          \
        const __mmask32 mask = (__mmask32)((1u << (inputs - whole)) - 1);                                       \
        __m512 sums[M][N];                                                                                      \
        UNROLL for (int m = 0; m < M; m++) UNROLL for (int n = 0; n < N; n++) sums[m][n] = _mm512_setzero_ps(); \
        size_t i = 0;                                                                                           \
        switch (count) {                                                                                        \
            case 0: STEPS(M, N, 0); break;                                                                      \
            case 1: STEPS(M, N, 1); break;                                                                      \
            case 2: STEPS(M, N, 2); break;                                                                      \
            default: STEPS(M, N, WIDE);                                                                         \
        }                                                                                                       \
        if (i < inputs) STEP(M, N, LAST, 0);                                                                    \
        UNROLL for (int m = 0; m < M; m += 4) {                                                                 \
            __m512 all, four[4];                                                                                \
            UNROLL for (int k = 0; k < 4; k++) {                                                                \
                const __m512 *of = sums[m + k < M ? m + k : m];                                                 \
                four[k] = quarters_of(of[0], of[N / 4], of[N / 2], of[N - 1]);                                  \
            }                                                                                                   \
            all = sums_of(four);                                                                                \
            if (N == WIDE) {                                                                                    \
                put_wide(job, row + m, output, M - m < 4 ? M - m : 4, all);                                     \
            } else {                                                                                            \
                float each[16];                                                                                 \
                _mm512_storeu_ps(each, all);                                                                    \
                for (int k = 0; k < 4 && m + k < M; k++) put(job, row + m + k, output, each[k * WIDE]);         \
            }                                                                                                   \
        }                                                                                                       \
    }
TILE(2, 1) TILE(3, 1) TILE(4, 1) TILE(5, 1) TILE(6, 1) TILE(3, 4) TILE(4, 4) TILE(5, 4) TILE(6, 4)

typedef void (*tile_t)(const dense_t *, const bf16 *, size_t, size_t, const bf16 *, size_t);
/* Two rows are as fast as their weights come by a single stream; one is by itself (row_run). */
static const tile_t NARROW_TILES[TALL] = {NULL, tile_2_1, tile_3_1, tile_4_1, tile_5_1, tile_6_1};
static const tile_t WIDE_TILES[TALL] = {NULL, NULL, tile_3_4, tile_4_4, tile_5_4, tile_6_4};

/* `tall` rows of x, 32 inputs of each in turn, zeros beyond the last: what a tile reads one after the other. */
static void pack(const dense_t *job, bf16 *packed, size_t row, size_t tall) {
    for (size_t m = 0; m < tall; m++) {
        const bf16 *x = job->x + (row + m) * job->inputs;
        bf16 *to = packed + m * LANES;
        size_t i = 0;
        for (; i + LANES <= job->inputs; i += LANES, to += tall * LANES)
            _mm512_store_si512(to, _mm512_loadu_si512(x + i));
        if (i < job->inputs)
            _mm512_store_si512(to, _mm512_maskz_loadu_epi16((1u << (job->inputs - i)) - 1, x + i));
    }
}

static void pack_piece(void *data, size_t tile) {
    const dense_t *job = data;
    const size_t row = first_row(job, tile);
    pack(job, job->packed + row * padded(job->inputs), row, first_row(job, tile + 1) - row);
}

/* A compute-bound loop looks too little ahead for the memory to keep up.  So while all tiles meet a piece, the weights
 * of the piece that this thread will take next are asked for, in equal parts; a lone tile, which waits for memory
 * anyway, asks for its own next outputs. */
static void tiles_run(void *data, size_t start, size_t stop) {
    const dense_t *job = data;
    const size_t steps = job->tiles * ((stop - start) / WIDE);
    size_t step = 0;
    __m512i own[job->packed ? 1 : TALL * (job->inputs / LANES + 1)];
    for (size_t tile = 0; tile < job->tiles; tile++) {
        const size_t row = first_row(job, tile), tall = first_row(job, tile + 1) - row;
        const bf16 *x = job->packed ? job->packed + row * padded(job->inputs) : (bf16 *)own;
        if (!job->packed) pack(job, (bf16 *)own, row, tall);
        size_t output = start;
        for (; WIDE_TILES[tall - 1] && output + WIDE <= stop; output += WIDE, step++) {
            size_t ahead = output + WIDE, count = WIDE;
            if (job->tiles > 1) {
                ahead = stop + step * job->piece / steps;
                count = stop + (step + 1) * job->piece / steps - ahead;
            }
            WIDE_TILES[tall - 1](job, x, row, output, job->weight + ahead * job->inputs,
                                 ahead + count <= job->outputs ? count : 0);
        }
        for (; output < stop; output++) NARROW_TILES[tall - 1](job, x, row, output, NULL, 0);
    }
}

/* Outputs of the only row.  It is as fast as its weights come, which is in one stream that nothing is asked for ahead of;
 * a sum is added up in the order of a tile's. */
static void row_run(void *data, size_t start, size_t stop) {
    const dense_t *job = data;
    const size_t inputs = job->inputs, whole = inputs / LANES * LANES;
    const __mmask32 mask = (__mmask32)((1u << (inputs - whole)) - 1);
    for (size_t output = start; output < stop; output++) {
        const bf16 *x = job->x, *w = job->weight + output * inputs;
        __m512 sum = _mm512_setzero_ps();
        for (size_t i = 0; i < whole; i += LANES)
            sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(w + i), (__m512bh)_mm512_loadu_si512(x + i));
        if (whole < inputs)
            sum = _mm512_dpbf16_ps(sum, (__m512bh)LAST(w + whole), (__m512bh)LAST(x + whole));
        const __m512 quarters = quarters_of(sum, sum, sum, sum), four[4] = {quarters, quarters, quarters, quarters};
        put(job, 0, output, _mm512_cvtss_f32(sums_of(four)));
    }
}

/* Of a piece: long enough that going on to the next costs little, short enough for every thread to take a few. */
static size_t outputs_per_run(const dense_t *job) {
    const size_t row_bytes = job->inputs * sizeof(bf16), outputs = job->outputs / (2 * job->num_threads);
    const size_t run = job->from ? UNPACKED : RUN;
    const size_t most = outputs * row_bytes < run ? outputs : run / row_bytes, least = SHARE / job->inputs;
    return most > least ? most : least > 1 ? least : 1;
}

/* Of a piece that several tiles meet: few enough for the cache, and for every thread to take several pieces. */
static size_t outputs_per_piece(const dense_t *job) {
    const size_t kept = (job->from ? UNPACKED : KEPT) / (job->inputs * sizeof(bf16)), fair = job->outputs / (4 * job->num_threads);
    const size_t most = (kept < fair ? kept : fair) / WIDE * WIDE;
    return most > LEAST ? most : LEAST;
}

/* x [rows, inputs] times the transposed weight [outputs, inputs], plus bias [outputs] unless it is NULL, to rows of y that
 * begin `stride` elements after each other; with `is_wide` y holds floats, rounded to bfloat16 all the same.  scratch:
 * room for min(rows + 15, 256) rows, their inputs rounded up to 32, aligned to 64 bytes; rows are packed there once.  NULL:
 * every piece packs them anew, on its thread's stack, which is why inputs are at most 65536. */
static void dense(const bf16 *x, const bf16 *weight, const lossless_t *from, const bf16 *bias, void *y, bf16 *scratch,
                  size_t rows, size_t outputs, size_t inputs, size_t stride, size_t is_wide, unsigned num_threads) {
    const int has_amx = zinfer_has_amx();
    const size_t most = has_amx && !scratch ? ALONE : BLOCK, blocks = (rows + most - 1) / most;
    for (size_t block = 0; block < blocks; block++) {
        const size_t row = block * rows / blocks, count = (block + 1) * rows / blocks - row;
        dense_t job = {.x = x + row * inputs, .weight = weight, .from = from, .bias = bias, .packed = scratch, .stride = stride,
                       .rows = count, .tiles = (count + TALL - 1) / TALL, .outputs = outputs, .inputs = inputs,
                       .num_threads = num_threads};
        if (is_wide)
            job.wide = (float *)y + row * stride;
        else
            job.y = (bf16 *)y + row * stride;
        if (has_amx) {
            zinfer_dense_amx(&job);
            continue;
        }
        job.piece = job.tiles > 1 ? outputs_per_piece(&job) : outputs_per_run(&job);
        if (scratch && count > 1) share(pack_piece, &job, job.tiles, num_threads);
        share_outputs(count == 1 ? row_run : tiles_run, &job, 1);
    }
}

void zinfer_dense(const bf16 *x, const bf16 *weight, const bf16 *bias, void *y, bf16 *scratch, size_t rows,
                  size_t outputs, size_t inputs, size_t stride, size_t is_wide, unsigned num_threads) {
    dense(x, weight, NULL, bias, y, scratch, rows, outputs, inputs, stride, is_wide, num_threads);
}

/* The same with a weight that is packed without loss: the same bits.  inputs: a multiple of 64, at most 32768. */
void zinfer_lossless(const bf16 *x, const uint8_t *rest, const uint8_t *codes, const uint8_t *exponents, const bf16 *bias,
                     void *y, bf16 *scratch, size_t rows, size_t outputs, size_t inputs, size_t stride, size_t is_wide,
                     unsigned num_threads) {
    const lossless_t from = {rest, codes, exponents, inputs};
    dense(x, NULL, &from, bias, y, scratch, rows, outputs, inputs, stride, is_wide, num_threads);
}

#define ROWS 8 /* rows of a tile of a quantised product */

/* 16 octets of each of two inputs, pair by pair, in 16 bits each. */
static inline __m512i pairs(const uint8_t *first, const uint8_t *second) {
    const __m128i a = _mm_loadu_si128((const __m128i *)first), b = _mm_loadu_si128((const __m128i *)second);
    return _mm512_cvtepu8_epi16(_mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b)));
}

static inline __m512bh look_up(__m512i index, __m512i table) {
    return (__m512bh)_mm512_permutexvar_epi16(index, table);
}

/* Rows [row, row + M) times 32 outputs: 16 in the lower halves of the octets from `at` on, 16 in the upper ones. */
#define QUANT_TILE(NAME, M, IS_INT8)                                                                               \
    static void NAME##_##M(const quant_t *job, size_t row, size_t panel, size_t at) {                              \
        const size_t half = job->half, first = panel * 2 * half + at;                                              \
        const uint8_t *high = job->nibbles + panel * job->inputs * half + at;                                      \
        const uint8_t *low = IS_INT8 ? job->low + panel * job->inputs * half + at : NULL;                          \
        const __m512i table = twice(IS_INT8 ? STEPS_16 : STEPS), low_table = twice(STEPS);                         \
        __m512 totals[M][2];                                                                                       \
        UNROLL for (int m = 0; m < M; m++) totals[m][0] = totals[m][1] = _mm512_setzero_ps();                      \
        for (size_t group = 0; group < job->inputs / GROUP; group++) {                                             \
            const uint32_t *x = job->pairs + (row * job->inputs + group * GROUP * M) / 2;                              \
            __m512 sums[M][2];                                                                                     \
            UNROLL for (int m = 0; m < M; m++) sums[m][0] = sums[m][1] = _mm512_setzero_ps();                      \
            for (size_t i = group * GROUP; i < (group + 1) * GROUP; i += 2, x += M) {                              \
                const __m512i octets = pairs(high + i * half, high + (i + 1) * half);                              \
                const __m512bh one = look_up(octets, table), two = look_up(_mm512_srli_epi16(octets, 4), table);   \
                UNROLL for (int m = 0; m < M; m++) {                                                               \
                    const __m512bh value = (__m512bh)_mm512_set1_epi32((int)x[m]);                                 \
                    sums[m][0] = _mm512_dpbf16_ps(sums[m][0], one, value);                                         \
                    sums[m][1] = _mm512_dpbf16_ps(sums[m][1], two, value);                                         \
                }                                                                                                  \
                if (IS_INT8) {                                                                                     \
                    const __m512i rest = pairs(low + i * half, low + (i + 1) * half);                              \
                    const __m512bh three = look_up(rest, low_table);                                               \
                    const __m512bh four = look_up(_mm512_srli_epi16(rest, 4), low_table);                          \
                    UNROLL for (int m = 0; m < M; m++) {                                                           \
                        const __m512bh value = (__m512bh)_mm512_set1_epi32((int)x[m]);                             \
                        sums[m][0] = _mm512_dpbf16_ps(sums[m][0], three, value);                                   \
                        sums[m][1] = _mm512_dpbf16_ps(sums[m][1], four, value);                                    \
                    }                                                                                              \
                }                                                                                                  \
            }                                                                                                      \
            UNROLL for (int part = 0; part < 2; part++) {                                                          \
                const bf16 *scale = job->scales + 2 * (group * job->width + first + part * half);                  \
                const __m512i both = _mm512_loadu_si512(scale);                                                    \
                const __m512 scales = (__m512)_mm512_slli_epi32(both, 16);                                         \
                __m512 zeros = (__m512)_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000));                 \
                if (IS_INT8) zeros = _mm512_mul_ps(zeros, _mm512_set1_ps(17));                                     \
                UNROLL for (int m = 0; m < M; m++) {                                                               \
                    const float sum = job->sums[(row * job->inputs) / GROUP + group * M + m];                      \
                    totals[m][part] = _mm512_fmadd_ps(sums[m][part], scales, totals[m][part]);                     \
                    totals[m][part] = _mm512_fmadd_ps(zeros, _mm512_set1_ps(sum), totals[m][part]);                \
                }                                                                                                  \
            }                                                                                                      \
        }                                                                                                          \
        for (int m = 0; m < M; m++) {                                                                              \
            put_16(job, row + m, first, totals[m][0]);                                                             \
            put_16(job, row + m, first + half, totals[m][1]);                                                      \
        }                                                                                                          \
    }
#define QUANT_TILES(NAME, IS_INT8)                                                                                  \
    QUANT_TILE(NAME, 1, IS_INT8) QUANT_TILE(NAME, 2, IS_INT8) QUANT_TILE(NAME, 3, IS_INT8)                          \
    QUANT_TILE(NAME, 4, IS_INT8) QUANT_TILE(NAME, 5, IS_INT8) QUANT_TILE(NAME, 6, IS_INT8)                          \
    QUANT_TILE(NAME, 7, IS_INT8) QUANT_TILE(NAME, 8, IS_INT8)                                                       \
    static const quant_tile_t NAME##_TILES[ROWS] = {NAME##_1, NAME##_2, NAME##_3, NAME##_4,                         \
                                                    NAME##_5, NAME##_6, NAME##_7, NAME##_8};
typedef void (*quant_tile_t)(const quant_t *, size_t, size_t, size_t);
QUANT_TILES(int4, 0)
QUANT_TILES(int8, 1)

static void quant_piece(void *data, size_t panel) {
    const quant_t *job = data;
    const quant_tile_t *tiles = job->low ? int8_TILES : int4_TILES;
    for (size_t at = 0; at < job->half; at += 16)
        for (size_t row = 0; row < job->rows; row += ROWS)
            tiles[(job->rows - row < ROWS ? job->rows - row : ROWS) - 1](job, row, panel, at);
}

static void pack_pairs(const bf16 *x, uint32_t *packed, float *sums, size_t rows, size_t inputs) {
    for (size_t row = 0; row < rows; row++) {
        const size_t first = row / ROWS * ROWS, tall = rows - first < ROWS ? rows - first : ROWS;
        uint32_t *tile = packed + first * inputs / 2 + (row - first);
        float *sum = sums + first * inputs / GROUP + (row - first);
        for (size_t i = 0; i < inputs; i += 2) {
            memcpy(tile + i / 2 * tall, x + row * inputs + i, sizeof(uint32_t));
            if (i % GROUP == 0) sum[i / GROUP * tall] = 0;
            sum[i / GROUP * tall] += widen(x[row * inputs + i]) + widen(x[row * inputs + i + 1]);
        }
    }
}

/* Each group's inputs, row by row. */
static void add_up(const bf16 *x, float *sums, size_t rows, size_t inputs) {
    for (size_t i = 0; i < rows * inputs; i += GROUP) {
        float sum = 0;
        for (size_t k = 0; k < GROUP; k += 2) sum += widen(x[i + k]) + widen(x[i + k + 1]);
        sums[i / GROUP] = sum;
    }
}

/* x [rows, inputs] times a matrix in panels of 2 * half outputs; low is NULL for int4.  inputs: a multiple of 64,
 * half: of 16.  scratch: rows * inputs of 2 bytes and rows * inputs / 64 of 4, aligned to 64 bytes. */
void zinfer_quant(const bf16 *x, const uint8_t *nibbles, const uint8_t *low, const bf16 *scales, bf16 *y,
                  void *scratch, size_t rows, size_t outputs, size_t inputs, size_t half, size_t num_panels,
                  unsigned num_threads) {
    uint32_t *packed = scratch;
    float *sums = (float *)(packed + rows * inputs / 2);
    quant_t job = {x, packed, sums, nibbles, low, scales, y, rows, outputs, inputs, half, num_panels * 2 * half};
    if (zinfer_has_amx()) {
        add_up(x, sums, rows, inputs);
        zinfer_quant_amx(&job, num_panels * (half / 16), num_threads);
        return;
    }
    pack_pairs(x, packed, sums, rows, inputs);
    share(quant_piece, &job, num_panels, num_threads);
}
#endif
