/* What attention shares, whichever unit of the processor multiplies.  Python side: zinfer.kernels.native.calls. */
#ifndef ZINFER_ATTENTION_H
#define ZINFER_ATTENTION_H

#include "kernels.h"

/* Tile t is rows [tiles[t], tiles[t + 1]) of one sequence, whose keys lie where line lines[t] of the table says; NULL: row
 * t, and line t. */
typedef struct {
    const bf16 *q, *keys, *values; /* [rows, heads, dim]; [slots, kv_heads, dim] */
    const int32_t *table, *lengths, *tiles, *lines; /* [lines, table_stride], [rows], [tiles + 1], [tiles] */
    bf16 *y;
    float scale, cap;
    size_t window, table_stride, heads, kv_heads, dim, page;
} attend_t;

/* Rows [start, stop) of a tile, and the pages of its sequence. */
typedef struct {
    size_t start, stop;
    const int32_t *pages;
} tile_rows_t;

static inline tile_rows_t rows_of_tile(const attend_t *job, size_t tile) {
    tile_rows_t rows = {tile, tile + 1, job->table + (job->lines ? (size_t)job->lines[tile] : tile) * job->table_stride};
    if (job->tiles) rows.start = (size_t)job->tiles[tile], rows.stop = (size_t)job->tiles[tile + 1];
    return rows;
}

static inline size_t slot_of(const attend_t *job, const int32_t *pages, size_t token) {
    return (size_t)pages[token / job->page] * job->page + token % job->page;
}

/* The keys that a row sees: [first_key, its length). */
static inline size_t first_key(const attend_t *job, size_t length) {
    return job->window && length > job->window ? length - job->window : 0;
}

/* amx_attention.c: whether the matrix unit attends heads of that size; heads that share key head `head`, of one tile. */
int zinfer_attends_amx(const attend_t *job);
void zinfer_attend_amx(const attend_t *job, size_t tile, size_t head);

#endif
