/* Activations of bfloat16 rows, and gates.  Python side: zinfer.kernels.native.
 *
 * There are 65,536 numbers: a table of what becomes of each is faster than working it out, for any activation, and
 * what becomes of an element cannot depend on where it lies.  Near 0, where nearly all are, some 5 KiB of it are read. */
#include "kernels.h"

#define BLOCK 256 /* opened elements of a gate's row: they stay in the nearest cache */

/* Without a table: ReLU, which needs none.  A NaN stays one. */
static inline bf16 positive(bf16 x) { return x > 0x8000 && x <= 0xff80 ? 0 : x; }

static void activate(const bf16 *restrict x, const bf16 *restrict table, bf16 *restrict y, size_t count) {
    if (table)
        for (size_t i = 0; i < count; i++) y[i] = table[x[i]];
    else
        for (size_t i = 0; i < count; i++) y[i] = positive(x[i]);
}

typedef struct {
    const bf16 *x, *table;
    bf16 *y;
    size_t count;
} activate_t;

static void activate_piece(void *data, size_t piece) {
    const activate_t *job = data;
    const size_t from = piece * SHARE;
    activate(job->x + from, job->table, job->y + from, end_of(piece, SHARE, job->count) - from);
}

/* y = table[x], of `count` elements. */
void zinfer_activate(const bf16 *x, const bf16 *table, bf16 *y, size_t count, unsigned num_threads) {
    activate_t job = {x, table, y, count};
    share(activate_piece, &job, (count + SHARE - 1) / SHARE, num_threads);
}

typedef struct {
    const bf16 *gate, *up, *table;
    bf16 *y;
    size_t gate_stride, up_stride, rows, width, step;
} gate_t;

static void gate_row(const bf16 *gate, const bf16 *restrict up, const bf16 *table, bf16 *restrict y, size_t width) {
    bf16 opened[BLOCK];
    for (size_t from = 0; from < width; from += BLOCK) {
        const size_t count = width - from < BLOCK ? width - from : BLOCK;
        activate(gate + from, table, opened, count);
        for (size_t i = 0; i < count; i++) y[from + i] = narrow(widen(opened[i]) * widen(up[from + i]));
    }
}

static void gate_piece(void *data, size_t piece) {
    const gate_t *job = data;
    for (size_t row = piece * job->step; row < end_of(piece, job->step, job->rows); row++)
        gate_row(job->gate + row * job->gate_stride, job->up + row * job->up_stride, job->table,
                 job->y + row * job->width, job->width);
}

/* y = table[gate] * up. */
void zinfer_gate(const bf16 *gate, const bf16 *up, const bf16 *table, bf16 *y, size_t gate_stride, size_t up_stride,
                 size_t rows, size_t width, unsigned num_threads) {
    gate_t job = {gate, up, table, y, gate_stride, up_stride, rows, width, rows_per_piece(width)};
    share(gate_piece, &job, (rows + job.step - 1) / job.step, num_threads);
}
