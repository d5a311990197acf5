/* y = x W^T + b for many rows, by matrix tiles (AMX) of bfloat16.
 *
 * With enough rows a product is bound by arithmetic, which then waits for the tiles' loads alone: four products
 * take four tiles. So rows are packed into whole tiles, which the processor fetches ahead as they lie, and of a panel
 * of W as much as the first-level cache holds meets all rows of a block before the next part does; sums wait in memory
 * meanwhile.
 */
#include "kernels.h"

#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && VATTENTION_LANES >= 16 && VATTENTION_DOT > 1 && \
    (defined(__clang__) || __GNUC__ >= 11)
#define HAVE_TALL
#include <immintrin.h>
#endif

/* Rows in a block; those whose sums stay in the first-level cache; and those that are multiplied at a time. */
enum { BLOCK_ROWS = 256, SUMMED_ROWS = 128, PAIR_ROWS = 32 };
/* Bytes of a matrix tile, and most steps of TILE_STEPS of a panel in the first-level cache. */
enum { TILE_NBYTES = 1024, STRIP_STEPS = 12 };
/* Most inputs: with more, a block of rows outgrows the second-level cache. */
enum { MOST_IN = 4096 };
/* Bytes of sums of PAIR_ROWS rows. */
enum { SUMS_NBYTES = PAIR_ROWS * COLUMNS * 4 };

int vattention_can_tall(const vattention_weight *weight) {
#ifdef HAVE_TALL
    return weight->dtype == BFLOAT16 && weight->num_in % TILE_STEPS == 0 && weight->num_in <= MOST_IN &&
           vattention_has_tiles() == 2;
#else
    (void)weight;
    return 0;
#endif
}

#ifdef HAVE_TALL
#define TALL_TARGET __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")))
#define SET tall
#define TARGET TALL_TARGET
#include "rowwise_numbers.h"
#include "rowwise_set.h"
#include "sigmoid.h"

typedef struct {
    const vattention_weight *weight;
    const uint16_t *x;
    int64_t x_stride, num_rows;
    void *y;
    int32_t y_dtype;
    const vattention_gating *gating; /* or NULL */
    int64_t num_steps;
    int64_t block_rows, num_blocks, panels_each, num_groups, num_panels;
    /* One thread's after the other's: rows as tiles [row / 16, step], panels that were quantized, and sums. */
    char *workspace;
    int64_t packed_nbytes, panel_nbytes, panels_unpacked, thread_nbytes;
    int64_t next_thread, next_item; /* taken atomically */
} job;

TALL_TARGET static void pack(const job *j, int64_t first, int64_t rows, char *to) {
    for (int64_t tile = 0; tile < rows || tile % PAIR_ROWS != 0; tile += 16) {
        for (int64_t step = 0; step < j->num_steps; step++) {
            for (int64_t m = tile; m < tile + 16; m++, to += 64) {
                const uint16_t *x = j->x + (first + m) * j->x_stride + step * TILE_STEPS;
                _mm512_storeu_si512(to, m < rows ? _mm512_loadu_si512(x) : _mm512_setzero_si512());
            }
        }
    }
}

/* 16 columns of a row of sums [2, 2] tiles of 16 rows and columns, with their bias. */
TALL_TARGET INLINE __m512 columns_of(const job *j, const char *sums, int64_t row, int64_t half, int64_t panel) {
    const char *from = sums + (row / 16 * 2 + half) * TILE_NBYTES + row % 16 * 64;
    const __m512 all = _mm512_load_ps((const float *)from);
    const float *bias = j->weight->bias;
    return bias ? _mm512_add_ps(all, _mm512_loadu_ps(bias + panel * COLUMNS + half * HALF)) : all;
}

/* Sums to y. */
TALL_TARGET static void store(const job *j, const char *sums, int64_t row, int64_t rows, int64_t panel) {
    const int64_t out = panel * COLUMNS, left = j->weight->num_out - out;
    const __mmask32 mask = left >= COLUMNS ? 0xffffffffu : (1u << left) - 1;
    for (int64_t m = 0; m < rows; m++) {
        const __m512 low = columns_of(j, sums, m, 0, panel), high = columns_of(j, sums, m, 1, panel);
        const int64_t at = (row + m) * j->weight->num_out + out;
        if (j->y_dtype == FLOAT32) {
            _mm512_mask_storeu_ps((float *)j->y + at, (__mmask16)mask, low);
            _mm512_mask_storeu_ps((float *)j->y + at + HALF, (__mmask16)(mask >> HALF), high);
        } else {
            _mm512_mask_storeu_epi16((uint16_t *)j->y + at, mask, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
    }
}

/* What a bfloat16 keeps of 16 numbers. */
TALL_TARGET INLINE __m512 rounded(__m512 x) {
    const __m256i bits = (__m256i)_mm512_cvtneps_pbh(x);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

/* The sums of a panel of gates and of its factors to y, which is half as wide as both. */
TALL_TARGET static void store_gated(const job *j, const char *sums, const char *factors, int64_t row, int64_t rows,
                                    int64_t panel) {
    const int64_t width = j->weight->num_out / 2;
    for (int64_t m = 0; m < rows; m++) {
        __m512 y[2];
        for (int64_t half = 0; half < 2; half++) {
            const __m512 g = columns_of(j, sums, m, half, panel);
            const __m512 u = columns_of(j, factors, m, half, panel + width / COLUMNS);
            y[half] = (__m512)gated_tall((floats16)rounded(g), (floats16)rounded(u), j->gating->linear, j->gating->cubic);
        }
        uint16_t *to = (uint16_t *)j->y + (row + m) * width + panel * COLUMNS;
        _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(y[1], y[0]));
    }
}

/* A panel as tiles of bfloat16. */
static const char *panel_of(const job *j, int64_t panel, char *unpacked) {
    if (j->weight->format == PLAIN) {
        return (const char *)j->weight->packed + panel * j->panel_nbytes;
    }
    vattention_unpack(j->weight, panel, BFLOAT16, unpacked);
    return unpacked;
}

/* The sums of packed rows [first, last) of a block and a panel. */
TALL_TARGET static void panel_times(const job *j, const char *packed, int64_t first, int64_t last, const char *weights,
                                    char *sums) {
    const int64_t row_nbytes = j->num_steps * TILE_NBYTES, step_nbytes = TILE_STEPS * COLUMNS * 2;
    const int64_t num_strips = (j->num_steps + STRIP_STEPS - 1) / STRIP_STEPS;
    const int64_t begin = first / PAIR_ROWS, end = (last + PAIR_ROWS - 1) / PAIR_ROWS;
    /* Each pair of rows fetches its share of the next panel. */
    const int64_t lines = step_nbytes / 64 / (j->block_rows / PAIR_ROWS);
    TILES_READ_MEMORY;
    for (int64_t strip = 0; strip < num_strips; strip++) {
        const int64_t from = j->num_steps * strip / num_strips, until = j->num_steps * (strip + 1) / num_strips;
        for (int64_t pair = begin; pair < end; pair++) {
            char *own = sums + (pair - begin) * SUMS_NBYTES;
            const char *upper = packed + 2 * pair * row_nbytes, *lower = upper + row_nbytes;
            const char *ahead = weights + j->panel_nbytes + from * step_nbytes + (until - from) * 64 * lines * pair;
            if (strip == 0) {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            } else {
                _tile_loadd(0, own, 64);
                _tile_loadd(1, own + TILE_NBYTES, 64);
                _tile_loadd(2, own + 2 * TILE_NBYTES, 64);
                _tile_loadd(3, own + 3 * TILE_NBYTES, 64);
            }
            for (int64_t step = from; step < until; step++) {
                for (int64_t line = 0; line < lines; line++, ahead += 64) {
                    _mm_prefetch(ahead, _MM_HINT_T1);
                }
                const char *columns = weights + step * step_nbytes;
                _tile_loadd(4, upper + step * TILE_NBYTES, 64);
                _tile_loadd(6, columns, COLUMNS * 4);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, columns + HALF * 4, COLUMNS * 4);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, lower + step * TILE_NBYTES, 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, own, 64);
            _tile_stored(1, own + TILE_NBYTES, 64);
            _tile_stored(2, own + 2 * TILE_NBYTES, 64);
            _tile_stored(3, own + 3 * TILE_NBYTES, 64);
        }
    }
    TILES_READ_MEMORY;
}

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* A block of rows times a panel, to y. */
static void panel_to_y(const job *j, char *packed, int64_t first, int64_t rows, int64_t panel) {
    char *unpacked = packed + j->packed_nbytes, *sums = unpacked + j->panels_unpacked * j->panel_nbytes;
    char *factors = sums + SUMMED_ROWS / PAIR_ROWS * SUMS_NBYTES;
    const char *weights = panel_of(j, panel, unpacked);
    const char *others = j->gating ? panel_of(j, panel + j->num_panels, unpacked + j->panel_nbytes) : NULL;
    for (int64_t row = 0; row < rows; row += SUMMED_ROWS) {
        const int64_t end = smaller(row + SUMMED_ROWS, rows);
        panel_times(j, packed, row, end, weights, sums);
        if (j->gating) {
            panel_times(j, packed, row, end, others, factors);
        }
        for (int64_t pair = row; pair < end; pair += PAIR_ROWS) {
            const int64_t count = smaller(end - pair, PAIR_ROWS), at = (pair - row) / PAIR_ROWS * SUMS_NBYTES;
            if (j->gating) {
                store_gated(j, sums + at, factors + at, first + pair, count, panel);
            } else {
                store(j, sums + at, first + pair, count, panel);
            }
        }
    }
}

/* A thread's share: items, each a block of rows times a group of panels, until none is left. */
static void work(void *argument) {
    job *j = argument;
    const int64_t thread = __atomic_fetch_add(&j->next_thread, 1, __ATOMIC_RELAXED);
    char *packed = j->workspace + thread * j->thread_nbytes;
    int64_t block_packed = -1;
    for (;;) {
        const int64_t item = __atomic_fetch_add(&j->next_item, 1, __ATOMIC_RELAXED);
        const int64_t block = item / j->num_groups, group = item % j->num_groups;
        if (block >= j->num_blocks) {
            break;
        }
        const int64_t first = block * j->block_rows;
        const int64_t rows = j->num_rows - first < j->block_rows ? j->num_rows - first : j->block_rows;
        if (block_packed < 0) {
            vattention_tiles_begin(PAIR_ROWS);
        }
        if (block != block_packed) {
            pack(j, first, rows, packed);
            block_packed = block;
        }
        const int64_t begin = group * j->panels_each, end = begin + j->panels_each;
        for (int64_t panel = begin; panel < end && panel < j->num_panels; panel++) {
            panel_to_y(j, packed, first, rows, panel);
        }
    }
    if (block_packed >= 0) {
        vattention_tiles_end();
    }
}

static job job_of(const vattention_weight *weight, int64_t num_rows, int gated, int32_t num_threads) {
    job j = {.weight = weight, .num_rows = num_rows};
    j.num_steps = weight->num_in / TILE_STEPS;
    j.num_blocks = (num_rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    j.block_rows = ((num_rows + j.num_blocks - 1) / j.num_blocks + PAIR_ROWS - 1) / PAIR_ROWS * PAIR_ROWS;
    j.num_blocks = (num_rows + j.block_rows - 1) / j.block_rows;
    j.num_panels = (weight->num_out + COLUMNS - 1) / COLUMNS / (gated ? 2 : 1);
    j.panels_each = j.num_panels / (8 * num_threads) + 1;
    j.num_groups = (j.num_panels + j.panels_each - 1) / j.panels_each;
    j.packed_nbytes = j.block_rows / 16 * j.num_steps * TILE_NBYTES;
    j.panel_nbytes = j.num_steps * TILE_STEPS * COLUMNS * 2;
    j.panels_unpacked = weight->format == PLAIN ? 0 : gated ? 2 : 1;
    j.thread_nbytes = j.packed_nbytes + j.panels_unpacked * j.panel_nbytes +
                      SUMMED_ROWS / PAIR_ROWS * SUMS_NBYTES * (gated ? 2 : 1);
    return j;
}
#endif

/* Bytes that `vattention_tall` works in, from a cache line on. */
int64_t vattention_tall_nbytes(const vattention_weight *weight, int64_t num_rows, int gated, int32_t num_threads) {
#ifdef HAVE_TALL
    return num_threads * job_of(weight, num_rows, gated, num_threads).thread_nbytes;
#else
    (void)weight, (void)num_rows, (void)gated, (void)num_threads;
    return 0;
#endif
}

/* As `vattention_linear`, for a weight that `vattention_can_tall`. With `gating`, which takes a width of whole panels, y
 * [num_rows, num_out / 2] is in bfloat16 what vattention_gate makes of the product. */
void vattention_tall(const vattention_weight *weight, const void *x, int64_t x_stride, int64_t num_rows, void *y,
                     int32_t y_dtype, const vattention_gating *gating, void *workspace, int32_t num_threads,
                     parallel_fn parallel) {
#ifdef HAVE_TALL
    job j = job_of(weight, num_rows, gating != NULL, num_threads);
    j.x = x;
    j.x_stride = x_stride;
    j.y = y;
    j.y_dtype = y_dtype;
    j.gating = gating;
    j.workspace = workspace;
    if (num_threads == 1) {
        work(&j);
    } else {
        parallel(work, &j, (unsigned)num_threads, 0);
    }
#else
    (void)weight, (void)x, (void)x_stride, (void)num_rows, (void)y, (void)y_dtype, (void)gating, (void)workspace;
    (void)num_threads, (void)parallel;
#endif
}
