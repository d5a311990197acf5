/* One instruction set's vectors: how numbers come from the cache and go to the output, and functions of them; included
 * by attend_set.h. */
typedef float NAME(floats) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t NAME(words) __attribute__((vector_size(LANES * 4), aligned(2), may_alias));
typedef int32_t NAME(ints) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef struct {
    NAME(floats) first, second;
} NAME(pair);

/* LANES words, of which only the first nbytes exist; the rest are zeros. */
TARGET INLINE NAME(words) NAME(load_words)(const void *x, int64_t nbytes) {
    if (nbytes >= LANES * 4) {
        return *(const NAME(words) *)x;
    }
#ifdef MASKED
    return (NAME(words))_mm512_maskz_loadu_epi8(((__mmask64)1 << nbytes) - 1, x);
#else
    NAME(words) out = {0};
    if (nbytes > 0) {
        memcpy(&out, x, (size_t)nbytes);
    }
    return out;
#endif
}

#define FLOATS NAME(floats)
#define INTS NAME(ints)
#include "exp.h"

/* float32 from the float16 in the lower half of each word. */
TARGET INLINE NAME(floats) NAME(from_half)(NAME(words) half) {
    const NAME(words) sign = (half & 0x8000u) << 16, magnitude = (half & 0x7fffu) << 13;
    const NAME(words) exponent = magnitude & 0x0f800000u;
    /* Exponents move from bias 15 to 127. An exponent of 0 has no implicit one: it is lent and taken away again. */
    const NAME(words) normal = magnitude + (112u << 23);
    const NAME(floats) small = (NAME(floats))(magnitude + (113u << 23)) - 0x1p-14f;
    const NAME(words) special = magnitude | 0x7f800000u;
    NAME(floats) out = NAME(choose)((NAME(ints))(exponent == 0), small, (NAME(floats))normal);
    out = NAME(choose)((NAME(ints))(exponent == 0x0f800000u), (NAME(floats))special, out);
    return (NAME(floats))((NAME(words))out | sign);
}

/* 2 LANES numbers, of which only the first `count` exist; the rest are zeros. */
TARGET INLINE NAME(pair) NAME(load)(const void *x, int64_t count, const int32_t dtype) {
    if (dtype == FLOAT32) {
        const int64_t more = count - LANES;
        return (NAME(pair)){
            (NAME(floats))NAME(load_words)(x, count * 4),
            more > 0 ? (NAME(floats))NAME(load_words)((const char *)x + LANES * 4, more * 4) : (NAME(floats)){0},
        };
    }
    const NAME(words) both = NAME(load_words)(x, count * 2);
    if (dtype == FLOAT16) {
        return (NAME(pair)){NAME(from_half)(both & 0xffffu), NAME(from_half)(both >> 16)};
    }
    return (NAME(pair)){(NAME(floats))(both << 16), (NAME(floats))(both & 0xffff0000u)};
}

/* Rounds to nearest even as hardware does; NaN stays NaN. */
TARGET INLINE NAME(words) NAME(to_bfloat16)(NAME(floats) x) {
    const NAME(words) bits = (NAME(words))x, nan = (NAME(words))(x != x);
    return (((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) & ~nan) | (((bits >> 16) | 0x40u) & nan);
}

/* e^x for x <= 0. Results too small for a normal number are 0. */
TARGET INLINE NAME(floats) NAME(exp_below)(NAME(floats) x) {
    const NAME(ints) tiny = (NAME(ints))(x < -EXP_MOST);
    return NAME(choose)(tiny, (NAME(floats)){0}, NAME(exp)(NAME(choose)(tiny, (NAME(floats)){0}, x)));
}

/* tanh, near 0 by J. H. Lambert's continued fraction, whose relative error below 1 is 1e-9, elsewhere by e^-2|x|. */
TARGET INLINE NAME(floats) NAME(tanh)(NAME(floats) x) {
    const NAME(floats) z = x * x;
    const NAME(floats) near = x * (10395.0f + z * (1260.0f + z * 21.0f)) / (10395.0f + z * (4725.0f + z * (210.0f + z)));
    const NAME(floats) positive = (NAME(floats))((NAME(words))x & 0x7fffffffu);
    const NAME(floats) e = NAME(exp_below)(positive * -2.0f);
    const NAME(words) sign = (NAME(words))x & 0x80000000u;
    const NAME(floats) far = (NAME(floats))((NAME(words))((1.0f - e) / (1.0f + e)) | sign);
    return NAME(choose)((NAME(ints))(z < 1.0f), near, far);
}

/* Lane i of the result is the sum of sums[i]'s lanes. In each step of width s, two vectors become one: of every 2 s
 * lanes, the first s are the first vector's and the others the second's, each added to its neighbour s lanes away. */
#define LANES4(one, s) one(0, s), one(1, s), one(2, s), one(3, s)
#define LANES8(one, s) LANES4(one, s), one(4, s), one(5, s), one(6, s), one(7, s)
#define LANES16(one, s) \
    LANES8(one, s), one(8, s), one(9, s), one(10, s), one(11, s), one(12, s), one(13, s), one(14, s), one(15, s)
#define LOWER(lane, s) (((lane) & (s)) ? LANES + (lane) - (s) : (lane))
#define UPPER(lane, s) (LOWER(lane, s) + (s))
#define STEP(s) \
    _Pragma("GCC unroll 8") for (int i = 0; i < (s); i++) { \
        sums[i] = SHUFFLE(NAME(ints), sums[i], sums[i + (s)], LANE_LIST(LOWER, s)) + \
                  SHUFFLE(NAME(ints), sums[i], sums[i + (s)], LANE_LIST(UPPER, s)); \
    }
TARGET INLINE NAME(floats) NAME(sum_each)(NAME(floats) *sums) {
#if LANES == 16
    STEP(8)
#endif
#if LANES >= 8
    STEP(4)
#endif
    STEP(2)
    STEP(1)
    return sums[0];
}
#undef STEP
#undef UPPER
#undef LOWER
#undef LANES16
#undef LANES8
#undef LANES4
