/* Tiles of y = x W^T + b for each instruction set, and the choice at run time; included by linear.c. */
#include "kernels.h"

#include <math.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* x is kept widened in blocks of rows, which shall stay in the second-level cache: strips of K_STRIP steps, each
 * [block rows][STRIP_STRIDE]. The padding spreads a tile's rows over the sets of the first-level cache; sums over
 * single strips are added up apart, which keeps rounding errors small. */
enum { K_STRIP = 256, STRIP_STRIDE = K_STRIP + 16 };

typedef struct {
    const float *widened; /* the tile's first row in the first strip, for tiles that take it so */
    int64_t strip_stride;
    const void *x; /* the tile's first row as it is, for the others */
    int64_t x_stride;
    int64_t rows;
    const void *panel;
    const char *lower; /* halves, in the format that has them */
    /* A tall block reads a panel from memory for its first tile only, and memory would idle over the others:
     * each fetches its share of the next panel. Alone this is worth 30 % at 8 to 16 rows. */
    const char *ahead;
    int64_t ahead_step; /* bytes, for each 128 of the panel */
    int first;
    const float *bias; /* 32 values, or NULL */
    void *y;
    int64_t y_stride;
    int64_t num_in;
    int64_t columns; /* of the 32 that exist */
    int32_t y_dtype;
} tile_args;

/* Most rows for which multiplying quantized panels as they are takes less time than unpacking them. */
enum { QUANTIZED_ROWS = 4, QUANTIZED_BATCH = 16 };

typedef void (*tile_fn)(const tile_args *);

typedef struct {
    const tile_fn *tiles; /* for one row and more; a single one for any number where `begin` is told of it */
    int64_t tile_rows;    /* most rows of a tile */
    int widens;           /* takes x as float32 */
    /* Takes quantized panels as they are, and x so: each GROUP of its numbers, or fewer, in a form of so many bytes. */
    void (*take)(const uint16_t *x, int64_t count, void *out);
    int64_t take_nbytes;
    void (*begin)(int64_t rows);
    void (*end)(void);
} tile_set;

/* The tiles are compiled once for each instruction set from one text; LANES is what a register holds. */
#ifdef HAVE_PAIRS
#include "linear_dot.h"
#endif
#ifdef HAVE_AVX512
#define SET avx512
#define LANES 16
#define TILE_ROWS 12
#define TARGET AVX512_TARGET
#include "linear_tile.h"
#endif
#ifdef HAVE_BYTES
#include "halves.h"
#include "quantized_few.h"
#endif
#ifdef HAVE_TILES
#include "quantized_amx.h"
#endif
#ifdef HAVE_AVX2
#define SET avx2
#define LANES 8
#define TILE_ROWS 6
#define TARGET AVX2_TARGET
#include "linear_tile.h"
#endif
#define SET baseline
#define LANES 4
#define TILE_ROWS 12
#define TARGET
#include "linear_tile.h"

/* The best this processor runs, found once as the library is loaded and never changed after: asking a virtual machine
 * takes microseconds. */
static struct {
    const tile_set *float32, *bfloat16; /* for any size */
    const tile_set *pairs, *tiles;      /* for bfloat16 of an even size, and of a multiple of TILE_STEPS; or NULL */
    const tile_set *few[4], *batch[4];  /* by format, for few rows of bfloat16, and for some more; or NULL */
} best = {.float32 = &float32_set_baseline, .bfloat16 = &bfloat16_set_baseline};

__attribute__((constructor)) static void find_best(void) {
#ifdef HAVE_AVX2
    if (has_avx2()) {
        best.float32 = &float32_set_avx2;
        best.bfloat16 = &bfloat16_set_avx2;
    }
#endif
#ifdef HAVE_AVX512
    if (has_avx512()) {
        best.float32 = &float32_set_avx512;
        best.bfloat16 = &bfloat16_set_avx512;
    }
#endif
#ifdef HAVE_PAIRS
    if (has_pairs()) {
        best.pairs = &dot_set;
#ifdef HAVE_TILES
        best.tiles = amx_granted() ? &amx_set : NULL;
#endif
    }
#endif
#ifdef HAVE_BYTES
    if (has_bytes()) {
        best.few[INT8] = &int8_set;
        best.few[INT4] = &int4_set;
        best.few[HALVES] = &halves_set;
    }
#endif
#ifdef HAVE_TILES
    if (has_bytes() && best.tiles) {
        best.batch[INT8] = &int8_batch_set;
        best.batch[INT4] = &int4_batch_set;
        best.batch[HALVES] = &halves_batch_set;
    }
#endif
}

static const tile_set *set_for(const vattention_weight *weight, int64_t num_rows) {
    const int64_t num_in = weight->num_in;
    if (weight->dtype == FLOAT32) {
        return best.float32;
    }
    if (num_rows <= QUANTIZED_ROWS && best.few[weight->format]) {
        return best.few[weight->format];
    }
    if (num_rows <= QUANTIZED_BATCH && best.batch[weight->format]) {
        return best.batch[weight->format];
    }
    if (best.tiles && num_in % TILE_STEPS == 0) {
        return best.tiles;
    }
    if (best.pairs && num_in % 2 == 0) {
        return best.pairs;
    }
    /* Quantized numbers are best widened at once. */
    return weight->format == PLAIN ? best.bfloat16 : best.float32;
}
