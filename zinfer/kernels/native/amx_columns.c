/* Products on the matrix unit with weights that are published as [inputs, outputs].  Python side: zinfer.kernels.columns.
 *
 * Here rows of x are the first operand as they lie, and the weights the one that wants pairs of inputs: two rows of the
 * weight are laced together, part by part, once for all rows.  A part is read in runs along the outputs.  Sums wait in
 * single precision for the next part; each is over the inputs, 32 at a time in their order, whatever the number of rows,
 * threads and pieces.
 *
 * The unit adds up the even and the odd ones of 32 inputs in two chains of fused multiplications, then both to the sum
 * (Intel's manual, TDPBF16PS; tried on five million sums).  The vector unit can do the same, and does for a few rows: for
 * them lacing costs more than it saves. */
#include "columns.h"
#include "amx.h"

#ifdef HAS_AMX
#define LACED 32768 /* weights that are laced at a time */
#define WIDEST 256  /* outputs of a piece that all rows meet part by part */
#define ALONE_WIDE 1024 /* of one that a tile of rows, or a few, meet by themselves: memory is read in long runs */
#define FEW 3       /* rows that the vector unit multiplies as the matrix unit would */
#define FLUSH 0x8040 /* numbers too small for a whole mantissa are zero for the matrix unit */
#define AHEAD 32    /* inputs after which weights are asked for */

typedef struct {
    const columns_t *job;
    size_t tiles, tall, first_output, outputs, pairs; /* pairs: of tiles of the piece's outputs */
    _Alignas(LINE) bf16 laced[LACED];
    _Alignas(LINE) bf16 edge[2][EDGE * LANES];
    _Alignas(LINE) float sums[(BLOCK + EDGE) * WIDEST]; /* of each tile [tall, piece] */
} columns_work_t;

/* 0 to 3: sums, [rows, outputs].  4 and 5: rows.  6 and 7: weights. */
#define TILES_OF_ROWS 6

/* Tiles of one height: the last one begins early. */
static inline size_t first_row(const columns_work_t *work, size_t tile) {
    const size_t row = tile * work->tall;
    return row + work->tall > work->job->rows ? work->job->rows - work->tall : row;
}

static inline __mmask32 mask_of(size_t left) { return left < LANES ? (__mmask32)((1u << left) - 1) : 0xffffffff; }

/* Inputs [input, end) of the piece: of 32 inputs two tiles for each 32 outputs, pairs of inputs row by row. */
static void lace_part(columns_work_t *work, size_t input, size_t end) {
    const columns_t *job = work->job;
    for (size_t i = input; i < end; i += 2) {
        const size_t step = (i - input) / LANES, pair = (i - input) % LANES / 2;
        bf16 *to = work->laced + (step * 2 * work->pairs * EDGE + pair) * LANES;
        const bf16 *from = job->weight + i * job->outputs + work->first_output;
        for (size_t o = 0; o < work->outputs; o += LANES, to += 2 * EDGE * LANES) {
            const __mmask32 mask = mask_of(work->outputs - o);
            __m512i low, high;
            _mm_prefetch((const char *)(from + AHEAD * job->outputs + o), _MM_HINT_T1);
            _mm_prefetch((const char *)(from + (AHEAD + 1) * job->outputs + o), _MM_HINT_T1);
            lace(_mm512_maskz_loadu_epi16(mask, from + o),
                 _mm512_maskz_loadu_epi16(i + 1 < end ? mask : 0, from + job->outputs + o), &low, &high);
            _mm512_store_si512(to, low);
            _mm512_store_si512(to + EDGE * LANES, high);
        }
    }
    for (size_t i = (end - input + 1) / 2; i % EDGE; i++) /* the last step's pairs beyond the last input */
        for (size_t o = 0; o < 2 * work->pairs; o++)
            _mm512_store_si512(work->laced + ((i / EDGE * 2 * work->pairs + o) * EDGE + i % EDGE) * LANES,
                               _mm512_setzero_si512());
    FENCE(work->laced);
}

/* Thirty-two inputs of a tile of rows: where they lie, or a copy with zeros beyond the last one. */
typedef struct {
    const bf16 *at;
    size_t bytes;
} rows_t;

static inline rows_t rows_at(columns_work_t *work, size_t tile, size_t input, bf16 *edge) {
    const columns_t *job = work->job;
    const bf16 *x = job->x + first_row(work, tile) * job->inputs + input;
    if (input + LANES <= job->inputs) return (rows_t){x, job->inputs * sizeof(bf16)};
    FENCE(edge);
    for (size_t m = 0; m < work->tall; m++)
        _mm512_store_si512(edge + m * LANES,
                           _mm512_maskz_loadu_epi16(mask_of(job->inputs - input), x + m * job->inputs));
    FENCE(edge);
    return (rows_t){edge, LINE};
}

static inline float *sums_of(columns_work_t *work, size_t tile, size_t pair) {
    return work->sums + tile * work->tall * work->job->width + pair * 2 * EDGE;
}

/* One tile of rows, or two, meet a pair of tiles of outputs, inputs [input, end). */
static void meet_columns(columns_work_t *work, size_t tile, size_t pair, size_t input, size_t end, int is_two) {
    float *one = sums_of(work, tile, pair), *two = is_two ? sums_of(work, tile + 1, pair) : one;
    const size_t stride = work->job->width * sizeof(float), from_step = 2 * work->pairs * EDGE * LANES;
    const bf16 *weights = work->laced + pair * 2 * EDGE * LANES;
    if (input) {
        _tile_loadd(0, one, stride);
        _tile_loadd(1, one + EDGE, stride);
        _tile_loadd(2, two, stride);
        _tile_loadd(3, two + EDGE, stride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (size_t i = input; i < end; i += LANES, weights += from_step) {
        const rows_t a = rows_at(work, tile, i, work->edge[0]);
        _tile_loadd(4, a.at, a.bytes);
        _tile_loadd(6, weights, LINE);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, weights + EDGE * LANES, LINE);
        _tile_dpbf16ps(1, 4, 7);
        if (!is_two) continue;
        const rows_t b = rows_at(work, tile + 1, i, work->edge[1]);
        _tile_loadd(5, b.at, b.bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, one, stride);
    _tile_stored(1, one + EDGE, stride);
    if (is_two) {
        _tile_stored(2, two, stride);
        _tile_stored(3, two + EDGE, stride);
    }
}

static void put_columns(columns_work_t *work) {
    const columns_t *job = work->job;
    FENCE(work->sums);
    for (size_t tile = 0; tile < work->tiles; tile++)
        for (size_t m = 0; m < work->tall; m++) {
            const float *sums = work->sums + (tile * work->tall + m) * job->width;
            bf16 *y = job->y + (first_row(work, tile) + m) * job->outputs + work->first_output;
            for (size_t o = 0; o < work->outputs; o += EDGE) {
                const __mmask16 mask = (__mmask16)mask_of(work->outputs - o);
                __m512 found = _mm512_load_ps(sums + o);
                if (job->bias) {
                    const bf16 *bias = job->bias + work->first_output + o;
                    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, bias));
                    found = _mm512_add_ps(found, (__m512)_mm512_slli_epi32(wide, 16));
                }
                _mm256_mask_storeu_epi16(y + o, mask, narrow_16(found));
            }
        }
}

/* Of 32 outputs the even ones and the odd ones in turn. */
static inline void unravel(float *sums) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512 even = _mm512_load_ps(sums), odd = _mm512_load_ps(sums + EDGE);
    _mm512_store_ps(sums, _mm512_permutex2var_ps(even, low, odd));
    _mm512_store_ps(sums + EDGE, _mm512_permutex2var_ps(even, _mm512_add_epi32(low, _mm512_set1_epi32(8)), odd));
}

/* Thirty-two inputs of a row, in single precision at x, times 32 outputs, of which even and odd ones lie apart. */
static inline void meet_row(const columns_t *job, const float *x, size_t input, size_t output, __mmask32 mask,
                            float *sums) {
    const bf16 *w = job->weight + input * job->outputs + output;
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
    const size_t count = job->inputs - input;
    __m512 even[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, odd[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    UNROLL for (size_t i = 0; i < LANES; i++) {
        const __m512i both = _mm512_maskz_loadu_epi16(i < count ? mask : 0, w + i * job->outputs);
        const __m512 value = _mm512_set1_ps(x[i]);
        even[i % 2] = _mm512_fmadd_ps((__m512)_mm512_slli_epi32(both, 16), value, even[i % 2]);
        odd[i % 2] = _mm512_fmadd_ps((__m512)_mm512_and_si512(both, upper), value, odd[i % 2]);
        _mm_prefetch((const char *)(w + (i + AHEAD) * job->outputs), _MM_HINT_T1);
    }
    _mm512_store_ps(sums, _mm512_add_ps(_mm512_load_ps(sums), _mm512_add_ps(even[0], even[1])));
    _mm512_store_ps(sums + EDGE, _mm512_add_ps(_mm512_load_ps(sums + EDGE), _mm512_add_ps(odd[0], odd[1])));
}

static void few_piece(void *data, size_t piece) {
    const columns_t *job = data;
    const unsigned before = _mm_getcsr();
    columns_work_t work;
    work.job = job, work.tiles = job->rows, work.tall = 1;
    work.first_output = piece * job->width;
    work.outputs = end_of(piece, job->width, job->outputs) - work.first_output;
    memset(work.sums, 0, job->rows * job->width * sizeof(float));
    _mm_setcsr(before | FLUSH);
    for (size_t input = 0; input < job->inputs; input += LANES) {
        float x[FEW][LANES] = {{0}};
        for (size_t m = 0; m < job->rows; m++)
            for (size_t i = 0; i < LANES && input + i < job->inputs; i++)
                x[m][i] = widen(job->x[m * job->inputs + input + i]);
        for (size_t o = 0; o < work.outputs; o += LANES)
            for (size_t m = 0; m < job->rows; m++)
                meet_row(job, x[m], input, work.first_output + o, mask_of(work.outputs - o),
                         work.sums + m * job->width + o);
    }
    _mm_setcsr(before);
    for (size_t m = 0; m < job->rows; m++)
        for (size_t o = 0; o < work.outputs; o += LANES) unravel(work.sums + m * job->width + o);
    put_columns(&work);
}

static void columns_piece(void *data, size_t piece) {
    const columns_t *job = data;
    const size_t tiles = (job->rows + EDGE - 1) / EDGE;
    columns_work_t work;
    work.job = job, work.tiles = tiles > 1 ? (tiles + 1) / 2 * 2 : 1;
    work.tall = (job->rows + work.tiles - 1) / work.tiles;
    work.first_output = piece * job->width;
    work.outputs = end_of(piece, job->width, job->outputs) - work.first_output;
    work.pairs = (work.outputs + 2 * EDGE - 1) / (2 * EDGE);
    const size_t part = LACED / job->width / LANES * LANES;
    use_rows(work.tall, TILES_OF_ROWS);
    for (size_t input = 0; input < job->inputs; input += part) {
        const size_t end = input + part < job->inputs ? input + part : job->inputs;
        lace_part(&work, input, end);
        for (size_t tile = 0; tile < work.tiles; tile += 2)
            for (size_t pair = 0; pair < work.pairs; pair++)
                meet_columns(&work, tile, pair, input, end, work.tiles > 1);
    }
    _tile_release();
    put_columns(&work);
}

void zinfer_columns_amx(columns_t *all, unsigned num_threads) {
    const size_t shared = (all->outputs + 2 * num_threads - 1) / (2 * num_threads), blocks = (all->rows + BLOCK - 1) / BLOCK;
    const size_t wide = (shared + LANES - 1) / LANES * LANES, rows = all->rows;
    for (size_t block = 0; block < blocks; block++) {
        const size_t row = block * rows / blocks;
        columns_t job = *all;
        job.x += row * all->inputs, job.y += row * all->outputs, job.rows = (block + 1) * rows / blocks - row;
        const size_t most = job.rows > EDGE ? WIDEST : ALONE_WIDE;
        job.width = wide < most ? wide : most;
        share(job.rows > FEW ? columns_piece : few_piece, &job, (job.outputs + job.width - 1) / job.width, num_threads);
    }
}
#else
void zinfer_columns_amx(columns_t *job, unsigned num_threads) { (void)job, (void)num_threads; }
#endif
