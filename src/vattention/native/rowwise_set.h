/* One instruction set's vectors of 16 numbers; included once for each by rowwise_sets.h with
 *   SET     a name
 *   TARGET  the function attribute that turns the instruction set on
 *   AVX512_SET  where that has AVX-512
 *
 * Compilers take vectors apart where a function is defined, before it is inlined: a helper that is to become one
 * instruction must itself be compiled for the instruction set of those that call it.
 */
#define JOIN2(a, b) a##_##b
#define JOIN(a, b) JOIN2(a, b)
#define NAME(name) JOIN(name, SET)

/* Compilers convert vectors of 16 numbers by halves, and add their lanes one by one. */
#ifdef AVX512_SET
TARGET INLINE words16 NAME(words_of)(halves16 x) { return (words16)_mm512_cvtepu16_epi32((__m256i)x); }
TARGET INLINE halves16 NAME(halves_of)(words16 x) { return (halves16)_mm512_cvtepi32_epi16((__m512i)x); }
TARGET INLINE float NAME(sum_of)(floats16 x) { return _mm512_reduce_add_ps((__m512)x); }
#else
TARGET INLINE words16 NAME(words_of)(halves16 x) { return __builtin_convertvector(x, words16); }
TARGET INLINE halves16 NAME(halves_of)(words16 x) { return __builtin_convertvector(x, halves16); }
TARGET INLINE float NAME(sum_of)(floats16 x) {
    float sum = 0.0f;
    for (int lane = 0; lane < LANES16; lane++) {
        sum += x[lane];
    }
    return sum;
}
#endif

/* Up to 16 numbers of either type from x[i], the rest zeros. */
TARGET INLINE floats16 NAME(load16)(const void *x, int64_t i, int64_t count, int32_t dtype) {
    if (dtype == FLOAT32) {
        floats16 out = {0};
        if (count >= LANES16) {
            return *(const floats16 *)((const float *)x + i);
        }
        memcpy(&out, (const float *)x + i, (size_t)count * 4);
        return out;
    }
    halves16 bits = {0};
    if (count >= LANES16) {
        bits = *(const halves16 *)((const uint16_t *)x + i);
    } else {
        memcpy(&bits, (const uint16_t *)x + i, (size_t)count * 2);
    }
    return (floats16)(NAME(words_of)(bits) << 16);
}

/* Stores up to 16 numbers to y[i], in bfloat16 rounded to nearest even, NaN kept. */
TARGET INLINE void NAME(store16)(void *y, int64_t i, int64_t count, int32_t dtype, floats16 values) {
    if (dtype == FLOAT32) {
        if (count >= LANES16) {
            *(floats16 *)((float *)y + i) = values;
        } else {
            memcpy((float *)y + i, &values, (size_t)count * 4);
        }
        return;
    }
    const words16 bits = (words16)values;
    const words16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const words16 nan = (words16)(values != values);
    const halves16 out = NAME(halves_of)((rounded & ~nan) | (((bits >> 16) | 0x40u) & nan));
    if (count >= LANES16) {
        *(halves16 *)((uint16_t *)y + i) = out;
    } else {
        memcpy((uint16_t *)y + i, &out, (size_t)count * 2);
    }
}
