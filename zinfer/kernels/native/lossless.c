/* Weights packed without loss, and bfloat16 again.  Python side: zinfer.kernels.native.calls.
 *
 * A weight is its sign and fraction, eight bits, and a code of four that stands for one of the fifteen exponents that are
 * most frequent among its tile's outputs.  The sixteenth code takes the next of the tile's exceptions. */
#include "kernels.h"
#include "lossless.h"

#if defined(__AVX512BW__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define AHEAD (8 * 1024) /* bytes that are asked for early: what the next piece begins with, while this one is multiplied */
#define STEP 64           /* weights that 32 bytes of codes are of: the first half's in the lower bits, then the others' */
#define FRACTION 0x7f
#define SIGN 0x8000

/* A tile's exceptions that are left.  A store that lies has more weights that want one; no byte beyond is read. */
typedef struct {
    const uint8_t *next, *end;
} exceptions_t;

static inline bf16 take(exceptions_t *left) { return left->next < left->end ? (bf16)(*left->next++ << 7) : 0; }

static inline bf16 joined(uint8_t rest, bf16 exponent) {
    return (bf16)((rest << 8 & SIGN) | exponent | (rest & FRACTION));
}

/* Those weights among `to` that `mask` names have the next exponents. */
static inline void put_exceptions(const uint8_t *rest, bf16 *to, uint32_t mask, exceptions_t *left) {
    for (; mask; mask &= mask - 1) {
        const int at = __builtin_ctz(mask);
        to[at] = joined(rest[at], take(left));
    }
}

#ifdef __AVX512BW__
/* An exception's entry is a sign bit, which no exponent reaches. */
static inline __m512i table_of(const uint8_t *list) {
    const __m256i wide = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)list)), 7);
    return _mm512_broadcast_i64x4(_mm256_insert_epi16(wide, (short)SIGN, EXCEPTION)); /* an index has a fifth bit */
}

static inline void unpack_half(const uint8_t *rest, __m512i codes, __m512i table, bf16 *to, exceptions_t *left) {
    const __m512i bits = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)rest));
    const __m512i exponents = _mm512_permutexvar_epi16(codes, table);
    const __m512i above = _mm512_ternarylogic_epi32(_mm512_slli_epi16(bits, 8), _mm512_set1_epi16((short)SIGN),
                                                    exponents, 0xea); /* a & b | c */
    _mm512_storeu_si512(to, _mm512_ternarylogic_epi32(bits, _mm512_set1_epi16(FRACTION), above, 0xea));
    const __mmask32 mask = _mm512_movepi16_mask(exponents);
    if (__builtin_expect(mask != 0, 0)) put_exceptions(rest, to, mask, left);
}

static void unpack_row(const uint8_t *rest, const uint8_t *codes, const uint8_t *list, bf16 *to, exceptions_t left,
                       size_t inputs) {
    const __m512i table = table_of(list);
    for (size_t i = 0; i < inputs; i += STEP) {
        const __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(codes + i / 2)));
        _mm_prefetch((const char *)(rest + i + AHEAD), _MM_HINT_T1);
        if (i % (2 * STEP) == 0) _mm_prefetch((const char *)(codes + i / 2 + AHEAD / 2), _MM_HINT_T1);
        unpack_half(rest + i, both, table, to + i, &left);
        unpack_half(rest + i + STEP / 2, _mm512_srli_epi16(both, 4), table, to + i + STEP / 2, &left);
    }
}
#elif defined(__AVX2__)
static inline void unpack_quarter(const uint8_t *rest, __m128i codes, __m128i list, bf16 *to, exceptions_t *left) {
    const __m256i bits = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)rest));
    const __m256i exponents = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_shuffle_epi8(list, codes)), 7);
    const __m256i sign = _mm256_and_si256(_mm256_slli_epi16(bits, 8), _mm256_set1_epi16((short)SIGN));
    const __m256i fraction = _mm256_and_si256(bits, _mm256_set1_epi16(FRACTION));
    _mm256_storeu_si256((__m256i *)to, _mm256_or_si256(_mm256_or_si256(sign, fraction), exponents));
    const unsigned mask = (unsigned)_mm_movemask_epi8(_mm_cmpeq_epi8(codes, _mm_set1_epi8(EXCEPTION)));
    if (__builtin_expect(mask != 0, 0)) put_exceptions(rest, to, mask, left);
}

static void unpack_row(const uint8_t *rest, const uint8_t *codes, const uint8_t *list, bf16 *to, exceptions_t left,
                       size_t inputs) {
    const __m128i exponents = _mm_loadu_si128((const __m128i *)list), low = _mm_set1_epi8(15);
    for (size_t i = 0; i < inputs; i += STEP)
        for (size_t k = 0; k < STEP; k += 16) {
            const __m128i both = _mm_loadu_si128((const __m128i *)(codes + i / 2 + k % (STEP / 2)));
            const __m128i of = _mm_and_si128(k < STEP / 2 ? both : _mm_srli_epi16(both, 4), low);
            unpack_quarter(rest + i + k, of, exponents, to + i + k, &left);
        }
}
#else
static void unpack_row(const uint8_t *rest, const uint8_t *codes, const uint8_t *list, bf16 *to, exceptions_t left,
                       size_t inputs) {
    for (size_t i = 0; i < inputs; i++) {
        const uint8_t both = codes[i / STEP * (STEP / 2) + i % (STEP / 2)];
        const uint8_t code = i % STEP < STEP / 2 ? both & 15 : both >> 4;
        const bf16 exponent = code == EXCEPTION ? take(&left) : (bf16)(list[code] << 7);
        to[i] = joined(rest[i], exponent);
    }
}
#endif

void zinfer_unpack_rows(const lossless_t *from, bf16 *to, size_t start, size_t stop) {
    const size_t inputs = from->inputs;
    for (size_t output = start; output < stop; output++, to += inputs) {
        const uint8_t *list = from->exponents + output / SHARED * ROOM(inputs);
        uint16_t begin;
        memcpy(&begin, list + SHARED + output % SHARED * sizeof begin, sizeof begin);
        const exceptions_t left = {list + HEAD + begin, list + ROOM(inputs)};
        unpack_row(from->rest + output * inputs, from->codes + output * inputs / 2, list, to, left, inputs);
    }
}

typedef struct {
    lossless_t from;
    bf16 *to;
    size_t stop;
} unpack_t;

static void unpack_piece(void *data, size_t start, size_t stop) {
    const unpack_t *job = data;
    zinfer_unpack_rows(&job->from, job->to + start * job->from.inputs, start, stop);
}

/* All `outputs` of a matrix to y [outputs, inputs]. */
void zinfer_unpack(const uint8_t *rest, const uint8_t *codes, const uint8_t *exponents, bf16 *y, size_t outputs,
                   size_t inputs, unsigned num_threads) {
    unpack_t job = {{rest, codes, exponents, inputs}, y, outputs};
    share_runs(unpack_piece, &job, outputs, rows_per_piece(inputs), num_threads);
}

typedef struct {
    const bf16 *x;
    uint8_t *rest, *codes, *exponents;
    size_t outputs, inputs;
    atomic_size_t most; /* exceptions of a tile */
} packing_t;

/* The most frequent exponents of `count` weights, of equals the smaller first.  Neighbours often have the same: each of
 * four counts them by itself, or every count would wait for the one before. */
static void make_list(const bf16 *x, size_t count, uint8_t *list) {
    uint32_t counts[4][256] = {{0}};
    for (size_t i = 0; i < count; i += 4) /* inputs are a multiple of STEP */
        for (size_t k = 0; k < 4; k++) counts[k][x[i + k] >> 7 & 0xff]++;
    int64_t sums[256];
    for (int e = 0; e < 256; e++) sums[e] = (int64_t)counts[0][e] + counts[1][e] + counts[2][e] + counts[3][e];
    for (int k = 0; k < EXCEPTION; k++) {
        int best = 0;
        for (int e = 1; e < 256; e++)
            if (sums[e] > sums[best]) best = e;
        sums[best] = -1;
        list[k] = (uint8_t)best;
    }
}

/* STEP weights.  Comparing with all of a list takes a vector fewer steps than looking each weight's code up; returns
 * how many weights are exceptions. */
static unsigned pack_step(const bf16 *x, const uint8_t *list, uint8_t *rest, uint8_t *codes) {
    uint8_t exponent[STEP], code[STEP];
    unsigned exceptions = 0;
    for (size_t i = 0; i < STEP; i++) {
        exponent[i] = (uint8_t)(x[i] >> 7);
        rest[i] = (uint8_t)((x[i] >> 8 & 0x80) | (x[i] & FRACTION));
        code[i] = EXCEPTION;
    }
    for (int k = 0; k < EXCEPTION; k++)
        for (size_t i = 0; i < STEP; i++) code[i] = exponent[i] == list[k] ? (uint8_t)k : code[i];
    for (size_t i = 0; i < STEP / 2; i++) codes[i] = (uint8_t)(code[i] | code[i + STEP / 2] << 4);
    for (size_t i = 0; i < STEP; i++) exceptions += code[i] == EXCEPTION;
    return exceptions;
}

/* The exponents of those STEP weights that are not on the list, behind `total` others of the tile as far as there is
 * room. */
static void list_exceptions(const bf16 *x, const uint8_t *list, uint8_t *to, size_t total, size_t room) {
    for (size_t i = 0; i < STEP; i++) {
        const uint8_t exponent = (uint8_t)(x[i] >> 7);
        if (!memchr(list, exponent, EXCEPTION) && total++ < room) to[total - 1] = exponent;
    }
}

static void pack_tile(void *data, size_t tile) {
    packing_t *job = data;
    const size_t inputs = job->inputs, first = tile * SHARED, room = ROOM(inputs) - HEAD;
    const size_t outputs = job->outputs - first < SHARED ? job->outputs - first : SHARED;
    const bf16 *x = job->x + first * inputs;
    uint8_t *list = job->exponents + tile * ROOM(inputs);
    uint8_t *rest = job->rest + first * inputs, *codes = job->codes + first * inputs / 2;
    size_t total = 0;
    memset(list, 0, ROOM(inputs));
    memset(rest + outputs * inputs, 0, (SHARED - outputs) * inputs);
    memset(codes + outputs * inputs / 2, 0, (SHARED - outputs) * inputs / 2);
    make_list(x, outputs * inputs, list);
    for (size_t output = 0; output < SHARED; output++) {
        const uint16_t begin = (uint16_t)total;
        memcpy(list + SHARED + output * sizeof begin, &begin, sizeof begin);
        for (size_t i = 0; output < outputs && i < inputs; i += STEP, x += STEP, rest += STEP, codes += STEP / 2) {
            const unsigned exceptions = pack_step(x, list, rest, codes);
            if (exceptions) list_exceptions(x, list, list + HEAD, total, room);
            total += exceptions;
        }
    }
    size_t most = atomic_load(&job->most);
    while (total > most && !atomic_compare_exchange_weak(&job->most, &most, total)) {}
}

/* x [outputs, inputs] packed; returns in `most` the exceptions of the tile that has most, which may be too many. */
void zinfer_pack(const bf16 *x, uint8_t *rest, uint8_t *codes, uint8_t *exponents, int64_t *most, size_t outputs,
                 size_t inputs, unsigned num_threads) {
    packing_t job = {x, rest, codes, exponents, outputs, inputs, 0};
    share(pack_tile, &job, (outputs + SHARED - 1) / SHARED, num_threads);
    *most = (int64_t)atomic_load(&job.most);
}
