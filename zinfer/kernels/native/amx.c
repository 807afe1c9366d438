/* Dense products on the matrix unit ("AMX") of newer server processors.  Python side: zinfer.kernels.native.calls.
 *
 * A weight's 16 outputs times 32 inputs are one tile as they lie in memory; rows of x are the other operand, which the
 * unit wants pair by pair, so they are what is packed.  Every element of y is one sum over the inputs, 32 at a time in
 * their order, whatever the number of rows and threads: other bits than the vector unit's, the same on one machine. */
#define _GNU_SOURCE /* syscall */
#include "amx.h"

#ifdef __AVX512BF16__

static int is_allowed = 1; /* written by zinfer_allow_amx alone, while nothing is multiplied */

#ifdef HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>

#define DEEP 2048 /* inputs that several tiles of rows meet at a time: packed rows stay in the second cache */
#define PIECE 4   /* pairs of tiles of outputs that they meet in turn */
#define RUN (512 * 1024) /* bytes of weights that a thread takes at a time for a tile of rows by itself */
#define ASK 0x1023   /* arch_prctl: ARCH_REQ_XCOMP_PERM */
#define TILE_DATA 18 /* the feature that must be asked for */

int zinfer_has_amx(void) {
    static _Atomic int answer = -1;
    if (answer < 0) answer = syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
    return answer && is_allowed;
}

/* 0 to 3: sums, [outputs, rows].  4 and 5: weights.  6 and 7: rows. */
static void shape_tiles(size_t tall) {
    shapes_t shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shapes.rows[i] = EDGE;
        shapes.bytes[i] = i == 4 || i == 5 ? LINE : (uint16_t)(tall * sizeof(float));
    }
    use_shapes(&shapes);
}

/* Tiles are of one height: the last one begins early, and a row that two have is computed twice. */
static inline size_t height(const dense_t *job) { return (job->rows + job->tiles - 1) / job->tiles; }
static inline size_t first_row(const dense_t *job, size_t tile) {
    const size_t tall = height(job), row = tile * tall;
    return row + tall > job->rows ? job->rows - tall : row;
}
static inline size_t tile_size(const dense_t *job) { return height(job) * padded(job->inputs); }

/* A tile's rows as the unit wants them: of 32 inputs 16 pairs, each of all rows; zeros beyond the last input. */
static void pack(const dense_t *job, uint32_t *to, size_t tile) {
    const size_t tall = height(job), row = first_row(job, tile);
    const __mmask16 all = (__mmask16)((1u << tall) - 1);
    for (size_t i = 0; i < job->inputs; i += LANES, to += EDGE * tall) {
        const size_t left = job->inputs - i;
        const __mmask32 mask = left < LANES ? (__mmask32)((1u << left) - 1) : 0xffffffff;
        __m512i pairs[EDGE];
        UNROLL for (size_t m = 0; m < EDGE; m++)
            pairs[m] = m < tall ? _mm512_maskz_loadu_epi16(mask, job->x + (row + m) * job->inputs + i)
                                : _mm512_setzero_si512();
        turn(pairs);
        UNROLL for (size_t p = 0; p < EDGE; p++) _mm512_mask_storeu_epi32(to + p * tall, all, pairs[p]);
    }
}

static void pack_piece(void *data, size_t tile) {
    const dense_t *job = data;
    pack(job, (uint32_t *)(job->packed + tile * tile_size(job)), tile);
}

static inline void put_row(const dense_t *job, size_t row, size_t output, __mmask16 mask, __m512 sums) {
    if (job->bias) {
        const __m512i bias = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, job->bias + output));
        sums = _mm512_add_ps(sums, (__m512)_mm512_slli_epi32(bias, 16));
    }
    const __m256i rounded = narrow_16(sums);
    const size_t at = row * job->stride + output;
    if (job->wide)
        _mm512_mask_storeu_epi32(job->wide + at, mask, _mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
    else
        _mm256_mask_storeu_epi16(job->y + at, mask, rounded);
}

/* The sums [outputs, rows] of one tile to the rows of y. */
static inline void put_tile(const dense_t *job, size_t row, size_t output, const float *sums) {
    const size_t tall = height(job), left = job->outputs - output;
    const __mmask16 mask = left < EDGE ? (__mmask16)((1u << left) - 1) : 0xffff;
    FENCE(sums);
    if (tall == 1) {
        put_row(job, row, output, mask, _mm512_load_ps(sums));
        return;
    }
    __m512i turned[EDGE];
    UNROLL for (int o = 0; o < EDGE; o++) turned[o] = _mm512_load_si512(sums + o * EDGE);
    turn(turned);
    UNROLL for (size_t m = 0; m < EDGE; m++)
        if (m < tall) put_row(job, row + m, output, mask, (__m512)turned[m]);
}

/* A tile of weights: where it lies, or, at the matrix's edges, a copy with zeros beyond them. */
typedef struct {
    const bf16 *at;
    size_t stride; /* bytes */
} tile_t;

static inline tile_t weights_at(const dense_t *job, size_t output, size_t input, bf16 *edge) {
    if (output + EDGE <= job->outputs && input + LANES <= job->inputs)
        return (tile_t){job->weight + output * job->inputs + input, job->inputs * sizeof(bf16)};
    const size_t left = job->inputs - input;
    const __mmask32 mask = left < LANES ? (__mmask32)((1u << left) - 1) : 0xffffffff;
    FENCE(edge);
    for (size_t o = 0; o < EDGE; o++) {
        const bf16 *row = job->weight + (output + o) * job->inputs + input;
        const __m512i values = _mm512_maskz_loadu_epi16(output + o < job->outputs ? mask : 0, row);
        _mm512_store_si512(edge + o * LANES, values);
    }
    FENCE(edge);
    return (tile_t){edge, LINE};
}

/* Two tiles of outputs from `output` on meet the only tile of rows. */
static void meet_one(const dense_t *job, const bf16 *x, size_t output) {
    const size_t tall = height(job), bytes = tall * sizeof(float), put_bytes = tall == 1 ? sizeof(float) : LINE;
    _Alignas(LINE) bf16 edges[2][EDGE * LANES];
    _Alignas(LINE) float sums[2][EDGE * EDGE];
    _tile_zero(0);
    _tile_zero(1);
    for (size_t i = 0; i < job->inputs; i += LANES, x += tall * LANES) {
        const tile_t a = weights_at(job, output, i, edges[0]), b = weights_at(job, output + EDGE, i, edges[1]);
        _tile_loadd(6, x, bytes);
        _tile_loadd(4, a.at, a.stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, b.at, b.stride);
        _tile_dpbf16ps(1, 5, 6);
    }
    _tile_stored(0, sums[0], put_bytes);
    _tile_stored(1, sums[1], put_bytes);
    put_tile(job, 0, output, sums[0]);
    if (output + EDGE < job->outputs) put_tile(job, 0, output + EDGE, sums[1]);
}

/* Two tiles of outputs and two of rows, inputs [start, stop), which go on with `sums` unless they are the first.
 * laid: the weights' tiles, one after the other; NULL: where they are. */
static inline void meet_two(const dense_t *job, size_t tile, size_t output, size_t start, size_t stop, const bf16 *laid,
                            float (*sums)[EDGE * EDGE]) {
    const size_t next = (stop - start + LANES - 1) / LANES * EDGE * LANES; /* to the same inputs of the second tile */
    const size_t tall = height(job), bytes = tall * sizeof(float);
    const bf16 *x = job->packed + tile * tile_size(job) + start * tall, *z = x + tile_size(job);
    _Alignas(LINE) bf16 edges[2][EDGE * LANES];
    if (start) {
        _tile_loadd(0, sums[0], LINE);
        _tile_loadd(1, sums[1], LINE);
        _tile_loadd(2, sums[2], LINE);
        _tile_loadd(3, sums[3], LINE);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (size_t i = start; i < stop; i += LANES, x += tall * LANES, z += tall * LANES) {
        tile_t a, b;
        if (laid) {
            a = (tile_t){laid, LINE}, b = (tile_t){laid + next, LINE};
            laid += EDGE * LANES;
        } else {
            a = weights_at(job, output, i, edges[0]), b = weights_at(job, output + EDGE, i, edges[1]);
        }
        _tile_loadd(6, x, bytes);
        _tile_loadd(4, a.at, a.stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, b.at, b.stride);
        _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(7, z, bytes);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums[0], LINE);
    _tile_stored(1, sums[1], LINE);
    _tile_stored(2, sums[2], LINE);
    _tile_stored(3, sums[3], LINE);
    if (stop < job->inputs) return;
    for (size_t i = 0; i < 4; i++)
        if (output + i % 2 * EDGE < job->outputs)
            put_tile(job, first_row(job, tile + i / 2), output + i % 2 * EDGE, sums[i]);
}

/* Pairs of tiles of outputs [start, stop) with the only tile of rows: as fast as weights come, which the processor sees
 * coming in sixteen streams. */
static void lone_run(void *data, size_t start, size_t stop) {
    const dense_t *job = data;
    __m512i own[job->packed ? 1 : tile_size(job) / LANES];
    if (!job->packed) pack(job, (uint32_t *)own, 0);
    FENCE(own);
    shape_tiles(height(job));
    for (size_t pair = start; pair < stop; pair++)
        meet_one(job, job->packed ? job->packed : (const bf16 *)own, 2 * pair * EDGE);
    _tile_release();
}

/* Inputs [input, end) of pairs of tiles of outputs [start, stop): tiles of one piece each. */
static void lay(const dense_t *job, bf16 *laid, size_t start, size_t stop, size_t input, size_t end) {
    for (size_t output = 2 * start * EDGE; output < 2 * stop * EDGE; output += EDGE)
        for (size_t i = input; i < end; i += LANES, laid += EDGE * LANES) {
            const tile_t tile = weights_at(job, output, i, laid);
            if (tile.at == laid) continue;
            UNROLL for (size_t o = 0; o < EDGE; o++)
                _mm512_store_si512(laid + o * LANES, _mm512_loadu_si512(tile.at + o * job->inputs));
        }
    FENCE(laid);
}

/* The same with all tiles of rows, in pairs; rows of many inputs part by part, sums waiting for the next part.  Where
 * several pairs meet weights that lie across the lines of the cache, as in a published file, those are laid out once. */
static void pairs_run(void *data, size_t start, size_t stop) {
    const dense_t *job = data;
    const size_t is_across = ((uintptr_t)job->weight | job->inputs * sizeof(bf16)) % LINE;
    const size_t is_laid = is_across && job->tiles > 2;
    __m512i room[is_laid ? (stop - start) * 2 * EDGE * DEEP / LANES : 1];
    bf16 *laid = is_laid ? (bf16 *)room : NULL;
    _Alignas(LINE) float sums[2 * PIECE * BLOCK / EDGE][EDGE * EDGE];
    shape_tiles(height(job));
    for (size_t input = 0; input < job->inputs; input += DEEP) {
        const size_t end = input + DEEP < job->inputs ? input + DEEP : job->inputs;
        const size_t pair_size = (end - input + LANES - 1) / LANES * 2 * EDGE * LANES;
        size_t waiting = 0;
        if (laid) lay(job, laid, start, stop, input, end);
        for (size_t tile = 0; tile < job->tiles; tile += 2)
            for (size_t pair = start; pair < stop; pair++) {
                const bf16 *tiles = laid ? laid + (pair - start) * pair_size : NULL;
                meet_two(job, tile, 2 * pair * EDGE, input, end, tiles, sums + waiting);
                waiting += job->inputs > DEEP ? 4 : 0;
            }
    }
    _tile_release();
}

/* Pairs of tiles of outputs of a piece: enough for going on to the next to cost little, few enough to be shared.  What is
 * unpacked first should be in the nearest cache when it is multiplied. */
static size_t pairs_per_piece(const dense_t *job, size_t count) {
    if (job->from) return 1;
    const size_t elements = 2 * EDGE * job->inputs, fair = count / ((job->tiles > 1 ? 4 : 2) * job->num_threads);
    const size_t kept = job->tiles > 1 ? PIECE : RUN / (elements * sizeof(bf16));
    const size_t most = kept < fair ? kept : fair, worth = SHARE / elements;
    const size_t least = worth < PIECE ? worth : PIECE;
    return most > least ? most : least > 0 ? least : 1;
}

void zinfer_dense_amx(dense_t *job) {
    const size_t tiles = (job->rows + EDGE - 1) / EDGE, pairs = (job->outputs + 2 * EDGE - 1) / (2 * EDGE);
    job->tiles = tiles > 1 ? (tiles + 1) / 2 * 2 : 1;
    job->piece = pairs_per_piece(job, pairs);
    if (job->packed) share(pack_piece, job, job->tiles, (unsigned)job->num_threads);
    share_outputs(job->tiles > 1 ? pairs_run : lone_run, job, 2 * EDGE);
}
#else
int zinfer_has_amx(void) { return 0; }
void zinfer_dense_amx(dense_t *job) { (void)job; }
#endif

void zinfer_allow_amx(int is_wanted) { is_allowed = is_wanted; }
#endif
