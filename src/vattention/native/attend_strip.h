/* One instruction set's softmax over a strip of keys, and the values it weighs; included by attend_set.h. */
/* Adds the products of up to 2 LANES numbers from number d on: LANES / heads keys with each of the query rows. */
TARGET INLINE void NAME(multiply)(NAME(floats) *sums, const char *const *keys, const float *query, int64_t query_stride,
                                  int64_t d, int64_t count, const int heads, const int32_t dtype) {
    const int item = dtype == FLOAT32 ? 4 : 2, num_keys = LANES / heads;
#ifdef DOT
    if (dtype == BFLOAT16) {
        __m512bh rows[TOGETHER];
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++) {
            rows[h] = (__m512bh)*(const NAME(words) *)((const uint16_t *)(query + h * query_stride) + d);
        }
#pragma GCC unroll 16
        for (int i = 0; i < num_keys; i++) {
            const __m512bh key = (__m512bh)NAME(load_words)(keys[i] + d * item, count * item);
#pragma GCC unroll 4
            for (int h = 0; h < heads; h++) {
                const int at = h * num_keys + i;
                sums[at] = (NAME(floats))_mm512_dpbf16_ps((__m512)sums[at], rows[h], key);
            }
        }
        return;
    }
#endif
#pragma GCC unroll 16
    for (int i = 0; i < num_keys; i++) {
        const NAME(pair) key = NAME(load)(keys[i] + d * item, count, dtype);
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++) {
            const float *row = query + h * query_stride + d;
            sums[h * num_keys + i] += key.first * *(const NAME(floats) *)row;
            sums[h * num_keys + i] += key.second * *(const NAME(floats) *)(row + LANES);
        }
    }
}

/* scores[heads, STRIP + LANES] at [low, high) of 1, 2 or 4 query rows with the strip's keys; a few numbers behind
 * `high` are overwritten. While keys are multiplied, memory is asked for their values. */
TARGET INLINE void NAME(scores)(const strip_args *args, int64_t kv_head, const float *query, int64_t query_stride,
                                float *scores, const int heads, const int32_t dtype) {
    const int num_keys = LANES / heads;
    const int64_t dim = args->heads->key_dim;
    const int64_t keys_nbytes = dim * (dtype == FLOAT32 ? 4 : 2);
    const int64_t values_nbytes = args->heads->value_dim * (dtype == FLOAT32 ? 4 : 2);
    for (int64_t j = args->low; j < args->high; j += num_keys) {
        const char *keys[LANES];
        NAME(floats) sums[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < num_keys; i++) {
            const int64_t at = j + i < args->high ? j + i : args->high - 1;
            keys[i] = args->keys[at] + kv_head * args->key_head_nbytes;
            const char *value = args->values[at] + kv_head * args->value_head_nbytes;
            for (int64_t line = 0; line < values_nbytes; line += 64) {
                __builtin_prefetch(value + line, 0, 2);
            }
            if (at + KEYS_AHEAD < args->high) {
                const char *key = args->keys[at + KEYS_AHEAD] + kv_head * args->key_head_nbytes;
                for (int64_t line = 0; line < keys_nbytes; line += 64) {
                    __builtin_prefetch(key + line, 0, 3);
                }
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            sums[i] = (NAME(floats)){0};
        }
        int64_t d = 0;
        for (; d + 2 * LANES <= dim; d += 2 * LANES) {
            NAME(multiply)(sums, keys, query, query_stride, d, 2 * LANES, heads, dtype);
        }
        if (d < dim) {
            NAME(multiply)(sums, keys, query, query_stride, d, dim - d, heads, dtype);
        }
        const NAME(floats) all = NAME(sum_each)(sums);
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++) {
            memcpy(scores + h * (STRIP + LANES) + j, (const float *)&all + h * num_keys, (size_t)num_keys * 4);
        }
    }
}

/* Turns the scores at [low, high) into weights relative to the largest, the others of [from, until) into 0. */
TARGET INLINE void NAME(softmax)(const vattention_heads *heads, float *scores, int64_t from, int64_t until, int64_t low,
                                 int64_t high, float *max, float *total) {
    const float softcap = heads->softcap;
    NAME(floats) largest = (NAME(floats)){0} - FLT_MAX, sum = {0};
    from = from / LANES * LANES;
    for (int64_t j = from; j < until; j += LANES) {
        NAME(floats) x = *(NAME(floats) *)(scores + j) * heads->scale;
        if (softcap > 0.0f) {
            x = softcap * NAME(tanh)(x / softcap);
        }
        if (j < low || j + LANES > high) {
            for (int lane = 0; lane < LANES; lane++) {
                x[lane] = j + lane >= low && j + lane < high ? x[lane] : -__builtin_inff();
            }
        }
        *(NAME(floats) *)(scores + j) = x;
        largest = NAME(choose)((NAME(ints))(x > largest), x, largest);
    }
    float most = largest[0];
    for (int lane = 1; lane < LANES; lane++) {
        most = largest[lane] > most ? largest[lane] : most;
    }
    for (int64_t j = from; j < until; j += LANES) {
        const NAME(floats) weights = NAME(exp_below)(*(NAME(floats) *)(scores + j) - most);
        *(NAME(floats) *)(scores + j) = weights;
        sum += weights;
    }
    float all = 0.0f;
    for (int lane = 0; lane < LANES; lane++) {
        all += sum[lane];
    }
    *max = most;
    *total = all;
}

/* out[heads, out_stride] from number d on: the strip's values times the weights, `wide` times 2 LANES numbers, of which
 * only the first `count` exist. */
TARGET INLINE void NAME(weigh)(const strip_args *args, int64_t kv_head, const float *weights, int64_t d, int64_t count,
                               float *out, int64_t out_stride, const int heads, const int wide, const int32_t dtype) {
    const int item = dtype == FLOAT32 ? 4 : 2;
    const int64_t offset = kv_head * args->value_head_nbytes + d * item;
    NAME(floats) first[TOGETHER * 2], second[TOGETHER * 2];
#pragma GCC unroll 8
    for (int i = 0; i < heads * wide; i++) {
        first[i] = second[i] = (NAME(floats)){0};
    }
    for (int64_t j = args->low; j < args->high; j++) {
        const char *value = args->values[j] + offset;
#pragma GCC unroll 2
        for (int w = 0; w < wide; w++) {
            const NAME(pair) v = NAME(load)(value + w * 2 * LANES * item, count - w * 2 * LANES, dtype);
#pragma GCC unroll 4
            for (int h = 0; h < heads; h++) {
                const float weight = weights[h * (STRIP + LANES) + j];
                first[h * wide + w] += weight * v.first;
                second[h * wide + w] += weight * v.second;
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < heads * wide; i++) {
        float *at = out + i / wide * out_stride + d + i % wide * 2 * LANES;
        *(NAME(floats) *)at = first[i];
        *(NAME(floats) *)(at + LANES) = second[i];
    }
}

/* 1, 2 or 4 query rows, from number `first` on of those that share a kv head. */
TARGET INLINE void NAME(rows)(const strip_args *args, int64_t kv_head, int64_t first, state out, const int heads,
                              const int32_t dtype) {
    const vattention_heads *h = args->heads;
    const int64_t group = h->num_heads / h->num_kv_heads, at = kv_head * group * args->num_rows + first;
    const int64_t query_stride = padded(h->key_dim, PAD), out_stride = padded(h->value_dim, PAD);
    float weights[TOGETHER * (STRIP + LANES)] __attribute__((aligned(64)));
    NAME(scores)(args, kv_head, (const float *)args->query + at * query_stride, query_stride, weights, heads, dtype);
    for (int i = 0; i < heads; i++) {
        int64_t begin, end;
        seen_keys(args, first + i, &begin, &end);
        NAME(softmax)(h, weights + i * (STRIP + LANES), args->low, args->high, begin, end, out.max + at + i,
                      out.total + at + i);
    }
    float *values = out.values + at * out_stride;
    int64_t d = 0;
#if LANES == 16
    for (; d + 4 * LANES <= h->value_dim; d += 4 * LANES) {
        NAME(weigh)(args, kv_head, weights, d, 4 * LANES, values, out_stride, heads, 2, dtype);
    }
#endif
    for (; d + 2 * LANES <= h->value_dim; d += 2 * LANES) {
        NAME(weigh)(args, kv_head, weights, d, 2 * LANES, values, out_stride, heads, 1, dtype);
    }
    if (d < h->value_dim) {
        NAME(weigh)(args, kv_head, weights, d, h->value_dim - d, values, out_stride, heads, 1, dtype);
    }
}

#define ROWS(heads, type, dtype) \
    TARGET static __attribute__((noinline)) void NAME(rows_##heads##_##type)(const strip_args *args, int64_t kv_head, \
                                                                             int64_t first, state out) { \
        NAME(rows)(args, kv_head, first, out, heads, dtype); \
    }
#define STRIP_OF(type, dtype) \
    ROWS(4, type, dtype) ROWS(2, type, dtype) ROWS(1, type, dtype) \
    TARGET static void NAME(strip_##type)(const strip_args *args, state out) { \
        const int64_t num_rows = args->num_rows * (args->heads->num_heads / args->heads->num_kv_heads); \
        for (int64_t kv_head = 0; kv_head < args->heads->num_kv_heads; kv_head++) { \
            int64_t row = 0; \
            for (; row + 4 <= num_rows; row += 4) { \
                NAME(rows_4_##type)(args, kv_head, row, out); \
            } \
            for (; row + 2 <= num_rows; row += 2) { \
                NAME(rows_2_##type)(args, kv_head, row, out); \
            } \
            for (; row < num_rows; row++) { \
                NAME(rows_1_##type)(args, kv_head, row, out); \
            } \
        } \
    }
STRIP_OF(float32, FLOAT32)
STRIP_OF(bfloat16, BFLOAT16)
STRIP_OF(float16, FLOAT16)
#undef STRIP_OF
#undef ROWS
