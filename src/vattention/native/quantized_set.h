/* One instruction set's panels as float32; included once for each by quantized.c with
 *   SET     a name
 *   TARGET  the function attribute that turns the instruction set on
 * after translate_SET. Loops are written for compilers that make vectors of them.
 */
#define JOIN2(a, b) a##_##b
#define JOIN(a, b) JOIN2(a, b)
#define NAME(name) JOIN(name, SET)

/* Steps `first + s` and `first + gap + s` for s = 0 and 1 of 16 columns, to out[steps, 32]. */
TARGET INLINE void NAME(widen)(const int8_t *line, const float *scales, float *out, const int gap) {
    int32_t words[HALF];
    memcpy(words, line, LINE);
#pragma GCC unroll 4
    for (int t = 0; t < 4; t++) {
        float *to = out + (t % 2 * gap + t / 2) * COLUMNS;
        for (int i = 0; i < HALF; i++) {
            to[i] = (float)((int32_t)((uint32_t)words[i] << (24 - 8 * t)) >> 24) * scales[i];
        }
    }
}

TARGET static void NAME(unpack)(const vattention_weight *weight, const uint8_t *group, const uint8_t *lower_line,
                                float *out) {
    const int64_t after = num_groups(weight) * group_nbytes(weight);
    for (int64_t i = num_groups(weight); i > 0; i--) {
        float scales[COLUMNS];
        for (int column = 0; column < COLUMNS; column++) {
            uint16_t bits;
            memcpy(&bits, group + 2 * column, 2);
            scales[column] = widened(bits);
        }
        const uint8_t *line = group + 2 * COLUMNS;
        for (int step = 0; step < GROUP; step += weight->format == INT8 ? 4 : 8) {
            for (int half = 0; half < 2; half++, line += LINE) {
                float *to = out + step * COLUMNS + half * HALF;
                __builtin_prefetch(line + after, 0, 2);
                if (weight->format == INT4) {
                    int8_t low[LINE], high[LINE];
                    NAME(translate)(line, low, high);
                    NAME(widen)(low, scales + half * HALF, to, 4);
                    NAME(widen)(high, scales + half * HALF, to + 2 * COLUMNS, 4);
                } else if (weight->format == HALVES) {
                    int8_t first[LINE], second[LINE];
                    const uint8_t *upper = line, *lower = lower_line;
                    lower_line += LINE;
                    __builtin_prefetch(lower + num_groups(weight) * HALVES_NBYTES, 0, 2);
                    JOIN_HALVES
                    NAME(widen)(first, scales + half * HALF, to, 2);
                    NAME(widen)(second, scales + half * HALF, to + 4 * COLUMNS, 2);
                } else {
                    NAME(widen)((const int8_t *)line, scales + half * HALF, to, 2);
                }
            }
        }
        group = line;
        out += GROUP * COLUMNS;
    }
}

#undef SET
#undef TARGET
#undef NAME
#undef JOIN
#undef JOIN2
