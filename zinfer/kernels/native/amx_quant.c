/* Products with quantised weights on the matrix unit ("AMX").  Python side: zinfer.kernels.native.calls.
 *
 * Sixteen outputs' octets of two inputs, looked up, are a row of the unit's second operand as they are; rows of x are its
 * first one as they lie in memory.  A group's sums are multiplied with its scales outside, in the order of the groups, so
 * a row's bits depend on the row alone. */
#include "amx.h"

#ifdef __AVX512BF16__
#ifdef HAS_AMX

#define MOST_ROWS 128 /* that one look-up of a group serves */
#define STEPS_PER_GROUP (GROUP / LANES)
#define UNITS 2 /* of 32 outputs at a time: what the unit holds sums of */
#define AHEAD 4 /* groups that are asked for: scales lie far apart, and a lone stream's look-ahead is short */
#define KINDS (2 * UNITS) /* of 16 outputs: those in the lower halves of a unit's octets and those in the upper ones */

typedef bf16 tile_t[EDGE * LANES];
typedef float sums_t[EDGE * EDGE];

/* Octets of two inputs, 16 outputs each, pair by pair in the lower halves of 16 bits. */
static inline __m512i octets_of(const uint8_t *from, size_t half) {
    const __m128i first = _mm_loadu_si128((const __m128i *)from);
    const __m256i both = half == EDGE ? _mm256_loadu_si256((const __m256i *)from)
                                      : _mm256_set_m128i(_mm_loadu_si128((const __m128i *)(from + half)), first);
    const __m512i places = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                            5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi8(places, _mm512_castsi256_si512(both));
}

/* A group of a unit in one format's steps: tiles of the lower and of the upper halves, 32 inputs each. */
static inline void look_up(const uint8_t *from, size_t half, __m512i steps, tile_t *lower, tile_t *upper) {
    for (size_t k = 0; k < STEPS_PER_GROUP; k++)
        UNROLL for (size_t p = 0; p < EDGE; p++, from += 2 * half) {
            _mm_prefetch((const char *)(from + AHEAD * GROUP * half), _MM_HINT_T0);
            const __m512i octets = octets_of(from, half);
            _mm512_store_si512(lower[k] + p * LANES, _mm512_permutexvar_epi16(octets, steps));
            _mm512_store_si512(upper[k] + p * LANES, _mm512_permutexvar_epi16(_mm512_srli_epi16(octets, 4), steps));
        }
}

static inline size_t output_of(const quant_t *job, size_t unit, size_t kind) {
    const size_t per_panel = job->half / EDGE;
    return unit / per_panel * 2 * job->half + unit % per_panel * EDGE + kind * job->half;
}

/* Sums of a group, of `tall` rows from `row` on, times its scales, and its zeros, to the totals. */
static inline void add_group(const quant_t *job, size_t row, size_t tall, size_t group, size_t output,
                             const float *sums, float *totals) {
    const __m512i both = _mm512_loadu_si512(job->scales + 2 * (group * job->width + output));
    const __m512 scales = (__m512)_mm512_slli_epi32(both, 16);
    __m512 zeros = (__m512)_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000));
    if (job->low) zeros = _mm512_mul_ps(zeros, _mm512_set1_ps(17));
    const float *inputs = job->sums + row * (job->inputs / GROUP) + group;
    for (size_t m = 0; m < tall; m++, inputs += job->inputs / GROUP) {
        __m512 total = _mm512_load_ps(totals + m * EDGE);
        total = _mm512_fmadd_ps(_mm512_load_ps(sums + m * EDGE), scales, total);
        _mm512_store_ps(totals + m * EDGE, _mm512_fmadd_ps(zeros, _mm512_set1_ps(*inputs), total));
    }
}

#define MULTIPLY(tiles)                     \
    do {                                    \
        _tile_loadd(5, (tiles)[0][k], LINE); \
        _tile_dpbf16ps(0, 4, 5);            \
        _tile_loadd(6, (tiles)[1][k], LINE); \
        _tile_dpbf16ps(1, 4, 6);            \
        _tile_loadd(7, (tiles)[2][k], LINE); \
        _tile_dpbf16ps(2, 4, 7);            \
        _tile_loadd(5, (tiles)[3][k], LINE); \
        _tile_dpbf16ps(3, 4, 5);            \
    } while (0)

/* One group of two units, `tall` rows from `row` on. */
static inline void meet(const quant_t *job, size_t row, size_t group, tile_t (*high)[STEPS_PER_GROUP],
                        tile_t (*low)[STEPS_PER_GROUP], sums_t *sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (size_t k = 0; k < STEPS_PER_GROUP; k++) {
        _tile_loadd(4, job->x + row * job->inputs + group * GROUP + k * LANES, job->inputs * sizeof(bf16));
        MULTIPLY(high);
        if (job->low) MULTIPLY(low);
    }
    _tile_stored(0, sums[0], LINE);
    _tile_stored(1, sums[1], LINE);
    _tile_stored(2, sums[2], LINE);
    _tile_stored(3, sums[3], LINE);
    FENCE(sums);
}

/* What rows [row, stop) times two units of outputs need meanwhile; tiles of rows are of one height, the last one begins
 * early. */
typedef struct {
    const quant_t *job;
    const size_t *units;
    size_t row, stop, count, tall;
    _Alignas(LINE) tile_t high[2][KINDS][STEPS_PER_GROUP], low[2][KINDS][STEPS_PER_GROUP]; /* of two groups in turn */
    _Alignas(LINE) sums_t sums[2][KINDS], totals[MOST_ROWS / EDGE][KINDS];
} rows_t;

static inline size_t first_row(const rows_t *rows, size_t tile) {
    return tile + 1 == rows->count ? rows->stop - rows->tall : rows->row + tile * rows->tall;
}

static inline void look_up_group(rows_t *rows, size_t group) {
    const quant_t *job = rows->job;
    const size_t per_panel = job->half / EDGE;
    const __m512i steps = twice(job->low ? STEPS_16 : STEPS), low_steps = twice(STEPS);
    tile_t(*high)[STEPS_PER_GROUP] = rows->high[group % 2], (*low)[STEPS_PER_GROUP] = rows->low[group % 2];
    FENCE(rows);
    for (size_t u = 0; u < UNITS; u++) {
        const size_t panel = rows->units[u] / per_panel, within = rows->units[u] % per_panel * EDGE;
        const size_t at = (panel * job->inputs + group * GROUP) * job->half + within;
        for (size_t kind = 0; kind < 2; kind++) {
            const size_t output = output_of(job, rows->units[u], kind);
            _mm_prefetch((const char *)(job->scales + 2 * ((group + AHEAD) * job->width + output)), _MM_HINT_T0);
        }
        look_up(job->nibbles + at, job->half, steps, high[2 * u], high[2 * u + 1]);
        if (job->low) look_up(job->low + at, job->half, low_steps, low[2 * u], low[2 * u + 1]);
    }
    FENCE(rows);
}

static inline void add_tile(rows_t *rows, size_t group, size_t tile, size_t which) {
    for (size_t kind = 0; kind < KINDS; kind++)
        add_group(rows->job, first_row(rows, tile), rows->tall, group,
                  output_of(rows->job, rows->units[kind / 2], kind % 2), rows->sums[which][kind],
                  rows->totals[tile][kind]);
}

/* The unit is given a tile, and while it works the vector unit looks the next group up and adds up the tile before. */
static void rows_run(rows_t *rows, size_t num_units) {
    const quant_t *job = rows->job;
    const size_t groups = job->inputs / GROUP, count = rows->count;
    memset(rows->totals, 0, count * sizeof rows->totals[0]);
    look_up_group(rows, 0);
    for (size_t at = 0; at < groups * count; at++) {
        const size_t group = at / count, tile = at % count;
        meet(job, first_row(rows, tile), group, rows->high[group % 2], rows->low[group % 2], rows->sums[at % 2]);
        if (tile == 0 && group + 1 < groups) look_up_group(rows, group + 1);
        if (at > 0) add_tile(rows, (at - 1) / count, (at - 1) % count, (at - 1) % 2);
    }
    add_tile(rows, groups - 1, count - 1, (groups * count - 1) % 2);
    for (size_t tile = 0; tile < count; tile++)
        for (size_t kind = 0; kind < 2 * num_units; kind++)
            for (size_t m = 0; m < rows->tall; m++)
                put_16(job, first_row(rows, tile) + m, output_of(job, rows->units[kind / 2], kind % 2),
                       _mm512_load_ps(rows->totals[tile][kind] + m * EDGE));
}

typedef struct {
    const quant_t *job;
    size_t units, blocks;
} quant_run_t;

/* 0 to 3: sums, [rows, outputs].  4: rows.  5 to 7: weights. */
#define TILES_OF_ROWS 5

/* Pairs of units [start, stop). */
static void quant_run(void *data, size_t start, size_t stop) {
    const quant_run_t *run = data;
    const quant_t *job = run->job;
    for (size_t pair = start; pair < stop; pair++) {
        const size_t is_two = UNITS * pair + 1 < run->units, units[UNITS] = {UNITS * pair, UNITS * pair + is_two};
        for (size_t block = 0; block < run->blocks; block++) {
            const size_t row = block * job->rows / run->blocks, end = (block + 1) * job->rows / run->blocks;
            const size_t count = (end - row + EDGE - 1) / EDGE;
            rows_t rows; /* most of it is written before it is read, and clearing it takes as long as a row */
            rows.job = job, rows.units = units, rows.row = row, rows.stop = end;
            rows.count = count, rows.tall = (end - row + count - 1) / count;
            use_rows(rows.tall, TILES_OF_ROWS);
            rows_run(&rows, 1 + is_two);
        }
    }
    _tile_release();
}

void zinfer_quant_amx(quant_t *job, size_t units, unsigned num_threads) {
    quant_run_t run = {job, units, (job->rows + MOST_ROWS - 1) / MOST_ROWS};
    const size_t pairs = (units + UNITS - 1) / UNITS, fair = pairs / (4 * (size_t)num_threads);
    const size_t most = fair < 4 ? fair : 4, least = SHARE / (UNITS * 32 * job->inputs) + 1;
    share_runs(quant_run, &run, pairs, most > least ? most : least, num_threads);
}
#else
void zinfer_quant_amx(quant_t *job, size_t units, unsigned num_threads) { (void)job, (void)units, (void)num_threads; }
#endif
#endif
