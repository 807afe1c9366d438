/* What all kernels share: bfloat16, the vector exponential, and work handed to torch's own threads. */
#ifndef ZINFER_COMMON_H
#define ZINFER_COMMON_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

static inline float widen(bf16 value) {
    uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

/* To nearest, ties to even, as torch rounds; a NaN stays one. */
static inline bf16 narrow(float wide) {
    uint32_t bits;
    memcpy(&bits, &wide, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bf16)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

/* e to the x: 2 to a whole number by its bits, times Taylor's series on [-log(2) / 2, log(2) / 2]. */
static inline float exponential(float x) {
    const float least = x < -87.0f ? -87.0f : x, clipped = least > 88.0f ? 88.0f : least;
    const float nearest = 12582912.0f; /* added and taken away it rounds to whole numbers */
    const float whole = (clipped * 1.44269504f + nearest) - nearest;
    const float rest = clipped - whole * 0.693359375f + whole * 2.12194440e-4f;
    float series = 1 / 720.0f;
    series = series * rest + 1 / 120.0f;
    series = series * rest + 1 / 24.0f;
    series = series * rest + 1 / 6.0f;
    series = series * rest + 1 / 2.0f;
    series = (series * rest + 1) * rest + 1;
    const uint32_t bits = (uint32_t)((int32_t)whole + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return series * power;
}

#define SHARE 32768 /* elements that are worth a thread */

static inline size_t end_of(size_t piece, size_t step, size_t count) {
    size_t stop = (piece + 1) * step;
    return stop < count ? stop : count;
}

static inline size_t rows_per_piece(size_t width) { return width >= SHARE ? 1 : SHARE / width; }

/* The runtime that torch loaded: a second pool of threads would fight with it for the cores. */
extern void GOMP_parallel(void (*work)(void *), void *data, unsigned num_threads, unsigned flags);

extern int omp_get_thread_num(void);

/* Pieces of a job.  Threads take them in turn, so that one that waits for its core holds nobody up. */
typedef struct {
    void (*run)(void *job, size_t piece);
    void *job;
    size_t num_pieces;
    atomic_size_t next;
} pieces_t;

static inline void take_pieces(void *data) {
    pieces_t *pieces = data;
    for (;;) {
        size_t piece = atomic_fetch_add_explicit(&pieces->next, 1, memory_order_relaxed);
        if (piece >= pieces->num_pieces) return;
        pieces->run(pieces->job, piece);
    }
}

static inline void share(void (*run)(void *, size_t), void *job, size_t num_pieces, unsigned num_threads) {
    pieces_t pieces = {run, job, num_pieces, 0};
    if (num_threads > 1 && num_pieces > 1)
        GOMP_parallel(take_pieces, &pieces, num_threads, 0);
    else
        take_pieces(&pieces);
}

#define MOST_RUNS 64

/* A job over things that lie one after the other in memory.  A thread begins with a run of its own and takes its pieces
 * in their order: what it reads is one stream, which the processor sees coming.  Once through it helps with others'. */
typedef struct {
    void (*run)(void *job, size_t start, size_t stop);
    void *job;
    size_t count, step, num_runs;
    struct {
        _Alignas(64) atomic_size_t next; /* a line each: threads that take turns at one wait for each other */
    } turns[MOST_RUNS];
} runs_t;

static inline void take_runs(void *data) {
    runs_t *runs = data;
    const size_t mine = (size_t)omp_get_thread_num();
    for (size_t i = 0; i < runs->num_runs; i++) {
        const size_t at = (mine + i) % runs->num_runs, stop = runs->count * (at + 1) / runs->num_runs;
        for (;;) {
            const size_t start = atomic_fetch_add_explicit(&runs->turns[at].next, runs->step, memory_order_relaxed);
            if (start >= stop) break;
            runs->run(runs->job, start, stop - start < runs->step ? stop : start + runs->step);
        }
    }
}

/* `run` over [0, count), `step` things at a time. */
static inline void share_runs(void (*run)(void *, size_t, size_t), void *job, size_t count, size_t step,
                              unsigned num_threads) {
    if (num_threads < 2 || count <= step) {
        for (size_t at = 0; at < count; at += step) run(job, at, count - at < step ? count : at + step);
        return;
    }
    runs_t runs = {.run = run, .job = job, .count = count, .step = step};
    runs.num_runs = num_threads < MOST_RUNS ? num_threads : MOST_RUNS;
    for (size_t at = 0; at < runs.num_runs; at++) atomic_init(&runs.turns[at].next, count * at / runs.num_runs);
    GOMP_parallel(take_runs, &runs, num_threads, 0);
}

#endif
