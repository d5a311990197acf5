/* One instruction set's tiles, y[rows, 32] = x[rows, K] panel[K, 32]; included once for each by linear_sets.h with
 *   SET        a name
 *   LANES      float32 numbers in a vector register
 *   TILE_ROWS  most rows whose sums fit into the registers
 *   TARGET     the function attribute that turns the instruction set on
 */
#define JOIN2(a, b) a##_##b
#define JOIN(a, b) JOIN2(a, b)
#define NAME(name) JOIN(name, SET)

typedef float NAME(floats) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t NAME(words) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t NAME(halves) __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

/* Rounds to nearest even as hardware does; NaN stays NaN. */
TARGET INLINE void NAME(store)(const tile_args *args, int64_t row, int64_t column, NAME(floats) sums) {
    if (args->y_dtype == FLOAT32) {
        float *y = (float *)args->y + row * args->y_stride + column;
        if (column + LANES <= args->columns) {
            *(NAME(floats) *)y = sums;
            return;
        }
        for (int64_t i = 0; column + i < args->columns; i++) {
            y[i] = sums[i];
        }
        return;
    }
    uint16_t *y = (uint16_t *)args->y + row * args->y_stride + column;
    const NAME(words) bits = (NAME(words))sums;
    const NAME(words) rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const NAME(words) nan = (NAME(words))(sums != sums);
    const NAME(halves) out = __builtin_convertvector((rounded & ~nan) | (((bits >> 16) | 0x40u) & nan), NAME(halves));
    if (column + LANES <= args->columns) {
        *(NAME(halves) *)y = out;
        return;
    }
    for (int64_t i = 0; column + i < args->columns; i++) {
        y[i] = out[i];
    }
}

/* `rows` and `wide` are constants wherever this is inlined, so the loops over rows unroll into registers. */
TARGET INLINE void NAME(tile)(const tile_args *args, const int rows, const int wide) {
    for (int64_t half = 0; half < HALF && half < args->columns; half += LANES) {
        NAME(floats) low_total[TILE_ROWS] = {0}, high_total[TILE_ROWS] = {0};
        const float *x = args->widened;
        const char *panel = (const char *)args->panel + half * 4;
        const char *ahead = args->ahead;
        for (int64_t start = 0; start < args->num_in; start += K_STRIP, x += args->strip_stride) {
            const int64_t steps = args->num_in - start < K_STRIP ? args->num_in - start : K_STRIP;
            NAME(floats) low[TILE_ROWS], high[TILE_ROWS];
#pragma GCC unroll 12
            for (int m = 0; m < rows; m++) {
                low[m] = high[m] = (NAME(floats)){0};
            }
            for (int64_t k = 0; k < steps; k += wide ? 1 : 2) {
                const NAME(words) first = *(const NAME(words) *)panel;
                const NAME(words) second = *(const NAME(words) *)(panel + HALF * 4);
                panel += COLUMNS * 4;
                __builtin_prefetch(ahead, 0, 2);
                ahead += args->ahead_step;
                if (wide) {
#pragma GCC unroll 12
                    for (int m = 0; m < rows; m++) {
                        low[m] += x[m * STRIP_STRIDE + k] * (NAME(floats))first;
                        high[m] += x[m * STRIP_STRIDE + k] * (NAME(floats))second;
                    }
                    continue;
                }
                const NAME(floats) first_even = (NAME(floats))(first << 16), second_even = (NAME(floats))(second << 16);
#pragma GCC unroll 12
                for (int m = 0; m < rows; m++) {
                    low[m] += x[m * STRIP_STRIDE + k] * first_even;
                    high[m] += x[m * STRIP_STRIDE + k] * second_even;
                }
                const NAME(floats) first_odd = (NAME(floats))(first & 0xffff0000u);
                const NAME(floats) second_odd = (NAME(floats))(second & 0xffff0000u);
#pragma GCC unroll 12
                for (int m = 0; m < rows; m++) {
                    low[m] += x[m * STRIP_STRIDE + k + 1] * first_odd;
                    high[m] += x[m * STRIP_STRIDE + k + 1] * second_odd;
                }
            }
#pragma GCC unroll 12
            for (int m = 0; m < rows; m++) {
                low_total[m] += low[m];
                high_total[m] += high[m];
            }
        }
        for (int m = 0; m < rows; m++) {
            if (args->bias) {
                low_total[m] += *(const NAME(floats) *)(args->bias + half);
                high_total[m] += *(const NAME(floats) *)(args->bias + HALF + half);
            }
            NAME(store)(args, m, half, low_total[m]);
            NAME(store)(args, m, HALF + half, high_total[m]);
        }
    }
}

#define TILES(rows) \
    TARGET static void NAME(narrow_##rows)(const tile_args *args) { NAME(tile)(args, rows, 0); } \
    TARGET static void NAME(wide_##rows)(const tile_args *args) { NAME(tile)(args, rows, 1); }
TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6)
#if TILE_ROWS == 12
TILES(7) TILES(8) TILES(9) TILES(10) TILES(11) TILES(12)
#endif
#undef TILES

#define LIST6(kind) NAME(kind##_1), NAME(kind##_2), NAME(kind##_3), NAME(kind##_4), NAME(kind##_5), NAME(kind##_6)
#if TILE_ROWS == 12
#define LIST(kind) LIST6(kind), NAME(kind##_7), NAME(kind##_8), NAME(kind##_9), NAME(kind##_10), NAME(kind##_11), NAME(kind##_12)
#else
#define LIST(kind) LIST6(kind)
#endif
static const tile_fn NAME(wide_tiles)[TILE_ROWS] = {LIST(wide)};
static const tile_fn NAME(narrow_tiles)[TILE_ROWS] = {LIST(narrow)};
static const tile_set NAME(float32_set) = {.tiles = NAME(wide_tiles), .tile_rows = TILE_ROWS, .widens = 1};
static const tile_set NAME(bfloat16_set) = {.tiles = NAME(narrow_tiles), .tile_rows = TILE_ROWS, .widens = 1};
#undef LIST
#undef LIST6

#undef SET
#undef LANES
#undef TILE_ROWS
#undef TARGET
#undef NAME
#undef JOIN
#undef JOIN2
