/* The screen of a weight in bfloat16: a copy in 8 bits, and what is known of it. Rows of x are taken in 16 bits, as two rows
 * of 8.
 *
 * The copy: panels of 32 columns as in linear.c, but four steps of the inner dimension at once, [panels, steps, 32, 4],
 * padded with zeros.
 */
#include "screen.h"

#include <string.h>

#ifdef HAVE_SCREEN
/* One row's bounds in one panel, from the products of its upper and its lower bytes. */
SCREEN_TARGET INLINE void judge(const screening *j, int64_t row, int64_t panel, const __m512i *high, const __m512i *low,
                                float *lower) {
    const vattention_screen *s = j->screen;
    __m512 value[2], error[2];
    for (int half = 0; half < 2; half++) {
        const int64_t at = panel * COLUMNS + half * HALF;
        const __m512 sums = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high[half]), _mm512_set1_ps(256.0f),
                                            _mm512_cvtepi32_ps(low[half]));
        value[half] = _mm512_mul_ps(sums, _mm512_mul_ps(_mm512_loadu_ps(s->scales + at),
                                                        _mm512_set1_ps(j->groups[row].unit)));
        error[half] = _mm512_mul_ps(_mm512_loadu_ps(s->errors + at), _mm512_set1_ps(j->groups[row].norm));
    }
    bound(j, row, panel, value, error, lower);
}

/* `count` is a constant wherever this is inlined. */
SCREEN_TARGET INLINE void vectors(const screening *j, int64_t first, const int count, int64_t panel, float *lower) {
    const vattention_screen *s = j->screen;
    const int64_t width = s->num_steps * STEP;
    const int8_t *numbers = s->numbers + panel * COLUMNS * width;
    const __m512i offset = _mm512_set1_epi8((char)0x80);
    __m512i sums[2 * VECTOR_TOKENS][2];
#pragma GCC unroll 8
    for (int m = 0; m < 2 * count; m++) {
        sums[m][0] = sums[m][1] = _mm512_setzero_si512();
    }
    for (int64_t step = 0; step < s->num_steps; step++, numbers += COLUMNS * STEP) {
        _mm_prefetch((const char *)numbers + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)numbers + AHEAD + 64, _MM_HINT_T0);
        const __m512i left = _mm512_loadu_si512(numbers), right = _mm512_loadu_si512(numbers + HALF * STEP);
#pragma GCC unroll 8
        for (int m = 0; m < 2 * count; m++) {
            int32_t four;
            memcpy(&four, j->rows + (2 * first + m) * width + step * STEP, sizeof(four));
            /* The instruction wants its first factor without a sign. */
            const __m512i x = _mm512_xor_si512(_mm512_set1_epi32(four), offset);
            sums[m][0] = _mm512_dpbusd_epi32(sums[m][0], x, left);
            sums[m][1] = _mm512_dpbusd_epi32(sums[m][1], x, right);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < 2 * count; m++) {
        for (int half = 0; half < 2; half++) {
            const __m512i own = _mm512_loadu_si512(s->sums + panel * COLUMNS + half * HALF);
            sums[m][half] = _mm512_sub_epi32(sums[m][half], _mm512_slli_epi32(own, 7));
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < count; m++) {
        judge(j, first + m, panel, sums[2 * m], sums[2 * m + 1], lower);
    }
}

SCREEN_TARGET static void by_vectors(const screening *j, int64_t first, int64_t count, int64_t panel, float *lower) {
    switch (count) {
    case 1:
        vectors(j, first, 1, panel, lower);
        break;
    case 2:
        vectors(j, first, 2, panel, lower);
        break;
    case 3:
        vectors(j, first, 3, panel, lower);
        break;
    default:
        vectors(j, first, VECTOR_TOKENS, panel, lower);
    }
}

SCREEN_TARGET static void by_tiles(const screening *j, int64_t first, int64_t count, int64_t panel, float *lower) {
    const vattention_screen *s = j->screen;
    const int64_t width = s->num_steps * STEP;
    const int8_t *numbers = s->numbers + panel * COLUMNS * width, *x = j->rows + 2 * first * width;
    int32_t sums[2 * TILE_TOKENS * COLUMNS] __attribute__((aligned(64)));
    TILES_READ_MEMORY;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < s->num_steps; step += 16, numbers += 16 * COLUMNS * STEP, x += 16 * STEP) {
        for (int line = 0; line < 32; line++) {
            _mm_prefetch((const char *)numbers + AHEAD + 64 * line, _MM_HINT_T0);
        }
        _tile_loadd(4, x, width);
        _tile_loadd(6, numbers, COLUMNS * STEP);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, numbers + HALF * STEP, COLUMNS * STEP);
        _tile_dpbssd(1, 4, 7);
        if (count > TILE_TOKENS / 2) {
            _tile_loadd(5, x + 16 * width, width);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
    }
    _tile_stored(0, sums, COLUMNS * 4);
    _tile_stored(1, sums + HALF, COLUMNS * 4);
    if (count > TILE_TOKENS / 2) {
        _tile_stored(2, sums + 16 * COLUMNS, COLUMNS * 4);
        _tile_stored(3, sums + 16 * COLUMNS + HALF, COLUMNS * 4);
    }
    for (int64_t m = 0; m < count; m++) {
        const int32_t *own = sums + 2 * m * COLUMNS;
        const __m512i high[2] = {_mm512_load_si512(own), _mm512_load_si512(own + HALF)};
        const __m512i low[2] = {_mm512_load_si512(own + COLUMNS), _mm512_load_si512(own + COLUMNS + HALF)};
        judge(j, first + m, panel, high, low, lower);
    }
}

/* In 16 bits. */
static int split(const uint16_t *x, int64_t count, int8_t *rows, int64_t width, screen_group *group) {
    float most;
    double squares;
    if (!measure(x, count, &most, &squares)) {
        return 0;
    }
    const float factor = most > 0.0f ? 32512.0f / most : 0.0f;
    *group = (screen_group){.unit = most / 32512.0f, .norm = (float)sqrt(squares) * 1.00001f};
    for (int64_t k = 0; k < count; k++) {
        const int32_t number = (int32_t)lrintf(widened(x[k]) * factor);
        const int32_t upper = (number + 128) >> 8;
        rows[k] = (int8_t)upper;
        rows[width + k] = (int8_t)(number - 256 * upper);
    }
    return 1;
}

static void pack(void *argument) {
    screen_pack_job *j = argument;
    const vattention_screen *s = j->screen;
    const int64_t width = s->num_steps * STEP, num_in = j->weight->num_in;
    const int64_t num_panels = (s->num_out + COLUMNS - 1) / COLUMNS;
    /* What x in 16 bits and sums in float32 add to a product's error, relative to |w| |x|. */
    const float slack = sqrtf((float)num_in) / 65024.0f + (float)num_in * 0x1p-23f + 0x1p-20f;
    for (;;) {
        const int64_t panel = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED);
        if (panel >= num_panels) {
            return;
        }
        const uint16_t *packed = (const uint16_t *)j->weight->packed + panel * COLUMNS * ((num_in + 1) / 2 * 2);
        int8_t *numbers = s->numbers + panel * COLUMNS * width;
        float most[COLUMNS] = {0}, factor[COLUMNS], squares[COLUMNS] = {0}, errors[COLUMNS] = {0};
        int32_t sums[COLUMNS] = {0};
        memset(numbers, 0, (size_t)(COLUMNS * width));
        for (int64_t k = 0; k < num_in; k++) {
            for (int i = 0; i < COLUMNS; i++) {
                const float w = widened(packed[(k / 2 * COLUMNS + i) * 2 + k % 2]);
                most[i] = fabsf(w) > most[i] ? fabsf(w) : most[i];
                squares[i] += w * w;
            }
        }
        for (int i = 0; i < COLUMNS; i++) {
            if (!(most[i] < LARGEST) || squares[i] != squares[i]) {
                __atomic_store_n(&j->bad, 1, __ATOMIC_RELAXED);
                return;
            }
            s->scales[panel * COLUMNS + i] = most[i] / 127.0f;
            /* Below, the copy is zero, and the whole product its error. */
            factor[i] = most[i] >= SMALLEST ? 127.0f / most[i] : 0.0f;
        }
        for (int64_t k = 0; k < num_in; k++) {
            for (int i = 0; i < COLUMNS; i++) {
                const float w = widened(packed[(k / 2 * COLUMNS + i) * 2 + k % 2]);
                /* Adding and taking away 1.5 * 2^23 rounds to a whole number. */
                const float whole = (w * factor[i] + 12582912.0f) - 12582912.0f;
                const float error = w - whole * s->scales[panel * COLUMNS + i];
                numbers[(k / STEP * COLUMNS + i) * STEP + k % STEP] = (int8_t)whole;
                sums[i] += (int32_t)whole;
                errors[i] += error * error;
            }
        }
        for (int i = 0; i < COLUMNS; i++) {
            s->sums[panel * COLUMNS + i] = sums[i];
            s->errors[panel * COLUMNS + i] = most[i] >= SMALLEST
                                                 ? sqrtf(errors[i]) * 1.001f + slack * sqrtf(squares[i]) * 1.001f
                                                 : most[i] * sqrtf((float)num_in) * 1.001f;
        }
    }
}

const screen_kind vattention_bytes = {
    .by_vectors = by_vectors, .by_tiles = by_tiles, .split = split, .pack = pack, .num_bytes = 2};
#endif
