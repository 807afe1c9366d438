/* Attention of one new row per sequence over bfloat16 pages in place.  Python side: zinfer.kernels.native.
 *
 * A softmax that is told block by block (Milakov and Gimelshein 2018, arXiv 1805.02867), in single precision.  A row's
 * bits depend on that row and its own keys alone.  Vectors are those of the compiler, for any processor. */
#include "kernels.h"
#include <math.h>

#define BLOCK 32       /* keys that are attended together */
#define LANES 16       /* of a vector */
#define MOST_GROUP 64  /* heads that share a key */
#define MOST_VECTORS 512 /* of all those heads' queries; zinfer.kernels.native.calls knows both */
#define MOST_DIM 256

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

typedef struct {
    const bf16 *q, *keys, *values; /* [rows, heads, dim]; [slots, kv_heads, dim] */
    const int32_t *table, *lengths; /* [rows, table_stride], [rows] */
    bf16 *y;
    float scale, cap;
    size_t window, table_stride, heads, kv_heads, dim, page;
} attend_t;

static inline floats widen_all(const bf16 *from) {
    halves narrow_ones;
    memcpy(&narrow_ones, from, sizeof narrow_ones);
    return (floats)(__builtin_convertvector(narrow_ones, words) << 16);
}

static inline float sum_of(floats vector) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += vector[lane];
    return sum;
}

static inline size_t slot_of(const attend_t *job, size_t row, size_t token) {
    return (size_t)job->table[row * job->table_stride + token / job->page] * job->page + token % job->page;
}

/* Scores of `count` keys from `start` on become weights; what was summed before shrinks with the new maximum. */
static inline float reweigh(float *scores, size_t count, float *top, float *weight) {
    float most = *top;
    for (size_t i = 0; i < count; i++) most = scores[i] > most ? scores[i] : most;
    const float factor = exponential(*top - most);
    float sum = 0;
    for (size_t i = 0; i < count; i++) {
        scores[i] = exponential(scores[i] - most);
        sum += scores[i];
    }
    *weight = *weight * factor + sum;
    *top = most;
    return factor;
}

/* All heads of one row that share key head `head`; `vectors` of LANES elements to a head. */
static inline void attend(const attend_t *job, size_t row, size_t head, const size_t vectors) {
    const size_t group = job->heads / job->kv_heads, dim = job->dim, stride = job->kv_heads * dim;
    const size_t length = (size_t)job->lengths[row];
    const size_t first = job->window && length > job->window ? length - job->window : 0;
    floats q[MOST_VECTORS], totals[MOST_VECTORS], values[BLOCK * MOST_DIM / LANES];
    float scores[MOST_GROUP][BLOCK], top[MOST_GROUP], weight[MOST_GROUP];
    const bf16 *mine = job->q + (row * job->heads + head * group) * dim;
    for (size_t i = 0; i < group * vectors; i++) {
        q[i] = widen_all(mine + i * LANES) * job->scale;
        totals[i] = (floats){0};
    }
    for (size_t g = 0; g < group; g++) top[g] = -INFINITY, weight[g] = 0;
    for (size_t start = first; start < length; start += BLOCK) {
        const size_t count = length - start < BLOCK ? length - start : BLOCK;
        for (size_t i = 0; i < count; i++) {
            const size_t at = slot_of(job, row, start + i) * stride + head * dim;
            floats key[MOST_DIM / LANES];
            for (size_t d = 0; d < vectors; d++) {
                key[d] = widen_all(job->keys + at + d * LANES);
                values[i * vectors + d] = widen_all(job->values + at + d * LANES);
            }
            for (size_t g = 0; g < group; g++) {
                floats sums = q[g * vectors] * key[0];
                for (size_t d = 1; d < vectors; d++) sums += q[g * vectors + d] * key[d];
                const float score = sum_of(sums);
                scores[g][i] = job->cap > 0 ? job->cap * tanhf(score / job->cap) : score;
            }
        }
        for (size_t g = 0; g < group; g++) {
            const float factor = reweigh(scores[g], count, &top[g], &weight[g]);
            for (size_t d = 0; d < vectors; d++) {
                floats total = totals[g * vectors + d] * factor;
                for (size_t i = 0; i < count; i++) total += scores[g][i] * values[i * vectors + d];
                totals[g * vectors + d] = total;
            }
        }
    }
    bf16 *y = job->y + (row * job->heads + head * group) * dim;
    for (size_t g = 0; g < group; g++)
        for (size_t d = 0; d < vectors; d++)
            for (int lane = 0; lane < LANES; lane++)
                y[(g * vectors + d) * LANES + lane] = narrow(totals[g * vectors + d][lane] / weight[g]);
}

static void attend_piece(void *data, size_t piece) {
    const attend_t *job = data;
    const size_t row = piece / job->kv_heads, head = piece % job->kv_heads;
    switch (job->dim / LANES) { /* the usual sizes, for which loops can be unrolled */
        case 4: attend(job, row, head, 4); break;
        case 8: attend(job, row, head, 8); break;
        default: attend(job, row, head, job->dim / LANES);
    }
}

/* dim: a multiple of 16, at most 256; at most 64 heads to a key head, of at most 8192 elements together. */
void zinfer_attend(const bf16 *q, const bf16 *keys, const bf16 *values, const int32_t *table,
                   const int32_t *lengths, bf16 *y, double scale, double cap, size_t window, size_t table_stride,
                   size_t rows, size_t heads, size_t kv_heads, size_t dim, size_t page, unsigned num_threads) {
    attend_t job = {q, keys, values, table, lengths, y, (float)scale, (float)cap, window,
                    table_stride, heads, kv_heads, dim, page};
    share(attend_piece, &job, rows * kv_heads, num_threads);
}
