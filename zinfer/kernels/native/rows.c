/* What a pass does to its bfloat16 rows between products.  Python side: zinfer.kernels.native.
 *
 * Each rounds where its twin in zinfer.layers rounds; a row's bits depend on that row alone.  Plain loops, which a
 * compiler turns into whatever vectors the processor has. */
#include "kernels.h"
#include <math.h>

#define WIDE 16     /* sums side by side: what a reduction needs to become vectors in a fixed order */

typedef struct {
    const bf16 *x, *weight, *bias;
    bf16 *y;
    float eps;
    size_t rows, width, step;
} norm_t;

static void norm_row(const norm_t *job, const bf16 *restrict x, bf16 *restrict y) {
    const bf16 *restrict weight = job->weight;
    size_t width = job->width, whole = width / WIDE * WIDE;
    float sums[WIDE] = {0}, sum = 0;
    for (size_t i = 0; i < whole; i += WIDE)
        for (size_t lane = 0; lane < WIDE; lane++) sums[lane] += widen(x[i + lane]) * widen(x[i + lane]);
    for (size_t i = whole; i < width; i++) sum += widen(x[i]) * widen(x[i]);
    for (size_t lane = 0; lane < WIDE; lane++) sum += sums[lane];
    float inverse = 1 / sqrtf(sum / (float)width + job->eps);
    for (size_t i = 0; i < width; i++) y[i] = narrow(widen(narrow(widen(x[i]) * inverse)) * widen(weight[i]));
}

static void norm_piece(void *data, size_t piece) {
    const norm_t *job = data;
    for (size_t row = piece * job->step; row < end_of(piece, job->step, job->rows); row++)
        norm_row(job, job->x + row * job->width, job->y + row * job->width);
}

void zinfer_norm(const bf16 *x, const bf16 *weight, bf16 *y, double eps, size_t rows, size_t width,
                 unsigned num_threads) {
    norm_t job = {x, weight, NULL, y, (float)eps, rows, width, rows_per_piece(width)};
    share(norm_piece, &job, (rows + job.step - 1) / job.step, num_threads);
}

static void layer_norm_row(const norm_t *job, const bf16 *restrict x, bf16 *restrict y) {
    const bf16 *restrict weight = job->weight, *restrict bias = job->bias;
    const size_t width = job->width, whole = width / WIDE * WIDE;
    float sums[WIDE] = {0}, squares[WIDE] = {0}, mean = 0, variance = 0;
    for (size_t i = 0; i < whole; i += WIDE)
        for (size_t lane = 0; lane < WIDE; lane++) sums[lane] += widen(x[i + lane]);
    for (size_t i = whole; i < width; i++) mean += widen(x[i]);
    for (size_t lane = 0; lane < WIDE; lane++) mean += sums[lane];
    mean /= (float)width;
    for (size_t i = 0; i < whole; i += WIDE)
        for (size_t lane = 0; lane < WIDE; lane++) {
            const float gap = widen(x[i + lane]) - mean;
            squares[lane] += gap * gap;
        }
    for (size_t i = whole; i < width; i++) variance += (widen(x[i]) - mean) * (widen(x[i]) - mean);
    for (size_t lane = 0; lane < WIDE; lane++) variance += squares[lane];
    const float inverse = 1 / sqrtf(variance / (float)width + job->eps);
    for (size_t i = 0; i < width; i++) {
        const float scale = weight ? widen(weight[i]) : 1, shift = bias ? widen(bias[i]) : 0;
        y[i] = narrow((widen(x[i]) - mean) * inverse * scale + shift);
    }
}

static void layer_norm_piece(void *data, size_t piece) {
    const norm_t *job = data;
    for (size_t row = piece * job->step; row < end_of(piece, job->step, job->rows); row++)
        layer_norm_row(job, job->x + row * job->width, job->y + row * job->width);
}

/* weight and bias: NULL where a norm has none. */
void zinfer_layer_norm(const bf16 *x, const bf16 *weight, const bf16 *bias, bf16 *y, double eps, size_t rows,
                       size_t width, unsigned num_threads) {
    norm_t job = {x, weight, bias, y, (float)eps, rows, width, rows_per_piece(width)};
    share(layer_norm_piece, &job, (rows + job.step - 1) / job.step, num_threads);
}

typedef struct {
    const bf16 *x, *cosines, *sines;
    bf16 *y;
    size_t row_stride, head_stride, rows, heads, dim, half, step;
} rotate_t;

static void rotate_head(const rotate_t *job, const bf16 *restrict x, const bf16 *restrict cosines,
                        const bf16 *restrict sines, bf16 *restrict y) {
    size_t half = job->half;
    for (size_t i = 0; i < half; i++) {
        float left = widen(x[i]), right = widen(x[i + half]), along = widen(cosines[i]), across = widen(sines[i]);
        y[i] = narrow(widen(narrow(left * along)) - widen(narrow(right * across)));
        y[i + half] = narrow(widen(narrow(right * along)) + widen(narrow(left * across)));
    }
    memcpy(y + 2 * half, x + 2 * half, (job->dim - 2 * half) * sizeof(bf16));
}

static void rotate_piece(void *data, size_t piece) {
    const rotate_t *job = data;
    for (size_t row = piece * job->step; row < end_of(piece, job->step, job->rows); row++)
        for (size_t head = 0; head < job->heads; head++)
            rotate_head(job, job->x + row * job->row_stride + head * job->head_stride,
                        job->cosines + row * job->half, job->sines + row * job->half,
                        job->y + (row * job->heads + head) * job->dim);
}

void zinfer_rotate(const bf16 *x, const bf16 *cosines, const bf16 *sines, bf16 *y, size_t row_stride,
                   size_t head_stride, size_t rows, size_t heads, size_t dim, size_t half, unsigned num_threads) {
    rotate_t job = {x, cosines, sines, y, row_stride, head_stride, rows, heads, dim, half, rows_per_piece(heads * dim)};
    share(rotate_piece, &job, (rows + job.step - 1) / job.step, num_threads);
}

#define STRETCH 1024 /* numbers of a row whose largest is known before the next ones are looked at */
#define ABREAST 64   /* of them at once */

typedef struct {
    const float *x;
    int64_t *ids;
    float *tops;
    size_t width;
} largest_t;

/* The largest of x[start, stop), or a NaN where there is one. */
static float largest_of(const float *restrict x, size_t start, size_t stop) {
    float most[ABREAST], top = -INFINITY;
    int32_t odd[ABREAST] = {0}, is_odd = 0;
    for (size_t lane = 0; lane < ABREAST; lane++) most[lane] = -INFINITY;
    size_t i = start;
    for (; i + ABREAST <= stop; i += ABREAST)
        for (size_t lane = 0; lane < ABREAST; lane++) {
            const float value = x[i + lane];
            most[lane] = value > most[lane] ? value : most[lane];
            odd[lane] |= value != value;
        }
    for (size_t lane = 0; lane < ABREAST; lane++) {
        top = most[lane] > top ? most[lane] : top;
        is_odd |= odd[lane];
    }
    for (; i < stop; i++) {
        top = x[i] > top ? x[i] : top;
        is_odd |= x[i] != x[i];
    }
    return is_odd ? NAN : top;
}

static void largest_piece(void *data, size_t row) {
    const largest_t *job = data;
    const float *x = job->x + row * job->width;
    float top = largest_of(x, 0, end_of(0, STRETCH, job->width));
    size_t at = 0;
    for (size_t start = STRETCH; start < job->width && top == top; start += STRETCH) {
        const float found = largest_of(x, start, end_of(start / STRETCH, STRETCH, job->width));
        if (!(found <= top)) top = found, at = start;
    }
    while (x[at] != top && (x[at] == x[at] || top == top)) at++;
    job->ids[row] = (int64_t)at;
    job->tops[row] = top;
}

/* Of every row the largest number and where it is, of equals the first; a row that holds a NaN: the first NaN. */
void zinfer_largest(const float *x, int64_t *ids, float *tops, size_t rows, size_t width, unsigned num_threads) {
    largest_t job = {x, ids, tops, width};
    share(largest_piece, &job, rows, rows * width < SHARE ? 1 : num_threads);
}
