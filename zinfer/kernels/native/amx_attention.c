/* Attention of new rows over bfloat16 pages on the matrix unit.  Python side: zinfer.kernels.native.calls.
 *
 * As in attention.c a softmax is told block by block, cut at fixed places of a sequence.  Sixteen queries are the columns
 * of every tile: keys are its rows as they lie in their pages, so scores come out key by key and a softmax over keys is
 * plain arithmetic on registers of queries; their powers, rounded to bfloat16, are what values are multiplied with, which
 * are turned once for all queries of a tile of rows.  A query's bits depend on it and on its own keys alone, as long as
 * the keys and values of its sequence are numbers. */
#include "attention.h"
#include "amx.h"
#include <math.h>

#ifdef HAS_AMX
#define KEYS 128      /* that are attended together */
#define QUERIES 256   /* most of a tile of rows; zinfer.kernels.native.calls knows it */
#define ELEMENTS 16384 /* most of all those queries; likewise */
#define MOST_DIM 256

/* Sixteen queries, and what they have met so far. */
typedef struct {
    __m512i low, high; /* the keys that each sees */
    __m512 top, weight;
    size_t least, most; /* of the low and the high ends: the keys that any of them sees */
    size_t all_from, all_to; /* those that all see */
    int is_new;
} group_t;

/* Of one tile of rows. */
typedef struct {
    const attend_t *job;
    tile_rows_t rows;
    size_t head, group, num_queries;
    group_t groups[QUERIES / EDGE];
    _Alignas(LINE) bf16 packed[ELEMENTS + EDGE * MOST_DIM];  /* queries, pair by pair: [dim / 2, 16, 2] of each group */
    _Alignas(LINE) float totals[ELEMENTS + EDGE * MOST_DIM]; /* [dim, 16] of each group */
    _Alignas(LINE) bf16 turned[KEYS * MOST_DIM];             /* a block's values: tiles of 16 of dim, 32 keys */
    _Alignas(LINE) bf16 copied[KEYS * MOST_DIM];             /* its keys, where pages are smaller than a tile */
    _Alignas(LINE) float scores[KEYS][EDGE];
    _Alignas(LINE) bf16 powers[KEYS / 2][LANES];
} work_t;

/* exponential() of each; a NaN stays one. */
static inline __m512 powers_of(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87), x);
    const __m512 nearest = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 rest = _mm512_fnmadd_ps(nearest, _mm512_set1_ps(0.693359375f), x);
    rest = _mm512_fmadd_ps(nearest, _mm512_set1_ps(2.12194440e-4f), rest);
    __m512 series = _mm512_fmadd_ps(rest, _mm512_set1_ps(1 / 720.0f), _mm512_set1_ps(1 / 120.0f));
    series = _mm512_fmadd_ps(series, rest, _mm512_set1_ps(1 / 24.0f));
    series = _mm512_fmadd_ps(series, rest, _mm512_set1_ps(1 / 6.0f));
    series = _mm512_fmadd_ps(series, rest, _mm512_set1_ps(1 / 2.0f));
    series = _mm512_fmadd_ps(series, rest, _mm512_set1_ps(1));
    series = _mm512_fmadd_ps(series, rest, _mm512_set1_ps(1));
    return _mm512_scalef_ps(series, nearest);
}

static inline const bf16 *query_at(const work_t *work, size_t query) {
    const attend_t *job = work->job;
    const size_t row = work->rows.start + query / work->group;
    return job->q + (row * job->heads + work->head * work->group + query % work->group) * job->dim;
}

/* What a group begins with; queries that fill it up see nothing. */
static void open_group(work_t *work, size_t at) {
    const attend_t *job = work->job;
    group_t *group = &work->groups[at];
    int32_t low[EDGE], high[EDGE];
    const size_t steps = job->dim / LANES;
    uint32_t *to = (uint32_t *)(work->packed + at * EDGE * job->dim);
    *group = (group_t){.least = SIZE_MAX, .all_to = SIZE_MAX, .is_new = 1};
    for (size_t i = 0; i < EDGE; i++) {
        const size_t query = at * EDGE + i;
        low[i] = high[i] = 0;
        if (query >= work->num_queries) continue;
        const size_t length = (size_t)job->lengths[work->rows.start + query / work->group];
        const size_t first = first_key(job, length);
        low[i] = (int32_t)first, high[i] = (int32_t)length;
        group->least = first < group->least ? first : group->least;
        group->most = length > group->most ? length : group->most;
        group->all_from = first > group->all_from ? first : group->all_from;
        group->all_to = length < group->all_to ? length : group->all_to;
    }
    group->low = _mm512_loadu_si512(low), group->high = _mm512_loadu_si512(high);
    group->top = _mm512_set1_ps(-INFINITY), group->weight = _mm512_setzero_ps();
    for (size_t step = 0; step < steps; step++, to += EDGE * EDGE) {
        __m512i pairs[EDGE];
        for (size_t i = 0; i < EDGE; i++) {
            const size_t query = at * EDGE + i;
            pairs[i] = query < work->num_queries ? _mm512_loadu_si512(query_at(work, query) + step * LANES)
                                                 : _mm512_setzero_si512();
        }
        turn(pairs);
        UNROLL for (int p = 0; p < EDGE; p++) _mm512_store_si512(to + p * EDGE, pairs[p]);
    }
}

/* Values of keys [start, stop), turned: tile by tile of 32 keys, and in it of 16 of dim.  Zeros behind the last key. */
static void turn_values(work_t *work, size_t start, size_t stop) {
    const attend_t *job = work->job;
    const size_t stride = job->kv_heads * job->dim;
    bf16 *to = work->turned;
    for (size_t key = start; key < stop; key += LANES) {
        const bf16 *rows[LANES];
        for (size_t i = 0; i < LANES; i++)
            rows[i] = key + i < stop
                          ? job->values + slot_of(job, work->rows.pages, key + i) * stride + work->head * job->dim
                          : NULL;
        for (size_t d = 0; d < job->dim; d += EDGE, to += EDGE * LANES) {
            __m512i pairs[EDGE];
            for (size_t p = 0; p < EDGE; p++) {
                const bf16 *one = rows[2 * p], *two = rows[2 * p + 1];
                const __m256i zero = _mm256_setzero_si256();
                const __m512i a = _mm512_cvtepu16_epi32(one ? _mm256_loadu_si256((const __m256i *)(one + d)) : zero);
                const __m512i b = _mm512_cvtepu16_epi32(two ? _mm256_loadu_si256((const __m256i *)(two + d)) : zero);
                pairs[p] = _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
            }
            turn(pairs);
            UNROLL for (int row = 0; row < EDGE; row++) _mm512_store_si512(to + row * LANES, pairs[row]);
        }
    }
    FENCE(work->turned);
}

/* Where sixteen keys from `key` on lie, and how far from one to the next: in their page, or copied together. */
typedef struct {
    const bf16 *at;
    size_t bytes;
} keys_t;

static void find_keys(work_t *work, keys_t *found, size_t start, size_t stop) {
    const attend_t *job = work->job;
    const size_t stride = job->kv_heads * job->dim;
    for (size_t key = start; key < stop; key += EDGE, found++) {
        const bf16 *all = job->keys + work->head * job->dim;
        if (key % job->page + EDGE <= job->page) {
            *found = (keys_t){all + slot_of(job, work->rows.pages, key) * stride, stride * sizeof(bf16)};
            continue;
        }
        bf16 *to = work->copied + (key - start) * job->dim;
        *found = (keys_t){to, job->dim * sizeof(bf16)};
        for (size_t i = 0; i < EDGE; i++, to += job->dim) {
            if (key + i < stop)
                memcpy(to, all + slot_of(job, work->rows.pages, key + i) * stride, job->dim * sizeof(bf16));
            else
                memset(to, 0, job->dim * sizeof(bf16));
        }
    }
    FENCE(work->copied);
}

/* scores = keys * queries, [keys, 16]: `count` tiles of keys. */
static void score(work_t *work, size_t at, const keys_t *keys, size_t count) {
    const size_t steps = work->job->dim / LANES;
    const bf16 *queries = work->packed + at * EDGE * work->job->dim;
    for (size_t i = 0; i < count; i += 4, keys += 4) {
        const size_t left = count - i;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (size_t step = 0; step < steps; step++) {
            _tile_loadd(4, queries + step * EDGE * LANES, LINE);
            _tile_loadd(5, keys[0].at + step * LANES, keys[0].bytes);
            _tile_dpbf16ps(0, 5, 4);
            if (left < 2) continue;
            _tile_loadd(5, keys[1].at + step * LANES, keys[1].bytes);
            _tile_dpbf16ps(1, 5, 4);
            if (left < 3) continue;
            _tile_loadd(5, keys[2].at + step * LANES, keys[2].bytes);
            _tile_dpbf16ps(2, 5, 4);
            if (left < 4) continue;
            _tile_loadd(5, keys[3].at + step * LANES, keys[3].bytes);
            _tile_dpbf16ps(3, 5, 4);
        }
        float(*to)[EDGE] = work->scores + i * EDGE;
        _tile_stored(0, to, LINE);
        if (left > 1) _tile_stored(1, to + EDGE, LINE);
        if (left > 2) _tile_stored(2, to + 2 * EDGE, LINE);
        if (left > 3) _tile_stored(3, to + 3 * EDGE, LINE);
    }
    FENCE(work->scores);
}

static inline __m512 capped(__m512 x, float cap) {
    float each[EDGE];
    _mm512_storeu_ps(each, x);
    for (int i = 0; i < EDGE; i++) each[i] = cap * tanhf(each[i] / cap);
    return _mm512_loadu_ps(each);
}

/* Scores of `count` keys from `start` on become powers, pair by pair; returns what earlier totals are worth now. */
static __m512 soften(work_t *work, group_t *group, size_t start, size_t count) {
    const attend_t *job = work->job;
    const __m512 scale = _mm512_set1_ps(job->scale), nothing = _mm512_set1_ps(-INFINITY);
    const int sees_all = group->all_from <= start && start + count <= group->all_to;
    __m512 most[4] = {group->top, nothing, nothing, nothing}, sums[4];
    for (size_t i = 0; i < count; i++) {
        __m512 x = _mm512_mul_ps(_mm512_load_ps(work->scores[i]), scale);
        if (job->cap > 0) x = capped(x, job->cap);
        if (!sees_all) {
            const __m512i key = _mm512_set1_epi32((int)(start + i));
            const __mmask16 seen = _mm512_cmple_epi32_mask(group->low, key) & _mm512_cmplt_epi32_mask(key, group->high);
            x = _mm512_mask_mov_ps(nothing, seen, x);
        }
        _mm512_store_ps(work->scores[i], x);
        most[i % 4] = _mm512_max_ps(most[i % 4], x);
    }
    const __m512 now = _mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3]));
    const __mmask16 is_blind = _mm512_cmp_ps_mask(now, nothing, _CMP_EQ_OQ);
    const __m512 from = _mm512_mask_mov_ps(now, is_blind, _mm512_setzero_ps());
    const __m512 factor = powers_of(_mm512_sub_ps(group->top, from));
    UNROLL for (int k = 0; k < 4; k++) sums[k] = _mm512_setzero_ps();
    __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                     20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (size_t i = 0; i < count; i += 4) {
        __m512 power[4];
        UNROLL for (int k = 0; k < 4; k++) {
            const __m512 x = _mm512_load_ps(work->scores[i + k]);
            power[k] = powers_of(_mm512_sub_ps(x, from));
            if (!sees_all) power[k] = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, nothing, _CMP_NEQ_UQ), power[k]);
            sums[k] = _mm512_add_ps(sums[k], power[k]);
        }
        UNROLL for (int k = 0; k < 4; k += 2) {
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(power[k + 1], power[k]);
            _mm512_store_si512(work->powers[(i + k) / 2], _mm512_permutexvar_epi16(order, both));
        }
    }
    if (count % LANES)
        for (size_t i = count / 2; i < (count + EDGE) / 2; i++)
            _mm512_store_si512(work->powers[i], _mm512_setzero_si512());
    FENCE(work->powers);
    const __m512 sum = _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
    group->weight = _mm512_fmadd_ps(group->weight, factor, sum);
    group->top = now;
    return factor;
}

#define OPEN_TOTALS(n)                                   \
    if (is_new)                                          \
        _tile_zero(n);                                   \
    else                                                 \
        _tile_loadd(n, totals + n * EDGE * EDGE, LINE);
#define ADD_VALUES(n)                                    \
    _tile_loadd(5, values + n * EDGE * LANES, LINE);     \
    _tile_dpbf16ps(n, 5, 4);

/* Four tiles of a group's totals, from `tile` on, meet its powers; and the last two where a head has them. */
static inline void meet_values(const work_t *work, float *totals, size_t tile, size_t steps, int is_new) {
    const bf16 *values = work->turned + tile * EDGE * LANES;
    OPEN_TOTALS(0) OPEN_TOTALS(1) OPEN_TOTALS(2) OPEN_TOTALS(3)
    for (size_t step = 0; step < steps; step++, values += work->job->dim * LANES) {
        _tile_loadd(4, work->powers[step * EDGE], LINE);
        ADD_VALUES(0) ADD_VALUES(1) ADD_VALUES(2) ADD_VALUES(3)
    }
    _tile_stored(0, totals, LINE);
    _tile_stored(1, totals + EDGE * EDGE, LINE);
    _tile_stored(2, totals + 2 * EDGE * EDGE, LINE);
    _tile_stored(3, totals + 3 * EDGE * EDGE, LINE);
}

static inline void meet_last_values(const work_t *work, float *totals, size_t tile, size_t steps, int is_new) {
    const bf16 *values = work->turned + tile * EDGE * LANES;
    OPEN_TOTALS(0) OPEN_TOTALS(1)
    for (size_t step = 0; step < steps; step++, values += work->job->dim * LANES) {
        _tile_loadd(4, work->powers[step * EDGE], LINE);
        ADD_VALUES(0) ADD_VALUES(1)
    }
    _tile_stored(0, totals, LINE);
    _tile_stored(1, totals + EDGE * EDGE, LINE);
}

/* totals = totals * factor + turned values * powers, [dim, 16]: `steps` tiles of 32 keys. */
static void add_values(work_t *work, size_t at, __m512 factor, size_t steps) {
    const size_t tiles = work->job->dim / EDGE;
    const int is_new = work->groups[at].is_new;
    const int is_same = _mm512_cmp_ps_mask(factor, _mm512_set1_ps(1), _CMP_EQ_OQ) == 0xffff;
    float *totals = work->totals + at * EDGE * work->job->dim;
    if (!is_new && !is_same)
        for (size_t d = 0; d < work->job->dim; d++)
            _mm512_store_ps(totals + d * EDGE, _mm512_mul_ps(_mm512_load_ps(totals + d * EDGE), factor));
    FENCE(totals);
    size_t tile = 0;
    for (; tile + 4 <= tiles; tile += 4) {
        meet_values(work, totals, tile, steps, is_new);
        totals += 4 * EDGE * EDGE;
    }
    if (tile < tiles) meet_last_values(work, totals, tile, steps, is_new);
    FENCE(work->totals);
    work->groups[at].is_new = 0;
}

static void close_group(const work_t *work, size_t at) {
    const attend_t *job = work->job;
    const float *totals = work->totals + at * EDGE * job->dim;
    for (size_t d = 0; d < job->dim; d += EDGE) {
        __m512i means[EDGE];
        UNROLL for (int i = 0; i < EDGE; i++)
            means[i] = (__m512i)_mm512_div_ps(_mm512_load_ps(totals + (d + i) * EDGE), work->groups[at].weight);
        turn(means);
        for (size_t i = 0; i < EDGE && at * EDGE + i < work->num_queries; i++) {
            bf16 *y = job->y + (query_at(work, at * EDGE + i) - job->q) + d;
            _mm256_storeu_si256((__m256i *)y, narrow_16((__m512)means[i]));
        }
    }
}

static void attend_rows(work_t *work) {
    const size_t groups = (work->num_queries + EDGE - 1) / EDGE;
    size_t begin = SIZE_MAX, end = 0;
    for (size_t at = 0; at < groups; at++) {
        open_group(work, at);
        begin = work->groups[at].least < begin ? work->groups[at].least : begin;
        end = work->groups[at].most > end ? work->groups[at].most : end;
    }
    use_rows(EDGE, 8);
    for (size_t start = begin / KEYS * KEYS; start < end; start += KEYS) {
        const size_t stop = start + KEYS < end ? start + KEYS : end, count = (stop - start + EDGE - 1) / EDGE;
        keys_t keys[KEYS / EDGE];
        find_keys(work, keys, start, stop);
        turn_values(work, start, stop);
        for (size_t at = 0; at < groups; at++) {
            group_t *group = &work->groups[at];
            if (group->most <= start || group->least >= stop) continue;
            score(work, at, keys, count);
            add_values(work, at, soften(work, group, start, count * EDGE), (count + 1) / 2);
        }
    }
    _tile_release();
    for (size_t at = 0; at < groups; at++) close_group(work, at);
}

int zinfer_attends_amx(const attend_t *job) { return job->dim % LANES == 0 && zinfer_has_amx(); }

void zinfer_attend_amx(const attend_t *job, size_t tile, size_t head) {
    work_t work;
    work.job = job, work.rows = rows_of_tile(job, tile), work.head = head, work.group = job->heads / job->kv_heads;
    const size_t end = work.rows.stop, room = QUERIES < ELEMENTS / job->dim ? QUERIES : ELEMENTS / job->dim;
    const size_t most = room > work.group ? room / work.group : 1; /* rows at a time, if a tile has more */
    for (; work.rows.start < end; work.rows.start = work.rows.stop) {
        work.rows.stop = work.rows.start + most < end ? work.rows.start + most : end;
        work.num_queries = (work.rows.stop - work.rows.start) * work.group;
        attend_rows(&work);
    }
}
#else
int zinfer_attends_amx(const attend_t *job) { return (void)job, 0; }
void zinfer_attend_amx(const attend_t *job, size_t tile, size_t head) { (void)job, (void)tile, (void)head; }
#endif
