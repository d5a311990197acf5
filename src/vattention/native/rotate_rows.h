/* Rows of rotate.c, for one instruction set; a row is a token. */
TARGET INLINE void NAME(rotate)(const rotate_args *args, int64_t first, int64_t last, const int32_t dtype) {
    const vattention_rotation *shape = &args->shape;
    const int64_t half = shape->head_dim / 2;
    for (int64_t token = first; token < last; token++) {
        for (int32_t head = 0; head < shape->query.num_heads + shape->key.num_heads; head++) {
            const vattention_normed_heads *heads = head < shape->query.num_heads ? &shape->query : &shape->key;
            const int64_t low = token * shape->width + head * shape->head_dim, high = low + half;
            float factor = 1.0f;
            if (heads->scale) {
                floats16 squares = {0};
                for (int64_t i = 0; i < shape->head_dim; i += LANES16) {
                    const floats16 x = NAME(load16)(args->x, low + i, shape->head_dim - i, dtype);
                    squares += x * x;
                }
                const float sum = NAME(sum_of)(squares);
                factor = 1.0f / sqrtf(sum / (float)shape->head_dim + heads->epsilon);
            }
            for (int64_t i = 0; i < half; i += LANES16) {
                const int64_t left = half - i, at = token * shape->head_dim + i;
                floats16 a = NAME(load16)(args->x, low + i, left, dtype);
                floats16 b = NAME(load16)(args->x, high + i, left, dtype);
                if (heads->scale) {
                    a = a * factor * NAME(load16)(heads->scale, i, left, FLOAT32);
                    b = b * factor * NAME(load16)(heads->scale, half + i, left, FLOAT32);
                }
                const floats16 a_turned = a * NAME(load16)(args->cosines, at, left, dtype) -
                                          b * NAME(load16)(args->sines, at, left, dtype);
                const floats16 b_turned = b * NAME(load16)(args->cosines, at + half, left, dtype) +
                                          a * NAME(load16)(args->sines, at + half, left, dtype);
                NAME(store16)(args->x, low + i, left, dtype, a_turned);
                NAME(store16)(args->x, high + i, left, dtype, b_turned);
            }
        }
    }
}

TARGET static void NAME(rows)(const void *arguments, int64_t first, int64_t last) {
    const rotate_args *args = arguments;
    if (args->shape.dtype == FLOAT32) {
        NAME(rotate)(args, first, last, FLOAT32);
    } else {
        NAME(rotate)(args, first, last, BFLOAT16);
    }
}
