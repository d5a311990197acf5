/* Few rows times a quantized panel, on processors that sum products of bytes (AVX512_VNNI); included by linear_sets.h.
 *
 * Numbers of bfloat16 are taken as whole ones of 15 bits times a power of two, the same for a group: those down to a
 * 64th of a group's largest are exact, and smaller ones off by 2^-15 of that. Their upper and lower bytes are two
 * factors. Sums over a group are exact, and then scaled. The instruction takes one factor without a sign, so weights
 * are raised by 128, and the sums begin at what that adds.
 */
#define FEW_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")))

/* A group takes as long as twice its bytes of plain weights, or more. */
enum { FEW_AHEAD = 2 * AHEAD };

/* A row's numbers in one group, four to a word in the order in which a line's words hold the steps. */
typedef struct {
    int32_t high[GROUP / 4], low[GROUP / 4];
    int32_t high_start, low_start;
    float factor;
} few_group;

/* Steps in the order of a line's bytes; with 4 bits those of the lower halves, then those of the upper ones. */
static const uint16_t few_order[2][GROUP] = {
    {0,  2,  1,  3,  4,  6,  5,  7,  8,  10, 9,  11, 12, 14, 13, 15,
     16, 18, 17, 19, 20, 22, 21, 23, 24, 26, 25, 27, 28, 30, 29, 31},
    {0,  4,  1,  5,  2,  6,  3,  7,  8,  12, 9,  13, 10, 14, 11, 15,
     16, 20, 17, 21, 18, 22, 19, 23, 24, 28, 25, 29, 26, 30, 27, 31},
};

FEW_TARGET INLINE float few_power(int32_t exponent) {
    const union {
        uint32_t bits;
        float number;
    } power = {.bits = (uint32_t)exponent << 23};
    return power.number;
}

/* One group of `count` numbers, the rest being zeros. */
FEW_TARGET static void few_take(const uint16_t *x, int64_t count, const uint16_t *order, few_group *out) {
    enum { BITS = 13, TINY = 2 * BITS, NOT_FINITE = 255 };
    const __mmask32 mask = count >= GROUP ? 0xffffffffu : (1u << count) - 1;
    const __m512i own = _mm512_maskz_loadu_epi16(mask, x);
    const __m512i sizes = _mm512_and_si512(own, _mm512_set1_epi16(0x7fff));
    const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(sizes), _mm512_extracti64x4_epi64(sizes, 1));
    const __m128i most = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const __m128i least = _mm_minpos_epu16(_mm_xor_si128(most, _mm_set1_epi16(-1)));
    const int32_t exponent = (0xffff - _mm_extract_epi16(least, 0)) >> 7;
    if (exponent <= TINY || exponent == NOT_FINITE) {
        memset(out, 0, sizeof(*out));
        out->factor = exponent == NOT_FINITE ? NAN : 0.0f;
        return;
    }
    const __m512 scale = _mm512_set1_ps(few_power(2 * 127 + BITS - exponent));
    __m256i parts[2];
    for (int i = 0; i < 2; i++) {
        const __m256i bits = i ? _mm512_extracti64x4_epi64(own, 1) : _mm512_castsi512_si256(own);
        const __m512 wide = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
        parts[i] = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(wide, scale)));
    }
    const __m512i whole = _mm512_permutexvar_epi16(_mm512_loadu_si512(order),
                                                   _mm512_inserti64x4(_mm512_castsi256_si512(parts[0]), parts[1], 1));
    const __m512i high = _mm512_srai_epi16(_mm512_add_epi16(whole, _mm512_set1_epi16(128)), 8);
    const __m512i low = _mm512_sub_epi16(whole, _mm512_slli_epi16(high, 8));
    _mm256_storeu_si256((__m256i *)out->high, _mm512_cvtepi16_epi8(high));
    _mm256_storeu_si256((__m256i *)out->low, _mm512_cvtepi16_epi8(low));
    out->high_start = -128 * _mm512_reduce_add_epi32(_mm512_madd_epi16(high, _mm512_set1_epi16(1)));
    out->low_start = -128 * _mm512_reduce_add_epi32(_mm512_madd_epi16(low, _mm512_set1_epi16(1)));
    out->factor = few_power(exponent - BITS);
}

/* `rows` and `format` are constants wherever this is inlined. */
FEW_TARGET INLINE void few_tile(const tile_args *args, const int rows, const int format) {
    const __m512i raised = _mm512_set1_epi8((char)0x80), four = _mm512_set1_epi8(15);
    const __m128i book = _mm_loadu_si128((const __m128i *)vattention_code_book);
    const __m512i table = _mm512_xor_si512(_mm512_broadcast_i32x4(book), raised);
    const int parts = format == INT8 ? 1 : 2;
    const int64_t num_groups = (args->num_in + GROUP - 1) / GROUP;
    const few_group *x = (const few_group *)args->widened;
    const char *lower_line = args->lower;
    __m512 total[2][QUANTIZED_ROWS];
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++) {
        total[0][m] = total[1][m] = _mm512_setzero_ps();
    }
    const char *group = args->panel;
    for (int64_t g = 0; g < num_groups; g++, x++) {
        __m512i high[2][QUANTIZED_ROWS], low[2][QUANTIZED_ROWS];
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
            high[0][m] = high[1][m] = _mm512_set1_epi32(x[m * num_groups].high_start);
            low[0][m] = low[1][m] = _mm512_set1_epi32(x[m * num_groups].low_start);
        }
        const char *line = group + 2 * COLUMNS;
        __builtin_prefetch(group + FEW_AHEAD, 0, 3);
#pragma GCC unroll 8
        for (int k = 0; k < GROUP / 4; k += parts) {
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++, line += LINE, lower_line += LINE) {
                __builtin_prefetch(line + FEW_AHEAD, 0, 3);
                const __m512i own = _mm512_loadu_si512(line);
                if (format == HALVES) {
                    __builtin_prefetch(lower_line + FEW_AHEAD, 0, 3);
                }
#pragma GCC unroll 2
                for (int part = 0; part < parts; part++) {
                    __m512i w;
                    if (format == HALVES) {
                        const __m512i lower = _mm512_loadu_si512(lower_line);
                        w = part ? second_halves(own, lower) : first_halves(own, lower);
                    } else if (format == INT4) {
                        const __m512i codes = part ? _mm512_srli_epi16(own, 4) : own;
                        w = _mm512_shuffle_epi8(table, _mm512_and_si512(codes, four));
                    } else {
                        w = _mm512_xor_si512(own, raised);
                    }
#pragma GCC unroll 4
                    for (int m = 0; m < rows; m++) {
                        const few_group *numbers = &x[m * num_groups];
                        high[half][m] = _mm512_dpbusd_epi32(high[half][m], w, _mm512_set1_epi32(numbers->high[k + part]));
                        low[half][m] = _mm512_dpbusd_epi32(low[half][m], w, _mm512_set1_epi32(numbers->low[k + part]));
                    }
                }
            }
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const __m256i own = _mm256_loadu_si256((const __m256i *)(group + half * HALF * 2));
            const __m512 scales = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(own), 16));
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++) {
                const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[half][m], 8), low[half][m]);
                const __m512 factors = _mm512_mul_ps(scales, _mm512_set1_ps(x[m * num_groups].factor));
                total[half][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factors, total[half][m]);
            }
        }
        group = line;
    }
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            if (args->bias) {
                total[half][m] = _mm512_add_ps(total[half][m], _mm512_loadu_ps(args->bias + half * HALF));
            }
            store_avx512(args, m, half * HALF, (floats_avx512)total[half][m]);
        }
    }
}

#define TILE(rows) \
    FEW_TARGET static void int8_##rows(const tile_args *args) { few_tile(args, rows, INT8); } \
    FEW_TARGET static void int4_##rows(const tile_args *args) { few_tile(args, rows, INT4); } \
    FEW_TARGET static void halves_##rows(const tile_args *args) { few_tile(args, rows, HALVES); }
TILE(1) TILE(2) TILE(3) TILE(4)
#undef TILE
static const tile_fn int8_tiles[] = {int8_1, int8_2, int8_3, int8_4};
static const tile_fn int4_tiles[] = {int4_1, int4_2, int4_3, int4_4};
static const tile_fn halves_tiles[] = {halves_1, halves_2, halves_3, halves_4};

#define FEW_SET(bits, index) \
    FEW_TARGET static void int##bits##_take(const uint16_t *x, int64_t count, void *out) { \
        few_take(x, count, few_order[index], out); \
    } \
    static const tile_set int##bits##_set = {.tiles = int##bits##_tiles, .tile_rows = QUANTIZED_ROWS, \
                                             .take = int##bits##_take, .take_nbytes = sizeof(few_group)};
FEW_SET(8, 0)
FEW_SET(4, 1)
#undef FEW_SET
static const tile_set halves_set = {.tiles = halves_tiles, .tile_rows = QUANTIZED_ROWS, .take = int8_take,
                                    .take_nbytes = sizeof(few_group)};
