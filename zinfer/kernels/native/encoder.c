/* The layers of an encoder over whole texts.  Python side: zinfer.kernels.native.encoder.
 *
 * Norms behind residuals, every row sees its whole text (BERT, arXiv 1810.04805).  A piece is one model and a few
 * neighbouring texts from the first layer to the last, so what is alive of it stays in a core's own cache; whoever is
 * free takes the next piece, and nobody waits for a thread that has lost its core before it took one.  fp32
 * throughout.  Vectors are GCC's own: whatever the processor has is used. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define WIDE 32   /* outputs of a panel of a matrix */
#define TALL 12   /* rows that share a load of it */
#define QUERIES 4 /* rows of a text that attend together */

typedef float vec __attribute__((vector_size(64)));
typedef float loose __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(64)));

/* Matrices as panels [outputs / 32][inputs][32], zeros behind the last output; biases as long as their panels.  Heads are
 * `width` wide, a multiple of 16, zeros behind what a model has; all of them together may be narrower than its rows. */
typedef struct {
    const float *q, *q_bias, *kv, *kv_bias, *o, *o_bias, *norm, *norm_bias;
    const float *up, *up_bias, *down, *down_bias, *last_norm, *last_norm_bias;
} layer_t;

typedef struct {
    const layer_t *layers; /* [models][num_layers] */
    const float *x;        /* [rows][dim] */
    float *y;              /* [models][texts or rows][dim] */
    const int64_t *bounds, *pieces; /* of texts in rows; of pieces in texts */
    size_t num_models, num_layers, num_pieces, dim, mlp, heads, width, most_rows, most_text;
    int32_t activation, first_only; /* only each text's first row is wanted of the last layer */
    float eps, scale;
} task_t;

typedef struct job {
    const task_t *task;
    struct job *next;
    atomic_size_t piece;
    size_t inside; /* helpers */
    int failed;
} job_t;

static inline vec load(const float *from) { return *(const loose *)from; }
static inline void put(float *to, vec value) { *(loose *)to = value; }
static inline vec all(float value) { return value - (vec){0}; }
static inline size_t up_to(size_t count, size_t step) { return (count + step - 1) / step * step; }
static inline vec pick(ivec is_first, vec a, vec b) { return (vec)((is_first & (ivec)a) | (~is_first & (ivec)b)); }

static inline float sum_of(vec value) {
    float sum = 0;
    for (int at = 0; at < LANES; at++) sum += value[at];
    return sum;
}

static inline float largest_of(vec value) {
    float most = value[0];
    for (int at = 1; at < LANES; at++) most = value[at] > most ? value[at] : most;
    return most;
}

/* e^x to an ulp or two between -87 and 88: Cephes' polynomial on [-ln 2 / 2, ln 2 / 2]. */
static inline vec exponential(vec x) {
    x = pick(x > 88.0f, all(88.0f), x);
    x = pick(x < -87.0f, all(-87.0f), x);
    vec n = x * 1.44269504f + 12582912.0f;
    n = n - 12582912.0f; /* to the nearest whole number */
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    return p * (vec)power;
}

/* x times the normal distribution up to x; its tail by Abramowitz and Stegun 7.1.26, to 1.5e-7. */
static inline vec gelu(vec x) {
    vec size = pick(x < 0.0f, -x, x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * size);
    vec p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    vec tail = 0.5f * p * t * exponential(-size * size);
    return x * pick(x > 0.0f, 1.0f - tail, tail);
}

static inline vec activated(vec x, int32_t kind) {
    switch (kind) {
    case 0: return gelu(x);
    case 1: return x / (1.0f + exponential(-1.59576912f * (x + 0.044715f * x * x * x))); /* gelu by tanh */
    case 2: return x / (1.0f + exponential(-x));                                         /* silu */
    default: return pick(x > 0.0f, x, all(0));                                            /* relu */
    }
}

#define TILE(ROWS)                                                                                                \
    static void tile_##ROWS(const float *x, size_t step, size_t inputs, const float *panel, const float *bias,    \
                            float *y, size_t y_step) {                                                            \
        vec sums[ROWS][2];                                                                                        \
        for (int r = 0; r < ROWS; r++) sums[r][0] = load(bias), sums[r][1] = load(bias + LANES);                  \
        for (size_t i = 0; i < inputs; i++, panel += WIDE) {                                                      \
            vec low = load(panel), high = load(panel + LANES);                                                    \
            _Pragma("GCC unroll 16") for (int r = 0; r < ROWS; r++) {                                             \
                vec value = all(x[r * step + i]);                                                                 \
                sums[r][0] += value * low, sums[r][1] += value * high;                                            \
            }                                                                                                     \
        }                                                                                                         \
        for (int r = 0; r < ROWS; r++) put(y + r * y_step, sums[r][0]), put(y + r * y_step + LANES, sums[r][1]);  \
    }
TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
typedef void (*tile_t)(const float *, size_t, size_t, const float *, const float *, float *, size_t);
static const tile_t TILES[TALL] = {tile_1, tile_2, tile_3, tile_4,  tile_5,  tile_6,
                                   tile_7, tile_8, tile_9, tile_10, tile_11, tile_12};

/* y [rows][outputs up to a whole panel] = x [rows][inputs] W^T + bias; steps are those from row to row. */
static void product(const float *x, size_t step, size_t rows, size_t inputs, const float *panels, const float *bias,
                    float *y, size_t y_step, size_t outputs) {
    for (size_t output = 0; output < outputs; output += WIDE)
        for (size_t row = 0; row < rows; row += TALL) {
            size_t tall = rows - row < TALL ? rows - row : TALL;
            TILES[tall - 1](x + row * step, step, inputs, panels + output * inputs, bias + output,
                            y + row * y_step + output, y_step);
        }
}

/* x = norm(x + more), a row at a time. */
static void add_norm(float *x, const float *more, size_t more_step, size_t rows, size_t dim, const float *weight,
                     const float *bias, float eps) {
    for (size_t row = 0; row < rows; row++, x += dim, more += more_step) {
        vec sum = {0}, squares = {0};
        for (size_t i = 0; i < dim; i += LANES) {
            vec value = load(x + i) + load(more + i);
            put(x + i, value);
            sum += value;
        }
        float mean = sum_of(sum) / dim;
        for (size_t i = 0; i < dim; i += LANES) {
            vec gap = load(x + i) - mean;
            squares += gap * gap;
        }
        float scale = 1.0f / __builtin_sqrtf(sum_of(squares) / dim + eps);
        for (size_t i = 0; i < dim; i += LANES)
            put(x + i, (load(x + i) - mean) * scale * load(weight + i) + load(bias + i));
    }
}

/* One head of one text: out [queries][width] of q [queries], k and v [rows]; `keys` [width][rows up], `scores`. */
static void attend(const float *q, size_t q_step, size_t queries, const float *k, const float *v, size_t kv_step,
                   size_t rows, size_t width, float scale, float *keys, float *scores, float *out, size_t out_step) {
    size_t wide = up_to(rows, LANES);
    for (size_t i = 0; i < width; i++) {
        for (size_t row = 0; row < rows; row++) keys[i * wide + row] = k[row * kv_step + i] * scale;
        for (size_t row = rows; row < wide; row++) keys[i * wide + row] = 0;
    }
    ivec places = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (size_t query = 0; query < queries; query += QUERIES) {
        const float *from[QUERIES]; /* the last row again where there is no other */
        for (size_t r = 0; r < QUERIES; r++)
            from[r] = q + (query + r < queries ? query + r : queries - 1) * q_step;
        vec most[QUERIES], total[QUERIES];
        for (int r = 0; r < QUERIES; r++) most[r] = all(-1e30f), total[r] = all(0);
        for (size_t row = 0; row < wide; row += LANES) {
            vec sums[QUERIES] = {{0}};
            for (size_t i = 0; i < width; i++) {
                vec key = load(keys + i * wide + row);
                for (int r = 0; r < QUERIES; r++) sums[r] += from[r][i] * key;
            }
            for (int r = 0; r < QUERIES; r++) {
                vec score = pick(places + (int32_t)row < (int32_t)rows, sums[r], all(-1e30f));
                most[r] = pick(score > most[r], score, most[r]);
                put(scores + r * wide + row, score);
            }
        }
        for (int r = 0; r < QUERIES; r++) {
            float highest = largest_of(most[r]);
            for (size_t row = 0; row < wide; row += LANES) {
                vec share = exponential(load(scores + r * wide + row) - highest);
                share = pick(places + (int32_t)row < (int32_t)rows, share, all(0));
                total[r] += share;
                put(scores + r * wide + row, share);
            }
        }
        for (size_t i = 0; i < width; i += LANES) {
            vec sums[QUERIES] = {{0}};
            for (size_t row = 0; row < rows; row++) {
                vec value = load(v + row * kv_step + i);
                for (int r = 0; r < QUERIES; r++) sums[r] += scores[r * wide + row] * value;
            }
            for (size_t r = 0; r < QUERIES && query + r < queries; r++)
                put(out + (query + r) * out_step + i, sums[r] / sum_of(total[r]));
        }
    }
}

/* Floats that a thread needs. */
static size_t scratch(const task_t *task) {
    const size_t inner = task->heads * task->width, wide = up_to(inner > task->dim ? inner : task->dim, WIDE);
    const size_t row = task->dim + wide + up_to(2 * inner, WIDE) + wide + up_to(task->mlp, WIDE);
    return task->most_rows * row + up_to(task->most_text, LANES) * (task->width + QUERIES) + 64;
}

/* Texts `begin` to `end` through all layers of a model. */
static void run_piece(const task_t *task, size_t model, size_t begin, size_t end, float *space) {
    const size_t dim = task->dim, width = task->width, inner = task->heads * width, mlp = up_to(task->mlp, WIDE);
    const size_t wide = up_to(inner > dim ? inner : dim, WIDE), kv_wide = up_to(2 * inner, WIDE);
    const size_t first = task->bounds[begin], rows = task->bounds[end] - first;
    float *x = space, *q = x + task->most_rows * dim, *kv = q + task->most_rows * wide;
    float *mixed = kv + task->most_rows * kv_wide, *hidden = mixed + task->most_rows * wide;
    float *keys = hidden + task->most_rows * mlp, *scores = keys + up_to(task->most_text, LANES) * width;
    size_t live = rows;
    memcpy(x, task->x + first * dim, rows * dim * sizeof(float));
    for (size_t at = 0; at < task->num_layers; at++) {
        const layer_t *layer = task->layers + model * task->num_layers + at;
        int is_last = task->first_only && at + 1 == task->num_layers;
        product(x, dim, rows, dim, layer->kv, layer->kv_bias, kv, kv_wide, 2 * inner);
        if (is_last) { /* of each text one row goes on */
            live = end - begin;
            for (size_t text = begin; text < end; text++)
                memmove(x + (text - begin) * dim, x + (task->bounds[text] - first) * dim, dim * sizeof(float));
        }
        product(x, dim, live, dim, layer->q, layer->q_bias, q, wide, inner);
        for (size_t text = begin; text < end; text++) {
            size_t start = task->bounds[text] - first, own = task->bounds[text + 1] - task->bounds[text];
            size_t query = is_last ? text - begin : start;
            for (size_t head = 0; head < task->heads; head++)
                attend(q + query * wide + head * width, wide, is_last ? 1 : own, kv + start * kv_wide + head * width,
                       kv + start * kv_wide + inner + head * width, kv_wide, own, width, task->scale, keys, scores,
                       mixed + query * wide + head * width, wide);
        }
        product(mixed, wide, live, inner, layer->o, layer->o_bias, q, wide, dim);
        add_norm(x, q, wide, live, dim, layer->norm, layer->norm_bias, task->eps);
        product(x, dim, live, dim, layer->up, layer->up_bias, hidden, mlp, task->mlp);
        for (size_t i = 0; i < live * mlp; i += LANES) put(hidden + i, activated(load(hidden + i), task->activation));
        product(hidden, mlp, live, task->mlp, layer->down, layer->down_bias, q, wide, dim);
        add_norm(x, q, wide, live, dim, layer->last_norm, layer->last_norm_bias, task->eps);
    }
    size_t num_texts = task->pieces[task->num_pieces], total = task->bounds[num_texts];
    size_t place = task->first_only ? model * num_texts + begin : model * total + first;
    memcpy(task->y + place * dim, x, live * dim * sizeof(float));
}

/* Pieces of a job until none is left.  False where there is no memory: then nothing was taken. */
static int take_pieces(job_t *job) {
    const task_t *task = job->task;
    float *space = aligned_alloc(64, up_to(scratch(task) * sizeof(float), 64));
    if (!space) return 0;
    for (;;) {
        size_t piece = atomic_fetch_add(&job->piece, 1);
        if (piece >= task->num_models * task->num_pieces) break;
        size_t at = piece % task->num_pieces;
        run_piece(task, piece / task->num_pieces, task->pieces[at], task->pieces[at + 1], space);
    }
    free(space);
    return 1;
}

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work = PTHREAD_COND_INITIALIZER, ended = PTHREAD_COND_INITIALIZER;
static job_t *jobs;
static size_t num_helpers;

static void forget(job_t *job) {
    for (job_t **at = &jobs; *at; at = &(*at)->next)
        if (*at == job) {
            *at = job->next;
            return;
        }
}

static void *help(void *nothing) {
    (void)nothing;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!jobs) pthread_cond_wait(&work, &lock);
        job_t *job = jobs;
        job->inside++;
        pthread_mutex_unlock(&lock);
        take_pieces(job);
        pthread_mutex_lock(&lock);
        forget(job); /* none of its pieces is left, or there is no memory to help with */
        if (!--job->inside) pthread_cond_broadcast(&ended);
    }
    return NULL;
}

/* A child of fork has none of its parent's threads. */
static void begin_anew(void) {
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&work, NULL);
    pthread_cond_init(&ended, NULL);
    jobs = NULL;
    num_helpers = 0;
}

static void watch_forks(void) { pthread_atfork(NULL, NULL, begin_anew); }

/* Run all pieces on this thread and up to `lanes - 1` others.  0; -1 where there is no memory. */
int zinfer_encoder_layers(const task_t *task, size_t lanes) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    job_t job = {.task = task};
    atomic_init(&job.piece, 0);
    if (lanes > 1 && task->num_models * task->num_pieces > 1) {
        pthread_once(&once, watch_forks);
        pthread_mutex_lock(&lock);
        for (pthread_t thread; num_helpers + 1 < lanes; num_helpers++) {
            if (pthread_create(&thread, NULL, help, NULL)) break;
            pthread_detach(thread);
        }
        job.next = jobs;
        jobs = &job;
        for (size_t at = 1; at < lanes; at++) pthread_cond_signal(&work);
        pthread_mutex_unlock(&lock);
    }
    job.failed = !take_pieces(&job);
    pthread_mutex_lock(&lock);
    forget(&job);
    while (job.inside) pthread_cond_wait(&ended, &lock);
    pthread_mutex_unlock(&lock);
    /* Without memory here the helpers may have done it all. */
    return job.failed && atomic_load(&job.piece) < task->num_models * task->num_pieces ? -1 : 0;
}
