/* y = x W^T + b for bfloat16, by processors that multiply pairs of bfloat16 numbers themselves.
 *
 * Few rows go through AVX512_BF16, whose speed no memory can follow; more rows through the matrix tiles of AMX where
 * those are. Both flush denormal numbers to zero. See Intel, "64 and IA-32 Architectures Software Developer's Manual",
 * volume 2 (VDPBF16PS, TDPBF16PS), and "64 and IA-32 Architectures Optimization Reference Manual", chapter 20, for
 * the two by two tiles of y kept in registers.
 *
 * Packed weight: panels of 32 output columns and of the inner dimension's steps of 32, the last ones padded with
 * zeros. A step of a panel is two tiles, columns 0 to 15 and 16 to 31, of 16 rows of 64 bytes: row i holds
 * W[column, 2i] and W[column, 2i + 1] of each column beside each other. A panel is read from start to end.
 */
#include "linear.h"

#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && VATTENTION_LANES >= 16 && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))

/* Tests take AMX away. */
#ifndef VATTENTION_AMX
#define VATTENTION_AMX 1
#endif

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { STEP = 32, TILE_NBYTES = 1024, TILE_ROWS = 16, PANEL_STEP_NBYTES = 2 * TILE_NBYTES, LINE = 64 };
/* So far ahead of where it reads does a thread fetch a weight that comes from memory. */
enum { AHEAD_NBYTES = 2048 };
/* Most rows in AVX512_BF16's registers, and the fewest for which AMX is the faster one. */
enum { DOT_ROWS = 12, AMX_LEAST_ROWS = 2 };
/* Rows of x that shall stay in the second-level cache while panels pass by. */
enum { BLOCK_NBYTES = 1 << 19, MIN_BLOCK_ROWS = 64, MAX_BLOCK_ROWS = 512 };

#define DOT_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define AMX_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16")))

/* Compilers do not know all that AMX instructions read; before this line it is in memory. */
#define WRITTEN __asm__ volatile("" ::: "memory")

/* Some rows of x times one panel. */
typedef struct {
    const uint16_t *x;
    int64_t x_stride;
    const char *panel;
    int64_t steps;
    /* So many lines a step are fetched from here: with one tile of rows what it will read itself a little later,
     * with several each its share of the next panel, for only the first would read from memory, which would idle
     * over the others. */
    const char *ahead;
    int64_t ahead_lines;
    const float *bias; /* 32 numbers, or NULL */
    uint16_t *y;
    int64_t y_stride;
    int64_t columns; /* of the 32 that exist */
} product;

DOT_TARGET INLINE void store_columns(const product *p, int64_t row, int half, __m512 sums) {
    const int64_t left = p->columns - half * 16;
    if (left <= 0) {
        return;
    }
    const __mmask16 mask = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
    if (p->bias) {
        sums = _mm512_add_ps(sums, _mm512_loadu_ps(p->bias + half * 16));
    }
    _mm256_mask_storeu_epi16(p->y + row * p->y_stride + half * 16, mask, (__m256i)_mm512_cvtneps_pbh(sums));
}

/* `rows` is a constant wherever this is inlined; several chains of sums hide an instruction's latency. */
DOT_TARGET INLINE void dot(const product *p, const int rows) {
    enum { MOST_CHAINS = 4 };
    const int chains = rows == 1 ? 4 : rows <= 3 ? 2 : 1;
    __m512 sums[DOT_ROWS][2][MOST_CHAINS];
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++) {
#pragma GCC unroll 4
        for (int chain = 0; chain < chains; chain++) {
            sums[m][0][chain] = sums[m][1][chain] = _mm512_setzero_ps();
        }
    }
    const char *panel = p->panel, *ahead = p->ahead;
    const uint16_t *x = p->x;
    for (int64_t step = 0; step < p->steps; step++, panel += PANEL_STEP_NBYTES, x += STEP) {
        for (int64_t line = 0; line < p->ahead_lines; line++, ahead += LINE) {
            _mm_prefetch(ahead, _MM_HINT_T0);
        }
        for (int group = 0; group < 4; group++) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const int pair = 4 * group + i;
                const __m512bh first = (__m512bh)_mm512_loadu_si512(panel + pair * LINE);
                const __m512bh second = (__m512bh)_mm512_loadu_si512(panel + TILE_NBYTES + pair * LINE);
#pragma GCC unroll 12
                for (int m = 0; m < rows; m++) {
                    int32_t two;
                    memcpy(&two, x + m * p->x_stride + 2 * pair, 4);
                    const __m512bh spread = (__m512bh)_mm512_set1_epi32(two);
                    const int chain = i % chains;
                    sums[m][0][chain] = _mm512_dpbf16_ps(sums[m][0][chain], first, spread);
                    sums[m][1][chain] = _mm512_dpbf16_ps(sums[m][1][chain], second, spread);
                }
            }
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m512 sum = sums[m][half][0];
#pragma GCC unroll 4
            for (int chain = 1; chain < chains; chain++) {
                sum = _mm512_add_ps(sum, sums[m][half][chain]);
            }
            store_columns(p, m, half, sum);
        }
    }
}

#define DOT(rows) DOT_TARGET static void dot_##rows(const product *p) { dot(p, rows); }
DOT(1) DOT(2) DOT(3) DOT(4) DOT(5) DOT(6) DOT(7) DOT(8) DOT(9) DOT(10) DOT(11) DOT(12)
#undef DOT
static void (*const dots[DOT_ROWS])(const product *) = {dot_1, dot_2, dot_3, dot_4,  dot_5,  dot_6,
                                                        dot_7, dot_8, dot_9, dot_10, dot_11, dot_12};

/* Tile registers: y in 0 to 3, x in 4 and 5, the weight in 6 and 7. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_nbytes[16];
    uint8_t rows[16];
} tile_shapes;

AMX_TARGET static void shape_tiles(int64_t upper, int64_t lower) {
    tile_shapes shapes = {.palette = 1};
    const uint8_t a = (uint8_t)upper, b = (uint8_t)(lower ? lower : 1);
    const uint8_t rows[8] = {a, a, b, b, a, b, TILE_ROWS, TILE_ROWS};
    for (int i = 0; i < 8; i++) {
        shapes.rows[i] = rows[i];
        shapes.row_nbytes[i] = LINE;
    }
    WRITTEN;
    _tile_loadconfig(&shapes);
}

/* Up to 32 rows, the first up to 16 in the upper tiles; registers have the shapes already. */
AMX_TARGET INLINE void matrix(const product *p, int64_t upper, int64_t lower, const int two) {
    WRITTEN;
    _tile_zero(0);
    _tile_zero(1);
    if (two) {
        _tile_zero(2);
        _tile_zero(3);
    }
    const char *panel = p->panel, *ahead = p->ahead;
    const uint16_t *x = p->x, *x_lower = p->x + upper * p->x_stride;
    const int64_t x_nbytes = 2 * p->x_stride;
    for (int64_t step = 0; step < p->steps; step++, panel += PANEL_STEP_NBYTES, x += STEP, x_lower += STEP) {
        for (int64_t line = 0; line < p->ahead_lines; line++, ahead += LINE) {
            _mm_prefetch(ahead, _MM_HINT_T0);
        }
        _tile_loadd(4, x, x_nbytes);
        _tile_loadd(6, panel, LINE);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, panel + TILE_NBYTES, LINE);
        _tile_dpbf16ps(1, 4, 7);
        if (two) {
            _tile_loadd(5, x_lower, x_nbytes);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    float sums[4][TILE_ROWS][16] __attribute__((aligned(64)));
    _tile_stored(0, sums[0], LINE);
    _tile_stored(1, sums[1], LINE);
    if (two) {
        _tile_stored(2, sums[2], LINE);
        _tile_stored(3, sums[3], LINE);
    }
    for (int64_t row = 0; row < upper + lower; row++) {
        const int64_t below = row >= upper;
        for (int half = 0; half < 2; half++) {
            store_columns(p, row, half, _mm512_load_ps(sums[2 * below + half][row - below * upper]));
        }
    }
}

AMX_TARGET static void matrix_1(const product *p, int64_t upper, int64_t lower) { matrix(p, upper, lower, 0); }
AMX_TARGET static void matrix_2(const product *p, int64_t upper, int64_t lower) { matrix(p, upper, lower, 1); }
AMX_TARGET static void release_tiles(void) { _tile_release(); }

typedef struct {
    const vattention_weight *weight;
    const uint16_t *x;
    uint16_t *y;
    int64_t x_stride, num_rows, num_panels, steps, block_rows, tile_rows, num_groups, panels_each;
    int32_t with_tiles;
    int64_t next_item; /* taken atomically */
} bf16_job;

/* A block of rows times one panel; returns the rows that the tile registers are shaped for. */
static int64_t block_times_panel(const bf16_job *j, int64_t first, int64_t rows, int64_t panel, int64_t shaped) {
    const vattention_weight *w = j->weight;
    const int64_t panel_nbytes = j->steps * PANEL_STEP_NBYTES, out = panel * COLUMNS;
    const char *packed = (const char *)w->packed + panel * panel_nbytes;
    const int64_t num_tiles = (rows + j->tile_rows - 1) / j->tile_rows;
    for (int64_t tile = 0; tile < num_tiles; tile++) {
        const int64_t row = tile * j->tile_rows;
        const int64_t count = rows - row < j->tile_rows ? rows - row : j->tile_rows;
        const product p = {
            .x = j->x + (first + row) * j->x_stride,
            .x_stride = j->x_stride,
            .panel = packed,
            .steps = j->steps,
            .ahead = num_tiles == 1 ? packed + AHEAD_NBYTES : packed + panel_nbytes + panel_nbytes * tile / num_tiles,
            .ahead_lines = PANEL_STEP_NBYTES / LINE / num_tiles,
            .bias = w->bias ? w->bias + out : NULL,
            .y = j->y + (first + row) * w->num_out + out,
            .y_stride = w->num_out,
            .columns = w->num_out - out < COLUMNS ? w->num_out - out : COLUMNS,
        };
        if (!j->with_tiles || count < AMX_LEAST_ROWS) {
            dots[count - 1](&p);
            continue;
        }
        const int64_t upper = count < TILE_ROWS ? count : TILE_ROWS;
        if (count != shaped) {
            shape_tiles(upper, count - upper);
            shaped = count;
        }
        (count > upper ? matrix_2 : matrix_1)(&p, upper, count - upper);
    }
    return shaped;
}

static void bf16_work(void *argument) {
    bf16_job *j = argument;
    int64_t shaped = 0;
    for (;;) {
        const int64_t item = __atomic_fetch_add(&j->next_item, 1, __ATOMIC_RELAXED);
        const int64_t first = item / j->num_groups * j->block_rows, group = item % j->num_groups;
        if (first >= j->num_rows) {
            break;
        }
        const int64_t rows = j->num_rows - first < j->block_rows ? j->num_rows - first : j->block_rows;
        const int64_t end = (group + 1) * j->panels_each < j->num_panels ? (group + 1) * j->panels_each : j->num_panels;
        for (int64_t panel = group * j->panels_each; panel < end; panel++) {
            shaped = block_times_panel(j, first, rows, panel, shaped);
        }
    }
    if (shaped) {
        release_tiles();
    }
}

enum { NONE, DOT, TILES };

/* Whether this processor and system have the instructions: NONE, DOT (AVX512_BF16) or TILES (and AMX). */
int32_t vattention_bf16_level(void) {
    unsigned a, b, c, d;
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) {
        return NONE;
    }
#if VATTENTION_AMX
    /* Linux gives tile registers to processes that ask: ARCH_REQ_XCOMP_PERM for state component 18. */
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1) &&
        syscall(SYS_arch_prctl, 0x1023, 18) == 0) {
        return TILES;
    }
#endif
    return DOT;
}

/* y[num_rows, num_out] = x[num_rows, num_in] W^T + b on at most `num_threads` threads, for one row or more.
 *
 * All are bfloat16 but the bias; rows of x lie `x_stride` numbers apart, those of y are adjacent. `level` is what
 * vattention_bf16_level returned, not NONE. Returns 0, or -1 where memory ran short, with y untouched. */
int32_t vattention_linear_bf16(const vattention_weight *weight, const void *x, int64_t x_stride, int64_t num_rows,
                               void *y, int32_t level, int32_t num_threads, parallel_fn parallel) {
    bf16_job j = {.weight = weight, .x = x, .y = y, .x_stride = x_stride, .num_rows = num_rows};
    j.with_tiles = level == TILES && num_rows >= AMX_LEAST_ROWS;
    j.tile_rows = j.with_tiles ? 2 * TILE_ROWS : DOT_ROWS;
    j.steps = (weight->num_in + STEP - 1) / STEP;
    uint16_t *padded = NULL;
    if (weight->num_in % STEP) {
        /* Zeros of the weight times what lies behind a row would not be zero for NaN. */
        j.x_stride = j.steps * STEP;
        padded = aligned_alloc(LINE, (size_t)(num_rows * j.x_stride) * 2);
        if (padded == NULL) {
            return -1;
        }
        for (int64_t row = 0; row < num_rows; row++) {
            uint16_t *out = padded + row * j.x_stride;
            memcpy(out, (const uint16_t *)x + row * x_stride, (size_t)weight->num_in * 2);
            memset(out + weight->num_in, 0, (size_t)(j.x_stride - weight->num_in) * 2);
        }
        j.x = padded;
    }
    int64_t most = BLOCK_NBYTES / (2 * STEP * j.steps);
    most = most > MAX_BLOCK_ROWS ? MAX_BLOCK_ROWS : most < MIN_BLOCK_ROWS ? MIN_BLOCK_ROWS : most;
    const int64_t num_blocks = (num_rows + most - 1) / most;
    j.block_rows = (num_rows + num_blocks - 1) / num_blocks;
    j.block_rows = (j.block_rows + j.tile_rows - 1) / j.tile_rows * j.tile_rows;
    j.num_panels = (weight->num_out + COLUMNS - 1) / COLUMNS;
    j.panels_each = j.num_panels / (16 * num_threads) + 1;
    j.num_groups = (j.num_panels + j.panels_each - 1) / j.panels_each;
    if (num_threads == 1 || num_rows * weight->num_out * weight->num_in < ALONE) {
        bf16_work(&j);
    } else {
        parallel(bf16_work, &j, (unsigned)num_threads, 0);
    }
    free(padded);
    return 0;
}

#else

int32_t vattention_bf16_level(void) { return 0; }

int32_t vattention_linear_bf16(const vattention_weight *weight, const void *x, int64_t x_stride, int64_t num_rows,
                               void *y, int32_t level, int32_t num_threads, parallel_fn parallel) {
    (void)weight, (void)x, (void)x_stride, (void)num_rows, (void)y, (void)level, (void)num_threads, (void)parallel;
    return -1;
}

#endif
