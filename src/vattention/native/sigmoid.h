/* The gate of a gated linear unit for 16 numbers, for one instruction set: see rowwise_set.h. */
TARGET INLINE floats16 NAME(choose)(ints16 condition, floats16 yes, floats16 no) {
    return (floats16)((condition & (ints16)yes) | (~condition & (ints16)no));
}

/* 1 / (1 + e^-x): e^x as 2^n e^r with |r| <= ln(2) / 2 and e^r by its Taylor series, good to float32's rounding. */
TARGET INLINE floats16 NAME(sigmoid)(floats16 x) {
    const float log2e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    /* Beyond this the result is 1, or so small that float32 has no normal number for e^-x. */
    const floats16 limit = (floats16){0} + 87.0f;
    floats16 t = -x;
    t = NAME(choose)(t > limit, limit, t);
    t = NAME(choose)(t < -limit, -limit, t);
    /* Adding and taking away 1.5 * 2^23 rounds to a whole number. */
    const floats16 n = (t * log2e + 12582912.0f) - 12582912.0f;
    const floats16 r = (t - n * ln2_high) - n * ln2_low;
    floats16 e = r * (1.0f / 5040) + 1.0f / 720;
    e = e * r + 1.0f / 120;
    e = e * r + 1.0f / 24;
    e = e * r + 1.0f / 6;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    const ints16 power = (__builtin_convertvector(n, ints16) + 127) << 23;
    return 1.0f / (1.0f + e * (floats16)power);
}

/* x sigmoid(x (linear + cubic x^2)) up. */
TARGET INLINE floats16 NAME(gated)(floats16 x, floats16 up, float linear, float cubic) {
    return x * NAME(sigmoid)(x * (linear + cubic * x * x)) * up;
}
