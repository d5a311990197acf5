/* What screens share: rows of x in bytes, and bounds of products, from which candidates follow. */
#ifndef VATTENTION_SCREEN_H
#define VATTENTION_SCREEN_H

#include "kernels.h"

#include <math.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* Some of it is for matrix tiles, which fewer compilers know than bytes. */
#if defined(HAVE_BYTES) && (defined(__clang__) || __GNUC__ >= 11)
#define HAVE_SCREEN
#endif

#ifdef HAVE_SCREEN
#define SCREEN_TARGET \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-int8,avx2,fma")))

#define SET screen
#define LANES 16
#define TARGET SCREEN_TARGET
#include "gumbel.h"

/* Steps of the inner dimension that one instruction takes at once. */
enum { STEP = 4 };
/* Rows of x taken together: by matrix tiles and by vectors. */
enum { TILE_TOKENS = 16, VECTOR_TOKENS = 4 };
/* Numbers so small that their products may be subnormal, which the processor takes for zero in one way of computing
 * and not in the other; and so large that products may overflow. Neither is found in a model that works. */
static const float SMALLEST = 1e-15f, LARGEST = 1e15f;

typedef struct screening screening;

/* Finds the bounds of rows [first, first + count) in one panel; `lower` is the thread's own. */
typedef void (*screen_fn)(const screening *s, int64_t first, int64_t count, int64_t panel, float *lower);

/* A group of a row of x, in whole numbers. */
typedef struct {
    float unit, norm; /* of its numbers, and their length */
    /* Where these are not in the screen's errors: the length of what the numbers are off by, and the sum of the sizes of
     * those that are not in `norm`. */
    float rest, outliers;
    float sum; /* of the whole numbers, where that is exact */
} screen_group;

/* Makes bytes of a group of numbers, the rest of which are zeros: `rows` are those of a row of x, `width` bytes apart.
 * Returns 0 where the numbers are of no use for bounds. */
typedef int (*split_fn)(const uint16_t *x, int64_t count, int8_t *rows, int64_t width, screen_group *group);

/* A way to screen. */
typedef struct {
    screen_fn by_vectors, by_tiles;
    split_fn split;
    void (*pack)(void *job); /* a thread's share of the making, for a screen_pack_job */
    int64_t group;     /* steps of x that share a unit, or 0 for all */
    int64_t num_bytes; /* of a number of x */
} screen_kind;

/* That of weights in bfloat16, and that of those in halves. */
extern const screen_kind vattention_bytes, vattention_halves;

struct screening {
    const vattention_screen *screen;
    const vattention_weight *weight;
    const screen_kind *kind;
    const int8_t *rows; /* [num_rows, bytes of a number, 4 * steps], upper bytes first */
    const screen_group *groups; /* [num_rows, num_groups] */
    const vattention_noise *noise; /* of each row, or NULL */
    int64_t num_groups, num_rows, num_panels, panels_each;
    float *upper; /* [num_rows, num_panels] */
    float *lower; /* [threads, num_rows] */
    int64_t next_thread, next_item; /* taken atomically */
};

/* The making of a screen. */
typedef struct {
    const vattention_weight *weight;
    const vattention_screen *screen;
    int64_t next; /* panel, taken atomically */
    int32_t bad;
} screen_pack_job;

/* The largest of some numbers and the sum of their squares; 0 where they are of no use for bounds. */
INLINE int measure(const uint16_t *x, int64_t count, float *most, double *squares) {
    *most = 0.0f;
    *squares = 0.0;
    for (int64_t k = 0; k < count; k++) {
        const float value = widened(x[k]);
        *most = fabsf(value) > *most ? fabsf(value) : *most;
        *squares += (double)value * value;
    }
    return *squares < (double)LARGEST * LARGEST && !(*most > 0.0f && *most < SMALLEST);
}

/* One row's bounds in one panel, from its products and what they may be off by. Rounding keeps order, so those of a product
 * are also its bounds after noise is added to all of them. */
SCREEN_TARGET INLINE void bound(const screening *s, int64_t row, int64_t panel, const __m512 *value, const __m512 *error,
                                float *lower) {
    const int64_t left = s->screen->num_out - panel * COLUMNS;
    const __mmask32 exists = left >= COLUMNS ? 0xffffffffu : (1u << left) - 1;
    const vattention_noise *noise = s->noise && s->noise[row].temperature > 0.0f ? &s->noise[row] : NULL;
    const __m512 none = _mm512_set1_ps(-INFINITY);
    float *upper = &s->upper[row * s->num_panels + panel];
    __m512 high[2], low[2];
    for (int half = 0; half < 2; half++) {
        const __mmask16 mask = (__mmask16)(exists >> (half * HALF));
        high[half] = _mm512_mask_add_ps(none, mask, value[half], error[half]);
        low[half] = _mm512_mask_sub_ps(none, mask, value[half], error[half]);
    }
    *upper = _mm512_reduce_max_ps(_mm512_max_ps(high[0], high[1]));
    if (noise) {
        const int32_t zeros = gumbel_zeros(*upper, lower[row], noise->temperature);
        const __m512i left_of_zeros = _mm512_set1_epi32((int32_t)(UINT64_C(0xffffffff) >> zeros));
        const hashes_screen hash[2] = {hash_screen(noise, panel * COLUMNS), hash_screen(noise, panel * COLUMNS + HALF)};
        if (zeros == GUMBEL_ZEROS || !(_mm512_cmple_epu32_mask((__m512i)hash[0], left_of_zeros) |
                                       _mm512_cmple_epu32_mask((__m512i)hash[1], left_of_zeros))) {
            *upper = -INFINITY;
            return;
        }
        for (int half = 0; half < 2; half++) {
            const __m512 own = (__m512)noise_screen(noise, hash[half]);
            high[half] = _mm512_add_ps(high[half], own);
            low[half] = _mm512_add_ps(low[half], own);
        }
        *upper = _mm512_reduce_max_ps(_mm512_max_ps(high[0], high[1]));
    }
    if (!(*upper <= lower[row])) {
        const float below = _mm512_reduce_max_ps(_mm512_max_ps(low[0], low[1]));
        lower[row] = below > lower[row] ? below : lower[row];
    }
}
#endif

#endif
