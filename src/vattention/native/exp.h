/* Exponentials of vectors for one instruction set; included where there are NAME and TARGET, with
 *   FLOATS  the type of vectors
 *   INTS    that of as many whole numbers
 */
TARGET INLINE FLOATS NAME(choose)(INTS condition, FLOATS yes, FLOATS no) {
    return (FLOATS)((condition & (INTS)yes) | (~condition & (INTS)no));
}

/* Sizes up to which e^x and e^-x are normal numbers of float32. */
#define EXP_MOST 87.0f

/* e^x for |x| <= EXP_MOST, as 2^n e^r with |r| <= ln(2) / 2 and e^r by its Taylor series, good to float32's rounding. */
TARGET INLINE FLOATS NAME(exp)(FLOATS x) {
    const float log2e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    /* Adding and taking away 1.5 * 2^23 rounds to a whole number. */
    const FLOATS n = (x * log2e + 12582912.0f) - 12582912.0f;
    const FLOATS r = (x - n * ln2_high) - n * ln2_low;
    FLOATS e = r * (1.0f / 5040) + 1.0f / 720;
    e = e * r + 1.0f / 120;
    e = e * r + 1.0f / 24;
    e = e * r + 1.0f / 6;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    const INTS power = (__builtin_convertvector(n, INTS) + 127) << 23;
    return e * (FLOATS)power;
}

#undef FLOATS
#undef INTS
