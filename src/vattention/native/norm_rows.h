/* Rows of norm.c, for one instruction set. */
TARGET INLINE void NAME(norm)(const norm_args *args, int64_t at, const int32_t dtype) {
    const int64_t width = args->width;
    floats16 squares = {0};
    for (int64_t i = 0; i < width; i += LANES16) {
        const floats16 x = NAME(load16)(args->x, at + i, width - i, dtype);
        squares += x * x;
    }
    const float sum = NAME(sum_of)(squares);
    const float factor = 1.0f / sqrtf(sum / (float)width + args->epsilon);
    for (int64_t i = 0; i < width; i += LANES16) {
        const floats16 x = NAME(load16)(args->x, at + i, width - i, dtype);
        const floats16 scale = NAME(load16)(args->scale, i, width - i, FLOAT32);
        NAME(store16)(args->y, at + i, width - i, dtype, x * factor * scale);
    }
}

TARGET INLINE void NAME(rows_of)(const norm_args *args, int64_t first, int64_t last, const int32_t dtype) {
    const int64_t width = args->width;
    for (int64_t at = first * width; at < last * width; at += width) {
        if (args->scale) {
            NAME(norm)(args, at, dtype);
        }
        for (int64_t i = 0; args->sum && i < width; i += LANES16) {
            const floats16 y = NAME(load16)(args->y, at + i, width - i, dtype);
            const floats16 sum = NAME(load16)(args->sum, at + i, width - i, dtype);
            NAME(store16)(args->sum, at + i, width - i, dtype, sum + y);
        }
    }
}

TARGET static void NAME(rows)(const void *arguments, int64_t first, int64_t last) {
    const norm_args *args = arguments;
    if (args->dtype == FLOAT32) {
        NAME(rows_of)(args, first, last, FLOAT32);
    } else {
        NAME(rows_of)(args, first, last, BFLOAT16);
    }
}
