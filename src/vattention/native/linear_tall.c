/* y = x W^T + b for many rows, by matrix tiles (AMX) of bfloat16.
 *
 * With enough rows a product is bound by arithmetic, which then waits for the tiles' loads alone: four products
 * take four tiles. So rows are packed into whole tiles, which the processor fetches ahead as they lie. While the matrix
 * unit works on 32 rows, those before them are rounded and stored, one between two steps.
 */
#include "kernels.h"

#include <stdlib.h>
#include <string.h>

#ifdef HAVE_TILES
#include <immintrin.h>
#endif

/* Rows in a block, at most and where it outgrows the second-level cache, and those that are multiplied at a time. */
enum { BLOCK_ROWS = 256, FEW_ROWS = 128, PAIR_ROWS = 32 };
/* Bytes of packed rows that leave room for others in that cache. */
enum { BLOCK_NBYTES = 1 << 20 };
/* Bytes of a matrix tile. */
enum { TILE_NBYTES = 1024 };
/* Bytes of sums of PAIR_ROWS rows. */
enum { SUMS_NBYTES = PAIR_ROWS * COLUMNS * 4 };

int vattention_can_tall(const vattention_weight *weight) {
#ifdef HAVE_TILES
    return weight->dtype == BFLOAT16 && weight->num_in % TILE_STEPS == 0 && vattention_has_tiles() == 2;
#else
    (void)weight;
    return 0;
#endif
}

#ifdef HAVE_TILES
#define TALL_TARGET __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")))
#define EXP_TARGET TALL_TARGET
#include "exp2.h"

typedef struct {
    const vattention_weight *weight;
    const uint16_t *x;
    int64_t x_stride, num_rows;
    void *y;
    const vattention_gating *gating; /* or NULL */
    int64_t num_steps;
    int64_t block_rows, num_blocks, panels_each, num_groups, num_panels;
    /* One thread's after the other's: rows as tiles [row / 16, step], panels that were quantized, and the sums of two
     * times PAIR_ROWS rows, with those of their factors. */
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

/* What becomes of sums: float32, bfloat16, or the gated half of them in bfloat16. */
enum kind { WIDE, NARROW, GATED };

/* Rows whose sums are complete, of which the first `done` are stored. */
typedef struct {
    const char *sums, *factors; /* [2, 2] tiles of 16 rows and columns; of a gate's factors, if there is one */
    const float *bias, *factors_bias; /* or NULL */
    char *y; /* where the first row goes */
    int64_t y_nbytes; /* from row to row */
    __mmask32 columns;
    int64_t done, count;
    vattention_gating gating;
} pending;

/* 16 columns of the next row, with their bias. */
TALL_TARGET INLINE __m512 columns_of(const pending *p, const char *sums, const float *bias, int64_t half) {
    const __m512 all = _mm512_load_ps((const float *)(sums + (p->done + (p->done & 16)) * 64 + half * TILE_NBYTES));
    return bias ? _mm512_add_ps(all, _mm512_loadu_ps(bias + half * HALF)) : all;
}

/* What a bfloat16 keeps of 16 numbers. */
TALL_TARGET INLINE __m512 rounded(__m512 x) {
    const __m256i bits = (__m256i)_mm512_cvtneps_pbh(x);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

TALL_TARGET INLINE __m512 gated(const pending *p, int64_t half) {
    const __m512 gate = rounded(columns_of(p, p->sums, p->bias, half));
    const __m512 factor = rounded(columns_of(p, p->factors, p->factors_bias, half));
    const __m512 linear = _mm512_set1_ps(p->gating.linear * -LOG2_E), cubic = _mm512_set1_ps(p->gating.cubic * -LOG2_E);
    const __m512 power = _mm512_mul_ps(gate, _mm512_fmadd_ps(_mm512_mul_ps(cubic, gate), gate, linear));
    const __m512 below = _mm512_add_ps(_mm512_set1_ps(1.0f), exp2_of(power));
    return _mm512_mul_ps(_mm512_div_ps(gate, below), factor);
}

/* The next row to y. */
TALL_TARGET INLINE void store(pending *p, const enum kind kind) {
    const __m512 low = kind == GATED ? gated(p, 0) : columns_of(p, p->sums, p->bias, 0);
    const __m512 high = kind == GATED ? gated(p, 1) : columns_of(p, p->sums, p->bias, 1);
    char *to = p->y + p->done * p->y_nbytes;
    if (kind == WIDE) {
        _mm512_mask_storeu_ps(to, (__mmask16)p->columns, low);
        _mm512_mask_storeu_ps(to + HALF * 4, (__mmask16)(p->columns >> HALF), high);
    } else {
        _mm512_mask_storeu_epi16(to, p->columns, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    p->done++;
}

/* The sums of PAIR_ROWS packed rows and a panel; meanwhile stores a row of `before` with each step. Each step fetches
 * `lines` cache lines from `ahead` on. */
TALL_TARGET INLINE void pair_times(int64_t num_steps, const char *rows, const char *weights, const char *ahead,
                                   int64_t lines, char *sums, pending *before, const enum kind kind) {
    const char *lower = rows + num_steps * TILE_NBYTES;
    pending p = *before;
    TILES_READ_MEMORY;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < num_steps; step++) {
        for (int64_t line = 0; line < lines; line++, ahead += 64) {
            _mm_prefetch(ahead, _MM_HINT_T1);
        }
        _tile_loadd(4, rows + step * TILE_NBYTES, 64);
        _tile_loadd(6, weights, COLUMNS * 4);
        _tile_dpbf16ps(0, 4, 6);
        if (p.done < p.count) {
            store(&p, kind);
        }
        _tile_loadd(7, weights + HALF * 4, COLUMNS * 4);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, lower + step * TILE_NBYTES, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        weights += TILE_STEPS * COLUMNS * 2;
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + TILE_NBYTES, 64);
    _tile_stored(2, sums + 2 * TILE_NBYTES, 64);
    _tile_stored(3, sums + 3 * TILE_NBYTES, 64);
    TILES_READ_MEMORY;
    before->done = p.done;
}

/* A panel as tiles of bfloat16. */
static const char *panel_of(const job *j, int64_t panel, char *unpacked) {
    if (j->weight->format == PLAIN) {
        return (const char *)j->weight->packed + panel * j->panel_nbytes;
    }
    vattention_unpack(j->weight, panel, BFLOAT16, unpacked);
    return unpacked;
}

/* A block of rows times a panel, to y but for the last rows, which are pending then. */
TALL_TARGET INLINE void panel_times(const job *j, char *packed, int64_t first, int64_t rows, int64_t panel, pending *last,
                                    const enum kind kind) {
    char *unpacked = packed + j->packed_nbytes, *sums = unpacked + j->panels_unpacked * j->panel_nbytes;
    const char *weights = panel_of(j, panel, unpacked);
    const char *others = kind == GATED ? panel_of(j, panel + j->num_panels, unpacked + j->panel_nbytes) : NULL;
    const float *bias = j->weight->bias ? j->weight->bias + panel * COLUMNS : NULL;
    const int64_t width = kind == GATED ? j->num_panels * COLUMNS : j->weight->num_out, left = width - panel * COLUMNS;
    const int64_t item = kind == WIDE ? 4 : 2;
    /* Each pair of tiles of rows fetches its share of the next panel. */
    const int64_t lines = TILE_STEPS * COLUMNS * 2 / 64 / (j->block_rows / PAIR_ROWS);
    for (int64_t row = 0; row < rows; row += PAIR_ROWS) {
        char *own = sums + (last->sums == sums ? 2 * SUMS_NBYTES : 0), *factors = own + SUMS_NBYTES;
        const char *tiles = packed + row / 16 * j->num_steps * TILE_NBYTES;
        const int64_t ahead = j->panel_nbytes + j->num_steps * 64 * lines * (row / PAIR_ROWS);
        pair_times(j->num_steps, tiles, weights, weights + ahead, lines, own, last, kind);
        if (kind == GATED) {
            pair_times(j->num_steps, tiles, others, others + ahead, lines, factors, last, kind);
        }
        while (last->done < last->count) {
            store(last, kind);
        }
        *last = (pending){
            .sums = own,
            .factors = factors,
            .bias = bias,
            .factors_bias = bias ? bias + width : NULL,
            .y = (char *)j->y + ((first + row) * width + panel * COLUMNS) * item,
            .y_nbytes = width * item,
            .columns = left >= COLUMNS ? 0xffffffffu : (1u << left) - 1,
            .count = rows - row < PAIR_ROWS ? rows - row : PAIR_ROWS,
            .gating = kind == GATED ? *j->gating : (vattention_gating){0},
        };
    }
}

/* A thread's share: items, each a block of rows times a group of panels, until none is left. */
TALL_TARGET INLINE void work(job *j, const enum kind kind) {
    const int64_t thread = __atomic_fetch_add(&j->next_thread, 1, __ATOMIC_RELAXED);
    char *packed = j->workspace + thread * j->thread_nbytes;
    int64_t block_packed = -1;
    pending last = {0};
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
            panel_times(j, packed, first, rows, panel, &last, kind);
        }
    }
    while (last.done < last.count) {
        store(&last, kind);
    }
    if (block_packed >= 0) {
        vattention_tiles_end();
    }
}

TALL_TARGET static void work_wide(void *argument) { work(argument, WIDE); }
TALL_TARGET static void work_narrow(void *argument) { work(argument, NARROW); }
TALL_TARGET static void work_gated(void *argument) { work(argument, GATED); }

static job job_of(const vattention_weight *weight, int64_t num_rows, int gated, int32_t num_threads) {
    job j = {.weight = weight, .num_rows = num_rows};
    j.num_steps = weight->num_in / TILE_STEPS;
    const int64_t most = BLOCK_ROWS * weight->num_in * 2 <= BLOCK_NBYTES ? BLOCK_ROWS : FEW_ROWS;
    j.num_blocks = (num_rows + most - 1) / most;
    j.block_rows = ((num_rows + j.num_blocks - 1) / j.num_blocks + PAIR_ROWS - 1) / PAIR_ROWS * PAIR_ROWS;
    j.num_blocks = (num_rows + j.block_rows - 1) / j.block_rows;
    j.num_panels = (weight->num_out + COLUMNS - 1) / COLUMNS / (gated ? 2 : 1);
    j.panels_each = j.num_panels / (8 * num_threads) + 1;
    j.num_groups = (j.num_panels + j.panels_each - 1) / j.panels_each;
    /* Enough for fewer rows too, of which blocks may be larger. */
    j.packed_nbytes = (num_rows < most ? j.block_rows : most) / 16 * j.num_steps * TILE_NBYTES;
    j.panel_nbytes = j.num_steps * TILE_STEPS * COLUMNS * 2;
    j.panels_unpacked = weight->format == PLAIN ? 0 : gated ? 2 : 1;
    j.thread_nbytes = j.packed_nbytes + j.panels_unpacked * j.panel_nbytes +
                      4 * SUMS_NBYTES;
    return j;
}
#endif

/* Bytes that `vattention_tall` works in, from a cache line on. */
int64_t vattention_tall_nbytes(const vattention_weight *weight, int64_t num_rows, int gated, int32_t num_threads) {
#ifdef HAVE_TILES
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
#ifdef HAVE_TILES
    job j = job_of(weight, num_rows, gating != NULL, num_threads);
    j.x = x;
    j.x_stride = x_stride;
    j.y = y;
    j.gating = gating;
    j.workspace = workspace;
    void (*work)(void *) = gating ? work_gated : y_dtype == FLOAT32 ? work_wide : work_narrow;
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
