/* Attention of new rows over bfloat16 pages in place.  Python side: zinfer.kernels.native.
 *
 * A softmax that is told block by block (Milakov and Gimelshein 2018, arXiv 1805.02867), in single precision.  Blocks
 * are cut at fixed places of a sequence and every sum has one order, so a row's bits depend on that row and its own keys
 * alone: on neither the rows that share its tile nor the threads.  Vectors are those of the compiler, for any processor. */
#include "attention.h"
#include <math.h>

#define BLOCK 32       /* keys that are attended together, a multiple of LANES */
#define LANES 16       /* of a vector */
#define MOST_QUERIES 64 /* heads that share a key times rows of a tile */
#define MOST_VECTORS 512 /* of all those queries; zinfer.kernels.native.calls knows both */
#define MOST_DIM 256
#define UNROLL _Pragma("GCC unroll 16")

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t whole __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (whole){__VA_ARGS__})
#endif
/* Of two registers: halves of either, then quarters of both, and so on. */
#define HALVES_0(a, b) PICK(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
#define HALVES_1(a, b) PICK(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
#define QUARTERS_0(a, b) PICK(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
#define QUARTERS_1(a, b) PICK(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
#define PAIRS_0(a, b) PICK(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29)
#define PAIRS_1(a, b) PICK(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31)
#define SINGLES_0(a, b) PICK(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#define SINGLES_1(a, b) PICK(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)

/* The sums of sixteen registers: halves are added, quarters, pairs, neighbours. */
static inline floats sums_of(floats *x) {
    UNROLL for (int i = 0; i < 8; i++) x[i] = HALVES_0(x[2 * i], x[2 * i + 1]) + HALVES_1(x[2 * i], x[2 * i + 1]);
    UNROLL for (int i = 0; i < 4; i++) x[i] = QUARTERS_0(x[2 * i], x[2 * i + 1]) + QUARTERS_1(x[2 * i], x[2 * i + 1]);
    UNROLL for (int i = 0; i < 2; i++) x[i] = PAIRS_0(x[2 * i], x[2 * i + 1]) + PAIRS_1(x[2 * i], x[2 * i + 1]);
    return SINGLES_0(x[0], x[1]) + SINGLES_1(x[0], x[1]);
}

static inline floats pick(whole is_first, floats a, floats b) {
    return (floats)((is_first & (whole)a) | (~is_first & (whole)b));
}

static inline floats larger(floats a, floats b) { return pick(a > b, a, b); }

static inline float sum_of(floats x) {
    x += HALVES_1(x, x);
    x += QUARTERS_1(x, x);
    x += PAIRS_1(x, x);
    return x[0] + x[1];
}

static inline float largest_of(floats x) {
    x = larger(x, HALVES_1(x, x));
    x = larger(x, QUARTERS_1(x, x));
    x = larger(x, PAIRS_1(x, x));
    return x[0] > x[1] ? x[0] : x[1];
}

/* exponential() of each. */
static inline floats powers_of(floats x) {
    x = pick(x < -87.0f, (floats){0} - 87.0f, x);
    const floats nearest = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    const floats rest = x - nearest * 0.693359375f + nearest * 2.12194440e-4f;
    floats series = rest * (1 / 720.0f) + 1 / 120.0f;
    series = series * rest + 1 / 24.0f;
    series = series * rest + 1 / 6.0f;
    series = series * rest + 1 / 2.0f;
    series = (series * rest + 1) * rest + 1;
    return series * (floats)((__builtin_convertvector(nearest, whole) + 127) << 23);
}

static inline floats widen_all(const bf16 *from) {
    halves narrow_ones;
    memcpy(&narrow_ones, from, sizeof narrow_ones);
    return (floats)(__builtin_convertvector(narrow_ones, words) << 16);
}

/* One query meets keys [low, high) of a block; `vectors` of LANES elements to a head. */
static inline void meet(const attend_t *job, const floats *q, const floats *keys, const floats *values, int low,
                        int high, float *top, float *weight, floats *totals, const size_t vectors) {
    floats scores[BLOCK / LANES], most = (floats){0} - INFINITY;
    whole lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    UNROLL for (int part = 0; part < BLOCK / LANES; part++) {
        if (part * LANES >= high || (part + 1) * LANES <= low) {
            scores[part] = (floats){0} - INFINITY;
            continue;
        }
        floats sums[LANES];
        for (int i = 0; i < LANES; i++) {
            const floats *key = keys + (part * LANES + i) * vectors;
            sums[i] = q[0] * key[0];
            for (size_t d = 1; d < vectors; d++) sums[i] += q[d] * key[d];
        }
        floats found = sums_of(sums);
        if (job->cap > 0)
            for (int i = 0; i < LANES; i++) found[i] = job->cap * tanhf(found[i] / job->cap);
        const whole key = lane + part * LANES;
        scores[part] = pick((key >= low) & (key < high), found, (floats){0} - INFINITY);
        most = larger(most, scores[part]);
    }
    const float largest = largest_of(most), now = largest > *top ? largest : *top;
    const float factor = exponential(*top - now);
    floats sum = {0};
    float powers[BLOCK];
    UNROLL for (int part = 0; part < BLOCK / LANES; part++) {
        const whole key = lane + part * LANES;
        const floats power = pick((key >= low) & (key < high), powers_of(scores[part] - now), (floats){0});
        memcpy(powers + part * LANES, &power, sizeof power);
        sum += power;
    }
    *weight = *weight * factor + sum_of(sum);
    *top = now;
    floats mine[MOST_DIM / LANES];
    for (size_t d = 0; d < vectors; d++) mine[d] = totals[d] * factor;
    for (int i = low; i < high; i++)
        for (size_t d = 0; d < vectors; d++) mine[d] += powers[i] * values[i * vectors + d];
    for (size_t d = 0; d < vectors; d++) totals[d] = mine[d];
}

/* All heads of rows [row, stop) of a sequence that share key head `head`. */
static inline void attend(const attend_t *job, size_t row, size_t stop, const int32_t *pages, size_t head,
                          const size_t vectors) {
    const size_t group = job->heads / job->kv_heads, dim = vectors * LANES, stride = job->kv_heads * dim;
    floats q[MOST_VECTORS], totals[MOST_VECTORS];
    floats keys[BLOCK * MOST_DIM / LANES], values[BLOCK * MOST_DIM / LANES];
    float top[MOST_QUERIES], weight[MOST_QUERIES];
    size_t first[MOST_QUERIES], begin = SIZE_MAX, end = 0;
    for (size_t r = row; r < stop; r++) {
        const size_t length = (size_t)job->lengths[r];
        first[r - row] = first_key(job, length);
        begin = first[r - row] < begin ? first[r - row] : begin;
        end = length > end ? length : end;
        for (size_t g = 0; g < group; g++) {
            const size_t query = (r - row) * group + g;
            const bf16 *mine = job->q + (r * job->heads + head * group + g) * dim;
            top[query] = -INFINITY, weight[query] = 0;
            for (size_t d = 0; d < vectors; d++) {
                q[query * vectors + d] = widen_all(mine + d * LANES) * job->scale;
                totals[query * vectors + d] = (floats){0};
            }
        }
    }
    for (size_t start = begin / BLOCK * BLOCK; start < end; start += BLOCK) {
        for (size_t i = start < begin ? begin - start : 0; i < BLOCK && start + i < end; i++) {
            const size_t at = slot_of(job, pages, start + i) * stride + head * dim;
            for (size_t d = 0; d < vectors; d++) {
                keys[i * vectors + d] = widen_all(job->keys + at + d * LANES);
                values[i * vectors + d] = widen_all(job->values + at + d * LANES);
            }
        }
        for (size_t r = row; r < stop; r++) {
            const size_t length = (size_t)job->lengths[r], since = first[r - row];
            const int low = since > start ? (int)(since - start < BLOCK ? since - start : BLOCK) : 0;
            const int high = length > start ? (int)(length - start < BLOCK ? length - start : BLOCK) : 0;
            if (low >= high) continue;
            for (size_t query = (r - row) * group; query < (r - row + 1) * group; query++)
                meet(job, q + query * vectors, keys, values, low, high, &top[query], &weight[query],
                     totals + query * vectors, vectors);
        }
    }
    for (size_t query = 0; query < (stop - row) * group; query++) {
        bf16 *y = job->y + ((row + query / group) * job->heads + head * group + query % group) * dim;
        for (size_t d = 0; d < vectors; d++) {
            const floats mean = totals[query * vectors + d] / weight[query];
            for (int lane = 0; lane < LANES; lane++) y[d * LANES + lane] = narrow(mean[lane]);
        }
    }
}

static void attend_piece(void *data, size_t piece) {
    const attend_t *job = data;
    const size_t tile = piece / job->kv_heads, head = piece % job->kv_heads, vectors = job->dim / LANES;
    const size_t group = job->heads / job->kv_heads;
    if (zinfer_attends_amx(job)) {
        zinfer_attend_amx(job, tile, head);
        return;
    }
    const tile_rows_t all = rows_of_tile(job, tile);
    const size_t room = MOST_QUERIES < MOST_VECTORS / vectors ? MOST_QUERIES : MOST_VECTORS / vectors;
    const size_t most = room / group; /* rows at a time, if a tile has more */
    for (size_t row = all.start; row < all.stop; row += most) {
        const size_t stop = row + most < all.stop ? row + most : all.stop;
        switch (vectors) { /* the usual sizes, for which loops can be unrolled */
            case 4: attend(job, row, stop, all.pages, head, 4); break;
            case 8: attend(job, row, stop, all.pages, head, 8); break;
            default: attend(job, row, stop, all.pages, head, vectors);
        }
    }
}

/* dim: a multiple of 16, at most 256; at most 64 queries to a key head, of at most 8192 elements together. */
void zinfer_attend_tiles(const bf16 *q, const bf16 *keys, const bf16 *values, const int32_t *table,
                         const int32_t *lengths, const int32_t *tiles, const int32_t *lines, bf16 *y,
                         double scale, double cap, size_t window, size_t table_stride, size_t num_tiles,
                         size_t heads, size_t kv_heads, size_t dim, size_t page, unsigned num_threads) {
    attend_t job = {q, keys, values, table, lengths, tiles, lines, y, (float)scale, (float)cap, window,
                    table_stride, heads, kv_heads, dim, page};
    share(attend_piece, &job, num_tiles * kv_heads, num_threads);
}

/* The same of one row per sequence. */
void zinfer_attend(const bf16 *q, const bf16 *keys, const bf16 *values, const int32_t *table,
                   const int32_t *lengths, bf16 *y, double scale, double cap, size_t window, size_t table_stride,
                   size_t rows, size_t heads, size_t kv_heads, size_t dim, size_t page, unsigned num_threads) {
    zinfer_attend_tiles(q, keys, values, table, lengths, NULL, NULL, y, scale, cap, window, table_stride, rows, heads,
                        kv_heads, dim, page, num_threads);
}
