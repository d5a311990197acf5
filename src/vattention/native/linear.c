/* y = x W^T + b for weights kept in bfloat16 (or float32), computed in float32.
 *
 * Processors without bfloat16 arithmetic multiply bfloat16 six times slower than float32 when a library
 * emulates it. A bfloat16 is the upper half of a float32, so widening one costs a shift or a mask. Here the
 * weight is read once, as it is stored, and widened in registers beside the multiplication.
 *
 * Packed weight: panels of 32 output columns, the last one padded with zeros. In a panel, step k of the inner
 * dimension holds the 32 weights W[32p .. 32p+31, k]. In bfloat16 word i (of 16) has column i in its lower half
 * and column 16 + i in its upper half; in float32 columns lie in order. The loops are those of K. Goto and
 * R. van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008): a tile of y stays in registers
 * over the whole inner dimension, a panel of W in the second-level cache over a block of rows.
 */
#include "common.h"

#include <stdlib.h>
#include <string.h>

enum { COLUMNS = 32, HALF = 16 };
/* x is kept widened in blocks of rows, which shall stay in the second-level cache: strips of K_STRIP steps, each
 * [block rows][STRIP_STRIDE]. The padding spreads a tile's rows over the sets of the first-level cache; sums over
 * single strips are added up apart, which keeps rounding errors small. */
enum { K_STRIP = 256, STRIP_STRIDE = K_STRIP + 16 };
enum { BLOCK_NBYTES = 3 << 18, MIN_BLOCK_ROWS = 24, MAX_BLOCK_ROWS = 96 };

/* Numbers that are written as bits and read as float32. */
typedef uint32_t word __attribute__((may_alias));

typedef struct {
    const void *packed;
    const float *bias; /* or NULL */
    int64_t num_out;
    int64_t num_in;
    int32_t dtype;
} vattention_weight;

typedef struct {
    const float *x; /* the tile's first row in the first strip */
    int64_t x_strip;
    const void *panel;
    /* A tall block reads a panel from memory for its first tile only, and memory would idle over the others:
     * each fetches its share of the next panel. Alone this is worth 30 % at 8 to 16 rows. */
    const char *ahead;
    int64_t ahead_step;
    const float *bias; /* 32 values, or NULL */
    void *y;
    int64_t y_stride;
    int64_t num_in;
    int64_t columns; /* of the 32 that exist */
    int32_t dtype;
} tile_args;

/* Multiplications below which waking the other threads takes longer than they save. */
enum { ALONE = 1 << 16 };

typedef void (*tile_fn)(const tile_args *);

/* The tiles are compiled once for each instruction set from one text; LANES is what a register holds. */
#if defined(__x86_64__) && VATTENTION_LANES >= 16
#define SET avx512
#define LANES 16
#define TILE_ROWS 12
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx2,fma")))
#include "linear_tile.h"
#endif
#if defined(__x86_64__) && VATTENTION_LANES >= 8
#define SET avx2
#define LANES 8
#define TILE_ROWS 6
#define TARGET __attribute__((target("avx2,fma")))
#include "linear_tile.h"
#endif
#define SET baseline
#define LANES 4
#define TILE_ROWS 12
#define TARGET
#include "linear_tile.h"

/* The best tiles this processor runs, and the rows of the tallest. */
static const tile_fn *find_tiles(int32_t dtype, int64_t *tile_rows) {
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
#if defined(__x86_64__) && VATTENTION_LANES >= 16
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
        *tile_rows = 12;
        return tiles_avx512[dtype];
    }
#endif
#if defined(__x86_64__) && VATTENTION_LANES >= 8
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        *tile_rows = 6;
        return tiles_avx2[dtype];
    }
#endif
    *tile_rows = 12;
    return tiles_baseline[dtype];
}

typedef struct {
    const vattention_weight *weight;
    const void *x;
    void *y;
    float *workspace; /* one thread's after the other's */
    int64_t workspace_floats; /* of one thread */
    int64_t x_stride, num_rows, block_rows, num_blocks, panels_each, num_groups;
    int64_t tile_rows;
    const tile_fn *tiles;
    int64_t next_thread, next_item; /* taken atomically */
} job;

static int64_t num_strips(int64_t num_in) { return (num_in + K_STRIP - 1) / K_STRIP; }

static void widen(const job *j, int64_t first, int64_t rows, float *out) {
    const int64_t num_in = j->weight->num_in;
    for (int64_t start = 0; start < num_in; start += K_STRIP, out += j->block_rows * STRIP_STRIDE) {
        const int64_t steps = num_in - start < K_STRIP ? num_in - start : K_STRIP;
        for (int64_t m = 0; m < rows; m++) {
            const int64_t offset = (first + m) * j->x_stride + start;
            if (j->weight->dtype == FLOAT32) {
                memcpy(out + m * STRIP_STRIDE, (const float *)j->x + offset, steps * sizeof(float));
            } else {
                const uint16_t *x = (const uint16_t *)j->x + offset;
                word *words = (word *)(out + m * STRIP_STRIDE);
                for (int64_t k = 0; k < steps; k++) {
                    words[k] = (word)x[k] << 16;
                }
            }
        }
    }
}

/* A thread's share: items, each a block of rows times a group of panels, until none is left. Threads that run
 * late, because other processes hold their cores, take fewer. */
static void work(void *argument) {
    job *j = argument;
    const vattention_weight *w = j->weight;
    const int64_t element = w->dtype == FLOAT32 ? 4 : 2;
    const int64_t num_panels = (w->num_out + COLUMNS - 1) / COLUMNS;
    float *x = j->workspace + j->workspace_floats * __atomic_fetch_add(&j->next_thread, 1, __ATOMIC_RELAXED);
    int64_t block_in_x = -1;
    for (;;) {
        const int64_t item = __atomic_fetch_add(&j->next_item, 1, __ATOMIC_RELAXED);
        const int64_t block = item / j->num_groups, group = item % j->num_groups;
        if (block >= j->num_blocks) {
            return;
        }
        const int64_t first = block * j->block_rows;
        const int64_t rows = j->num_rows - first < j->block_rows ? j->num_rows - first : j->block_rows;
        if (block != block_in_x) {
            widen(j, first, rows, x);
            block_in_x = block;
        }
        const int64_t num_tiles = (rows + j->tile_rows - 1) / j->tile_rows;
        const int64_t last_panel = (group + 1) * j->panels_each < num_panels ? (group + 1) * j->panels_each : num_panels;
        for (int64_t panel = group * j->panels_each; panel < last_panel; panel++) {
            const int64_t out = panel * COLUMNS;
            for (int64_t tile = 0; tile < num_tiles; tile++) {
                const int64_t row = rows * tile / num_tiles, end = rows * (tile + 1) / num_tiles;
                const char *packed = (const char *)w->packed + out * w->num_in * element;
                const int64_t panel_nbytes = COLUMNS * w->num_in * element;
                const tile_args args = {
                    .x = x + row * STRIP_STRIDE,
                    .x_strip = j->block_rows * STRIP_STRIDE,
                    .panel = packed,
                    .ahead = packed + panel_nbytes + panel_nbytes * tile / num_tiles,
                    .ahead_step = COLUMNS * element / num_tiles,
                    .bias = w->bias ? w->bias + out : NULL,
                    .y = (char *)j->y + ((first + row) * w->num_out + out) * element,
                    .y_stride = w->num_out,
                    .num_in = w->num_in,
                    .columns = w->num_out - out < COLUMNS ? w->num_out - out : COLUMNS,
                    .dtype = w->dtype,
                };
                j->tiles[end - row - 1](&args);
            }
        }
    }
}

/* y[num_rows, num_out] = x[num_rows, num_in] W^T + b on at most `num_threads` threads, for one row or more.
 *
 * x and y are of the weight's type; rows of x lie `x_stride` elements apart, those of y are adjacent. Returns 0,
 * or -1 where memory ran short, with y untouched. */
int32_t vattention_linear(const vattention_weight *weight, const void *x, int64_t x_stride, int64_t num_rows, void *y,
                          int32_t num_threads, parallel_fn parallel) {
    job j = {.weight = weight, .x = x, .y = y, .x_stride = x_stride, .num_rows = num_rows};
    j.tiles = find_tiles(weight->dtype, &j.tile_rows);
    int64_t most = BLOCK_NBYTES / (4 * weight->num_in);
    most = most > MAX_BLOCK_ROWS ? MAX_BLOCK_ROWS : most < MIN_BLOCK_ROWS ? MIN_BLOCK_ROWS : most;
    j.num_blocks = (num_rows + most - 1) / most;
    j.block_rows = (num_rows + j.num_blocks - 1) / j.num_blocks;
    if (j.num_blocks > 1) {
        j.block_rows = (j.block_rows + j.tile_rows - 1) / j.tile_rows * j.tile_rows;
    }
    const int64_t num_panels = (weight->num_out + COLUMNS - 1) / COLUMNS;
    j.panels_each = num_panels / (16 * num_threads) + 1;
    j.num_groups = (num_panels + j.panels_each - 1) / j.panels_each;
    j.workspace_floats = num_strips(weight->num_in) * j.block_rows * STRIP_STRIDE;
    j.workspace = aligned_alloc(64, (size_t)(num_threads * j.workspace_floats) * sizeof(float));
    if (j.workspace == NULL) {
        return -1;
    }
    if (num_threads == 1 || num_rows * weight->num_out * weight->num_in < ALONE) {
        work(&j);
    } else {
        parallel(work, &j, (unsigned)num_threads, 0);
    }
    free(j.workspace);
    return 0;
}
