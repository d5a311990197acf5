/* What screens share: rows of x in bytes, and bounds of products, from which candidates follow. */
#ifndef VATTENTION_SCREEN_H
#define VATTENTION_SCREEN_H

#include "kernels.h"

#include <math.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__x86_64__) && VATTENTION_LANES >= 16 && VATTENTION_DOT && (defined(__clang__) || __GNUC__ >= 11)
#define HAVE_SCREEN
#endif

#ifdef HAVE_SCREEN
#define SCREEN_TARGET \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-int8,avx2,fma")))

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

struct screening {
    const vattention_screen *screen;
    screen_fn by_vectors, by_tiles;
    const int8_t *rows; /* [2 * num_rows, 4 * steps]: a row's upper bytes, then its lower ones */
    const float *factors, *norms;
    int64_t num_rows, num_panels, panels_each;
    float *upper; /* [num_rows, num_panels] */
    float *lower; /* [threads, num_rows] */
    int64_t next_thread, next_item; /* taken atomically */
};

/* One row's bounds in one panel, from its products and what they may be off by. */
SCREEN_TARGET INLINE void bound(const screening *s, int64_t row, int64_t panel, const __m512 *value, const __m512 *error,
                                float *lower) {
    const int64_t left = s->screen->num_out - panel * COLUMNS;
    const __mmask32 exists = left >= COLUMNS ? 0xffffffffu : (1u << left) - 1;
    float most = -INFINITY;
    for (int half = 0; half < 2; half++) {
        const __mmask16 mask = (__mmask16)(exists >> (half * HALF));
        const float above = _mm512_mask_reduce_max_ps(mask, _mm512_add_ps(value[half], error[half]));
        const float below = _mm512_mask_reduce_max_ps(mask, _mm512_sub_ps(value[half], error[half]));
        /* NaN is no bound, and keeps the panel. */
        most = above <= most ? most : above;
        lower[row] = below > lower[row] ? below : lower[row];
    }
    s->upper[row * s->num_panels + panel] = most;
}
#endif

#endif
