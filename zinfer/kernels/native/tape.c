/* A tape of calls, carried out one after the other, and what a pass does between kernels.  Python side:
 * zinfer.kernels.native.tape.
 *
 * A pass of one row is some five hundred calls of microseconds; from Python each costs as much again. */
#include "kernels.h"

/* The order of zinfer.kernels.native.signatures.STEPS. */
enum { NORM, LAYER_NORM, ROTATE, ATTEND, ACTIVATE, GATE, ADD, WIDEN, MOVE, DENSE, COLUMNS, QUANT, LOSSLESS };

typedef struct {
    uint64_t kind, words[15]; /* arguments but the number of threads: addresses, sizes, doubles by their bits */
} step_t;

typedef struct {
    const bf16 *x, *z;
    void *y;
    size_t count;
} map_t;

static void add_piece(void *data, size_t piece) {
    const map_t *job = data;
    const bf16 *restrict x = job->x, *restrict z = job->z;
    bf16 *restrict y = job->y;
    for (size_t i = piece * SHARE; i < end_of(piece, SHARE, job->count); i++) y[i] = narrow(widen(x[i]) + widen(z[i]));
}

typedef struct {
    const bf16 *x;
    float *y;
    size_t width, stride;
} widen_t;

static void widen_piece(void *data, size_t row) {
    const widen_t *job = data;
    const bf16 *restrict x = job->x + row * job->width;
    float *restrict y = job->y + row * job->stride;
    for (size_t i = 0; i < job->width; i++) y[i] = widen(x[i]);
}

/* y = x + z */
static void add(const bf16 *x, const bf16 *z, bf16 *y, size_t count, unsigned num_threads) {
    map_t job = {x, z, y, count};
    share(add_piece, &job, (count + SHARE - 1) / SHARE, num_threads);
}

/* The same numbers in single precision, in rows that begin `stride` apart. */
static void widen_rows(const bf16 *x, float *y, size_t rows, size_t width, size_t stride, unsigned num_threads) {
    widen_t job = {x, y, width, stride};
    share(widen_piece, &job, rows, num_threads);
}

/* `nbytes` of each of `rows` rows, from row from_rows[i] to row to_rows[i]; NULL: from and to row i. */
static void move(const char *from, char *to, const int64_t *from_rows, const int64_t *to_rows, size_t rows,
                 size_t nbytes, size_t from_stride, size_t to_stride) {
    for (size_t i = 0; i < rows; i++)
        memcpy(to + (to_rows ? (size_t)to_rows[i] : i) * to_stride,
               from + (from_rows ? (size_t)from_rows[i] : i) * from_stride, nbytes);
}

static double number(uint64_t word) {
    double value;
    memcpy(&value, &word, sizeof value);
    return value;
}

#define AT(i) ((void *)(uintptr_t)w[i])

void zinfer_play(const void *tape, size_t count, unsigned threads) {
    const step_t *steps = tape;
    for (size_t i = 0; i < count; i++) {
        const uint64_t *w = steps[i].words;
        switch (steps[i].kind) {
            case NORM: zinfer_norm(AT(0), AT(1), AT(2), number(w[3]), w[4], w[5], threads); break;
            case LAYER_NORM: zinfer_layer_norm(AT(0), AT(1), AT(2), AT(3), number(w[4]), w[5], w[6], threads); break;
            case ROTATE:
                zinfer_rotate(AT(0), AT(1), AT(2), AT(3), w[4], w[5], w[6], w[7], w[8], w[9], threads);
                break;
            case ATTEND:
                zinfer_attend(AT(0), AT(1), AT(2), AT(3), AT(4), AT(5), number(w[6]), number(w[7]), w[8], w[9],
                              w[10], w[11], w[12], w[13], w[14], threads);
                break;
            case ACTIVATE: zinfer_activate(AT(0), AT(1), AT(2), w[3], threads); break;
            case GATE: zinfer_gate(AT(0), AT(1), AT(2), AT(3), w[4], w[5], w[6], w[7], threads); break;
            case ADD: add(AT(0), AT(1), AT(2), w[3], threads); break;
            case WIDEN: widen_rows(AT(0), AT(1), w[2], w[3], w[4], threads); break;
            case MOVE: move(AT(0), AT(1), AT(2), AT(3), w[4], w[5], w[6], w[7]); break;
#ifdef __AVX512BF16__
            case DENSE:
                zinfer_dense(AT(0), AT(1), AT(2), AT(3), AT(4), w[5], w[6], w[7], w[8], w[9], threads);
                break;
            case COLUMNS: zinfer_columns(AT(0), AT(1), AT(2), AT(3), w[4], w[5], w[6], threads); break;
            case QUANT:
                zinfer_quant(AT(0), AT(1), AT(2), AT(3), AT(4), AT(5), w[6], w[7], w[8], w[9], w[10], threads);
                break;
            case LOSSLESS:
                zinfer_lossless(AT(0), AT(1), AT(2), AT(3), AT(4), AT(5), AT(6), w[7], w[8], w[9], w[10], w[11],
                                threads);
                break;
#endif
        }
    }
}
