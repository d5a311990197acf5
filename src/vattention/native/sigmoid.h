/* The gate of a gated linear unit for 16 numbers, for one instruction set: see rowwise_set.h. */
#define FLOATS floats16
#define INTS ints16
#include "exp.h"

/* 1 / (1 + e^-x). Beyond the limits it is 1, or so small that float32 has no normal number for e^-x. */
TARGET INLINE floats16 NAME(sigmoid)(floats16 x) {
    const floats16 limit = (floats16){0} + EXP_MOST;
    floats16 t = -x;
    t = NAME(choose)(t > limit, limit, t);
    t = NAME(choose)(t < -limit, -limit, t);
    return 1.0f / (1.0f + NAME(exp)(t));
}

/* x sigmoid(x (linear + cubic x^2)) up. */
TARGET INLINE floats16 NAME(gated)(floats16 x, floats16 up, float linear, float cubic) {
    return x * NAME(sigmoid)(x * (linear + cubic * x * x)) * up;
}
