/* Weights in 8 or 4 bits: how they lie in memory, and panels of them as numbers to multiply.
 *
 * Numbers of a column come in groups of 32 steps of the inner dimension. Each group has a scale in bfloat16, and a
 * weight is its scale times a whole number: from -127 to 127 in 8 bits, in 4 bits one of the sixteen of a code book,
 * which lie as the quantiles of the normal distribution do (T. Dettmers et al., "QLoRA: Efficient Finetuning of
 * Quantized LLMs", 2023, appendix E), in 127ths of its largest. All of them are exact in bfloat16.
 *
 * A panel of 32 columns, padded with zeros, is a sequence of groups: 32 scales, then lines of 64 bytes, by turns for
 * the first and the second 16 columns. A line has four steps in 8 bits, eight in 4: word 2 i + s (of 16 bits) holds
 * those of column i whose number is even (s = 0) or odd (s = 1), in order from the lowest bits up. So words and
 * bfloat16 numbers to be multiplied in pairs lie alike.
 *
 * Numbers of 8 bits may also lie in halves, so that the upper ones alone can be read (screen_halves.c). Then the
 * panels have scales and upper halves, and all lower ones follow behind the last panel, in the same order. They are those
 * of a number plus 128. A line holds the halves of two lines of whole numbers that follow each other for the same columns:
 * the first's in the lower halves of its bytes.
 */
#include "kernels.h"

#include <string.h>

#if defined(__x86_64__)
#include "halves.h"
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

const int8_t vattention_code_book[16] = {-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127};

static int64_t num_groups(const vattention_weight *weight) { return (weight->num_in + GROUP - 1) / GROUP; }

static int64_t group_nbytes(const vattention_weight *weight) {
    return COLUMNS * 2 + COLUMNS * GROUP / (weight->format == INT8 ? 1 : 2);
}

int64_t vattention_panel_nbytes(const vattention_weight *weight) {
    if (weight->format != PLAIN) {
        return num_groups(weight) * group_nbytes(weight);
    }
    return COLUMNS * (weight->dtype == FLOAT32 ? weight->num_in * 4 : (weight->num_in + 1) / 2 * 4);
}

const char *vattention_lower_halves(const vattention_weight *weight, int64_t panel) {
    const int64_t num_panels = (weight->num_out + COLUMNS - 1) / COLUMNS;
    return (const char *)weight->packed + num_panels * vattention_panel_nbytes(weight) +
           panel * num_groups(weight) * HALVES_NBYTES;
}

/* Numbers of 4 bits: those in the lower and in the upper halves of a line's bytes. */
#define TRANSLATE_SCALAR \
    for (int i = 0; i < LINE; i++) { \
        low[i] = vattention_code_book[line[i] & 15]; \
        high[i] = vattention_code_book[line[i] >> 4]; \
    }

/* Two lines of whole numbers from those of their halves. */
#define JOIN_HALVES \
    for (int i = 0; i < LINE; i++) { \
        first[i] = (int8_t)((upper[i] << 4 | (lower[i] & 15)) ^ 128); \
        second[i] = (int8_t)(((upper[i] & 240) | lower[i] >> 4) ^ 128); \
    }

#define SET baseline
#define TARGET
#if defined(__aarch64__)
INLINE void translate_baseline(const uint8_t *line, int8_t *low, int8_t *high) {
    const int8x16_t book = vld1q_s8(vattention_code_book);
    for (int i = 0; i < LINE; i += 16) {
        const uint8x16_t both = vld1q_u8(line + i);
        vst1q_s8(low + i, vqtbl1q_s8(book, vandq_u8(both, vdupq_n_u8(15))));
        vst1q_s8(high + i, vqtbl1q_s8(book, vshrq_n_u8(both, 4)));
    }
}
#else
INLINE void translate_baseline(const uint8_t *line, int8_t *low, int8_t *high) { TRANSLATE_SCALAR }
#endif
#include "quantized_set.h"

#ifdef HAVE_AVX2
#define SET avx2
#define TARGET AVX2_TARGET
TARGET INLINE void translate_avx2(const uint8_t *line, int8_t *low, int8_t *high) {
    const __m256i book = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)vattention_code_book));
    const __m256i four = _mm256_set1_epi8(15);
    for (int i = 0; i < LINE; i += 32) {
        const __m256i both = _mm256_loadu_si256((const __m256i *)(line + i));
        const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(both, 4), four);
        _mm256_storeu_si256((__m256i *)(low + i), _mm256_shuffle_epi8(book, _mm256_and_si256(both, four)));
        _mm256_storeu_si256((__m256i *)(high + i), _mm256_shuffle_epi8(book, upper));
    }
}
#include "quantized_set.h"
#endif

#ifdef HAVE_AVX512
#define SET avx512
#define TARGET AVX512_TARGET
TARGET INLINE void translate_avx512(const uint8_t *line, int8_t *low, int8_t *high) {
    const __m512i book = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)vattention_code_book));
    const __m512i four = _mm512_set1_epi8(15), both = _mm512_loadu_si512(line);
    _mm512_storeu_si512(low, _mm512_shuffle_epi8(book, _mm512_and_si512(both, four)));
    _mm512_storeu_si512(high, _mm512_shuffle_epi8(book, _mm512_and_si512(_mm512_srli_epi16(both, 4), four)));
}
#include "quantized_set.h"
#endif

#ifdef HAVE_PAIRS

/* Two steps of 16 columns, scaled and rounded. */
PAIRS_TARGET INLINE void store_pairs(char *out, __m512 even, __m512 odd, __m512 scales, __m512i interleave) {
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_mul_ps(odd, scales), _mm512_mul_ps(even, scales));
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(interleave, (__m512i)both));
}

/* Four steps of 16 columns, from a line of whole numbers. */
PAIRS_TARGET INLINE void store_line(char *out, __m512i words, __m512 scales, __m512i interleave) {
    const __m512i bytes[4] = {_mm512_slli_epi32(words, 24), _mm512_slli_epi32(words, 8), _mm512_slli_epi32(words, 16),
                              words};
#pragma GCC unroll 2
    for (int t = 0; t < 2; t++, out += COLUMNS * 4) {
        store_pairs(out, _mm512_cvtepi32_ps(_mm512_srai_epi32(bytes[2 * t], 24)),
                    _mm512_cvtepi32_ps(_mm512_srai_epi32(bytes[2 * t + 1], 24)), scales, interleave);
    }
}

/* `format` is a constant wherever this is inlined. */
PAIRS_TARGET INLINE void unpack_pairs(const vattention_weight *weight, const char *group, const char *lower_line,
                                      char *out, const int format) {
    const int64_t after = num_groups(weight) * group_nbytes(weight);
    uint16_t order[32], book[32];
    for (int i = 0; i < 32; i++) {
        const union {
            float number;
            uint32_t bits;
        } code = {.number = vattention_code_book[i % 16]};
        book[i] = (uint16_t)(code.bits >> 16);
        order[i] = (uint16_t)(i / 2 + i % 2 * 16);
    }
    const __m512i interleave = _mm512_loadu_si512(order), table = _mm512_loadu_si512(book);
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000u), raised = _mm512_set1_epi8((char)0x80);
    for (int64_t i = num_groups(weight); i > 0; i--, out += GROUP / 2 * COLUMNS * 4) {
        const char *line = group + 2 * COLUMNS;
        __m512 scales[2];
        for (int half = 0; half < 2; half++) {
            const __m256i own = _mm256_loadu_si256((const __m256i *)(group + half * HALF * 2));
            scales[half] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(own), 16));
        }
        __builtin_prefetch(group + after, 0, 2);
        for (int pair = 0; pair < GROUP / 2; pair += format == INT8 ? 2 : 4) {
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++, line += LINE) {
                char *to = out + pair * COLUMNS * 4 + half * LINE;
                const __m512i words = _mm512_loadu_si512(line);
                /* The others' turn to read memory: the next panel. */
                __builtin_prefetch(line + after, 0, 2);
                if (format == INT4) {
#pragma GCC unroll 4
                    for (int t = 0; t < 4; t++, to += COLUMNS * 4) {
                        const __m512i codes = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * t), table);
                        store_pairs(to, _mm512_castsi512_ps(_mm512_slli_epi32(codes, 16)),
                                    _mm512_castsi512_ps(_mm512_and_si512(codes, upper)), scales[half], interleave);
                    }
                    continue;
                }
                if (format == HALVES) {
                    const __m512i lower = _mm512_loadu_si512(lower_line);
                    __builtin_prefetch(lower_line + num_groups(weight) * HALVES_NBYTES, 0, 2);
                    lower_line += LINE;
                    store_line(to, _mm512_xor_si512(first_halves(words, lower), raised), scales[half], interleave);
                    to += 2 * COLUMNS * 4;
                    store_line(to, _mm512_xor_si512(second_halves(words, lower), raised), scales[half], interleave);
                    continue;
                }
                store_line(to, words, scales[half], interleave);
            }
        }
        group = line;
    }
}

PAIRS_TARGET static void unpack_all_pairs(const vattention_weight *weight, const char *panel, const char *lower,
                                          char *out) {
    if (weight->format == INT4) {
        unpack_pairs(weight, panel, lower, out, INT4);
    } else if (weight->format == HALVES) {
        unpack_pairs(weight, panel, lower, out, HALVES);
    } else {
        unpack_pairs(weight, panel, lower, out, INT8);
    }
}
#endif

/* The best this processor runs, found once as the library is loaded. */
static void (*best)(const vattention_weight *, const uint8_t *, const uint8_t *, float *) = unpack_baseline;

__attribute__((constructor)) static void find_best(void) {
#ifdef HAVE_AVX2
    if (has_avx2()) {
        best = unpack_avx2;
    }
#endif
#ifdef HAVE_AVX512
    if (has_avx512()) {
        best = unpack_avx512;
    }
#endif
}

void vattention_unpack(const vattention_weight *weight, int64_t panel, int32_t dtype, void *out) {
    const char *groups = (const char *)weight->packed + panel * vattention_panel_nbytes(weight);
    const char *lower = vattention_lower_halves(weight, panel);
#ifdef HAVE_PAIRS
    if (dtype == BFLOAT16) {
        unpack_all_pairs(weight, groups, lower, out);
        return;
    }
#endif
    (void)dtype;
    best(weight, (const uint8_t *)groups, (const uint8_t *)lower, out);
}
