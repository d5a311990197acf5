/* Rows of gate.c, for one instruction set. */
#include "sigmoid.h"

TARGET INLINE void NAME(gate)(const gate_args *args, int64_t first, int64_t last, const int32_t dtype) {
    const int64_t width = args->width;
    for (int64_t row = first; row < last; row++) {
        for (int64_t i = 0; i < width; i += LANES16) {
            const floats16 x = NAME(load16)(args->gate_up, 2 * row * width + i, width - i, dtype);
            const floats16 up = NAME(load16)(args->gate_up, (2 * row + 1) * width + i, width - i, dtype);
            NAME(store16)(args->y, row * width + i, width - i, dtype, NAME(gated)(x, up, args->linear, args->cubic));
        }
    }
}

TARGET static void NAME(rows)(const void *arguments, int64_t first, int64_t last) {
    const gate_args *args = arguments;
    if (args->dtype == FLOAT32) {
        NAME(gate)(args, first, last, FLOAT32);
    } else {
        NAME(gate)(args, first, last, BFLOAT16);
    }
}
