/* y = x W^T + b for weights kept in bfloat16 (or float32, or quantized), summed in float32.
 *
 * The weight is read once, as it is stored. Where the processor has matrix tiles (AMX) or multiplies pairs of bfloat16,
 * those do the work (linear_dot.h); elsewhere a bfloat16, the upper half of a float32, is widened in registers by
 * a shift or a mask (linear_tile.h), where libraries that emulate bfloat16 are six times slower than float32.
 *
 * Packed weight: panels of 32 output columns, the last one padded with zeros. In a float32 panel, step k of the inner
 * dimension holds the 32 weights W[32p .. 32p+31, k]. A bfloat16 panel takes two steps at once: word i (of 32) of pair
 * k holds W[32p + i, 2k] in its lower half and W[32p + i, 2k + 1], or zero where there is none, in its upper half. The
 * loops are those of K. Goto and R. van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008): a tile
 * of y stays in registers over the whole inner dimension, a panel of W in the second-level cache over a block of rows.
 */
#define _GNU_SOURCE
#include "kernels.h"
#include "largest.h"
#include "linear_sets.h"
#include "runs.h"

#include <stdlib.h>
#include <string.h>

/* Rows of x that are multiplied together shall stay in the second-level cache. */
enum { BLOCK_NBYTES = 3 << 18, MIN_BLOCK_ROWS = 24, MAX_BLOCK_ROWS = 96, WHOLE_BLOCK_ROWS = 256 };

/* Numbers that are written as bits and read as float32. */
typedef uint32_t word __attribute__((may_alias));

/* Multiplications below which waking the other threads takes longer than they save. */
enum { ALONE = 1 << 16 };

int vattention_has_tiles(void) { return best.tiles ? 2 : best.pairs ? 1 : 0; }

void vattention_tiles_begin(int64_t rows) { best.tiles->begin(rows); }

void vattention_tiles_end(void) { best.tiles->end(); }

typedef struct {
    const vattention_weight *weight;
    const void *x;
    void *y;
    int64_t y_stride;
    int32_t y_dtype;
    float *workspace; /* one thread's after the other's: x widened, a panel unpacked, a part of y */
    int64_t workspace_floats, widened_floats; /* of one thread */
    int unpacks; /* a quantized panel, to multiply it */
    int64_t x_stride, num_rows, block_rows;
    const tile_set *set;
    vattention_best *winners; /* [threads, num_rows], or NULL where y is wanted */
    const vattention_noise *noise; /* of each row, or NULL */
    const int32_t *panels; /* those to compute, or NULL for all */
    int64_t num_panels;
    items items; /* blocks of rows times panels */
} job;

static int64_t num_groups(int64_t num_in) { return (num_in + GROUP - 1) / GROUP; }

/* Rows as the tiles take them, group after group. */
static void take(const job *j, int64_t first, int64_t rows, char *out) {
    const int64_t num_in = j->weight->num_in;
    for (int64_t m = 0; m < rows; m++) {
        const uint16_t *x = (const uint16_t *)j->x + (first + m) * j->x_stride;
        for (int64_t start = 0; start < num_in; start += GROUP, out += j->set->take_nbytes) {
            j->set->take(x + start, num_in - start, out);
        }
    }
}

static int64_t num_strips(int64_t num_in) { return (num_in + K_STRIP - 1) / K_STRIP; }

/* Rows as float32 in strips; an odd number of bfloat16 gets a zero to make it even. */
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
                words[steps] = 0;
            }
        }
    }
}

/* The rows of one block times one panel, to y[rows, 32]. */
static void panel_times(const job *j, int64_t first, int64_t rows, int64_t panel, const float *widened, float *unpacked,
                        char *y, int64_t *configured) {
    const vattention_weight *w = j->weight;
    const int64_t element = w->dtype == FLOAT32 ? 4 : 2, y_element = j->y_dtype == FLOAT32 ? 4 : 2;
    const int64_t out = panel * COLUMNS, most = j->set->tile_rows;
    const int64_t panel_nbytes = vattention_panel_nbytes(w);
    const int64_t num_tiles = (rows + most - 1) / most;
    const int64_t taken_nbytes = num_groups(w->num_in) * j->set->take_nbytes;
    const char *packed = (const char *)w->packed + panel * panel_nbytes;
    if (j->unpacks) {
        vattention_unpack(w, panel, j->set->widens ? FLOAT32 : BFLOAT16, unpacked);
        packed = (const char *)unpacked;
    }
    tile_args args = {
        .strip_stride = j->block_rows * STRIP_STRIDE,
        .x_stride = j->x_stride,
        .panel = packed,
        .lower = vattention_lower_halves(w, panel),
        .ahead_step = j->unpacks ? 0 : COLUMNS * 4 / num_tiles,
        .bias = w->bias ? w->bias + out : NULL,
        .y_stride = j->y_stride,
        .num_in = w->num_in,
        .columns = w->num_out - out < COLUMNS ? w->num_out - out : COLUMNS,
        .y_dtype = j->y_dtype,
    };
    for (int64_t tile = 0; tile < num_tiles; tile++) {
        /* Tiles of nearly equal height, but whole ones first where each height has its price. */
        const int64_t row = j->set->begin ? tile * most : rows * tile / num_tiles;
        const int64_t end = j->set->begin ? (row + most < rows ? row + most : rows) : rows * (tile + 1) / num_tiles;
        args.rows = end - row;
        args.first = tile == 0 && !j->unpacks;
        args.widened = j->set->take ? (const float *)((const char *)widened + row * taken_nbytes)
                                    : widened + row * STRIP_STRIDE;
        args.x = (const char *)j->x + (first + row) * j->x_stride * element;
        args.ahead = packed + panel_nbytes + panel_nbytes * tile / num_tiles;
        args.y = y + row * j->y_stride * y_element;
        if (j->set->begin && *configured != args.rows) {
            j->set->begin(args.rows);
            *configured = args.rows;
        }
        j->set->tiles[j->set->begin ? 0 : args.rows - 1](&args);
    }
}

/* What a thread's first panel begins with, while its rows are made ready. */
static void fetch_first(const job *j, int64_t item) {
    if (item >= 0) {
        const int64_t i = item % j->num_panels, panel = j->panels ? j->panels[i] : i;
        const char *packed = (const char *)j->weight->packed + panel * vattention_panel_nbytes(j->weight);
        for (int64_t at = 0; at < AHEAD; at += LINE) {
            __builtin_prefetch(packed + at, 0, 3);
        }
    }
}

/* A thread's share: items, each a block of rows times a panel, until none is left. Threads that run late, because other
 * processes hold their cores, take fewer. */
static void work(void *argument) {
    job *j = argument;
    const int64_t num_out = j->weight->num_out;
    const int64_t y_element = j->y_dtype == FLOAT32 ? 4 : 2;
    item_taker taker = items_join(&j->items);
    float *own = j->workspace + j->workspace_floats * taker.thread;
    float *x = j->set->widens || j->set->take ? own : NULL, *unpacked = own + j->widened_floats;
    float *part = j->winners ? own + j->workspace_floats - j->block_rows * j->y_stride : NULL;
    int64_t block_in_x = -1, configured = 0;
    fetch_first(j, items_foresee(&j->items, &taker));
    for (int64_t item; (item = items_take(&j->items, &taker)) >= 0;) {
        const int64_t block = item / j->num_panels, i = item % j->num_panels;
        const int64_t first = block * j->block_rows;
        const int64_t rows = j->num_rows - first < j->block_rows ? j->num_rows - first : j->block_rows;
        if (x && block != block_in_x) {
            if (j->set->take) {
                take(j, first, rows, (char *)x);
            } else {
                widen(j, first, rows, x);
            }
            block_in_x = block;
        }
        const int64_t panel = j->panels ? j->panels[i] : i, column = panel * COLUMNS;
        if (part) {
            panel_times(j, first, rows, panel, x, unpacked, (char *)part, &configured);
            vattention_compete(j->winners + taker.thread * j->num_rows + first, part, j->y_stride, rows, column,
                               num_out - column < COLUMNS ? num_out - column : COLUMNS,
                               j->noise ? j->noise + first : NULL);
        } else {
            panel_times(j, first, rows, panel, x, unpacked, (char *)j->y + (first * num_out + column) * y_element,
                        &configured);
        }
    }
    if (configured) {
        j->set->end();
    }
}

/* Cuts the work into items and has it done. */
static int32_t run(job *j, int32_t num_threads, parallel_fn parallel) {
    const vattention_weight *weight = j->weight;
    j->set = set_for(weight, j->num_rows);
    j->unpacks = weight->format != PLAIN && !j->set->take;
    int64_t most = (j->set->widens ? BLOCK_NBYTES / 4 : BLOCK_NBYTES / 2) / weight->num_in;
    most = !j->set->widens && most < WHOLE_BLOCK_ROWS ? WHOLE_BLOCK_ROWS : most;
    most = j->set->widens && most > MAX_BLOCK_ROWS ? MAX_BLOCK_ROWS : most < MIN_BLOCK_ROWS ? MIN_BLOCK_ROWS : most;
    int64_t num_blocks = (j->num_rows + most - 1) / most;
    j->block_rows = (j->num_rows + num_blocks - 1) / num_blocks;
    if (num_blocks > 1) {
        j->block_rows = (j->block_rows + j->set->tile_rows - 1) / j->set->tile_rows * j->set->tile_rows;
        /* Blocks that grew may be fewer. */
        num_blocks = (j->num_rows + j->block_rows - 1) / j->block_rows;
    }
    if (j->panels == NULL) {
        j->num_panels = (weight->num_out + COLUMNS - 1) / COLUMNS;
    }
    items_begin(&j->items, num_blocks * j->num_panels, num_threads);
    j->widened_floats = j->set->widens ? num_strips(weight->num_in) * j->block_rows * STRIP_STRIDE : 0;
    if (j->set->take) {
        j->widened_floats = (num_groups(weight->num_in) * j->block_rows * j->set->take_nbytes + 63) / 64 * 16;
    }
    const int64_t unpacked_floats = j->unpacks ? num_groups(weight->num_in) * GROUP * COLUMNS : 0;
    const int64_t part_floats = j->winners ? j->block_rows * j->y_stride : 0;
    j->workspace_floats = (j->widened_floats + unpacked_floats + part_floats + 15) / 16 * 16;
    if (j->workspace_floats > 0) {
        j->workspace = aligned_alloc(64, (size_t)(num_threads * j->workspace_floats) * sizeof(float));
        if (j->workspace == NULL) {
            return -1;
        }
    }
    if (num_threads == 1 || j->num_rows * weight->num_out * weight->num_in < ALONE) {
        work(j);
    } else {
        parallel(work, j, (unsigned)num_threads, 0);
    }
    free(j->workspace);
    return 0;
}

/* y[num_rows, num_out] = x[num_rows, num_in] W^T + b on at most `num_threads` threads, for one row or more.
 *
 * x is of the weight's type and y of `y_dtype`, which is that or float32; rows of x lie `x_stride` elements apart, those
 * of y are adjacent. Returns 0, or -1 where memory ran short, with y untouched. */
int32_t vattention_linear(const vattention_weight *weight, const void *x, int64_t x_stride, int64_t num_rows, void *y,
                          int32_t y_dtype, int32_t num_threads, parallel_fn parallel) {
    if (num_rows >= TALL && vattention_can_tall(weight)) {
        void *workspace = aligned_alloc(64, (size_t)vattention_tall_nbytes(weight, num_rows, 0, num_threads));
        if (workspace == NULL) {
            return -1;
        }
        vattention_tall(weight, x, x_stride, num_rows, y, y_dtype, NULL, workspace, num_threads, parallel);
        free(workspace);
        return 0;
    }
    job j = {.weight = weight, .x = x, .y = y, .y_stride = weight->num_out, .y_dtype = y_dtype, .x_stride = x_stride};
    j.num_rows = num_rows;
    return run(&j, num_threads, parallel);
}

/* Each row's first largest number of y = x W^T + b, NaN counting as largest: its column, and itself in float32.
 *
 * `noise` is one for each row, added before, or NULL. `panels` are the numbers of those in which to look, in ascending
 * order, or NULL for all. y is never whole in memory.
 * Otherwise as above. */
int32_t vattention_largest(const vattention_weight *weight, const int32_t *panels, int64_t num_panels, const void *x,
                           int64_t x_stride, int64_t num_rows, const vattention_noise *noise, int64_t *columns,
                           float *values, int32_t num_threads, parallel_fn parallel) {
    job j = {.weight = weight, .x = x, .y_stride = COLUMNS, .y_dtype = FLOAT32, .x_stride = x_stride, .noise = noise};
    j.num_rows = num_rows;
    j.panels = panels;
    j.num_panels = num_panels;
    j.winners = vattention_no_winners(num_threads * num_rows);
    if (j.winners == NULL) {
        return -1;
    }
    const int32_t status = run(&j, num_threads, parallel);
    if (status == 0) {
        vattention_agree(j.winners, num_threads, num_rows, columns, values);
    }
    free(j.winners);
    return status;
}
