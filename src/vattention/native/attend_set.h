/* One instruction set's attention over a strip of keys; included once for each by attend.c with
 *   SET        a name
 *   LANES      float32 numbers in a vector register
 *   LANE_LIST  LANES4, LANES8 or LANES16, which apply a macro to each lane's number
 *   DOT        defined where there is an instruction that multiplies pairs of bfloat16
 *   MASKED     defined where parts of a vector can be loaded
 *   TARGET     the function attribute that turns the instruction set on
 *
 * Two vectors at a time: of 2 LANES numbers in 16 bits the first has those of even index and the second those of odd
 * index, since that is how words come apart most cheaply; of float32 they are the lower and the upper half. Queries
 * are prepared in that order, and sums of values leave it when they are finished.
 */
#define JOIN2(a, b) a##_##b
#define JOIN(a, b) JOIN2(a, b)
#define NAME(name) JOIN(name, SET)

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

TARGET INLINE NAME(floats) NAME(choose)(NAME(ints) condition, NAME(floats) yes, NAME(floats) no) {
    return (NAME(floats))((condition & (NAME(ints))yes) | (~condition & (NAME(ints))no));
}

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

/* e^x for x <= 0, as 2^n e^r with |r| <= ln(2) / 2 and e^r by its Taylor series, good to float32's rounding. Results
 * too small for a normal number are 0. */
TARGET INLINE NAME(floats) NAME(exp)(NAME(floats) x) {
    const float log2e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    const NAME(ints) tiny = (NAME(ints))(x < -87.0f);
    x = NAME(choose)(tiny, (NAME(floats)){0}, x);
    /* Adding and taking away 1.5 * 2^23 rounds to a whole number. */
    const NAME(floats) n = (x * log2e + 12582912.0f) - 12582912.0f;
    const NAME(floats) r = (x - n * ln2_high) - n * ln2_low;
    NAME(floats) e = r * (1.0f / 5040) + 1.0f / 720;
    e = e * r + 1.0f / 120;
    e = e * r + 1.0f / 24;
    e = e * r + 1.0f / 6;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    const NAME(ints) power = (__builtin_convertvector(n, NAME(ints)) + 127) << 23;
    return NAME(choose)(tiny, (NAME(floats)){0}, e * (NAME(floats))power);
}

/* tanh, near 0 by J. H. Lambert's continued fraction, whose relative error below 1 is 1e-9, elsewhere by e^-2|x|. */
TARGET INLINE NAME(floats) NAME(tanh)(NAME(floats) x) {
    const NAME(floats) z = x * x;
    const NAME(floats) near = x * (10395.0f + z * (1260.0f + z * 21.0f)) / (10395.0f + z * (4725.0f + z * (210.0f + z)));
    const NAME(floats) positive = (NAME(floats))((NAME(words))x & 0x7fffffffu);
    const NAME(floats) e = NAME(exp)(positive * -2.0f);
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
        const NAME(floats) weights = NAME(exp)(*(NAME(floats) *)(scores + j) - most);
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
        const int64_t position = args->start + (first + i) / group - args->base;
        const int64_t low = h->window > 0 && position >= h->window ? position - h->window + 1 : 0;
        const int64_t begin = low > args->low ? low : args->low;
        const int64_t end = position + 1 < args->high ? position + 1 : args->high;
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

/* One query row from memory, padded with zeros. */
TARGET static void NAME(prepare)(const void *x, void *query, int64_t dim, int32_t dtype) {
#ifdef DOT
    if (dtype == BFLOAT16) {
        memcpy(query, x, (size_t)dim * 2);
        memset((uint16_t *)query + dim, 0, (size_t)(padded(dim, PAD) - dim) * 2);
        return;
    }
#endif
    const int item = dtype == FLOAT32 ? 4 : 2;
    for (int64_t d = 0; d < dim; d += 2 * LANES) {
        const NAME(pair) both = NAME(load)((const char *)x + d * item, dim - d, dtype);
        *(NAME(floats) *)((float *)query + d) = both.first;
        *(NAME(floats) *)((float *)query + d + LANES) = both.second;
    }
}

TARGET static void NAME(fold)(state into, state from, int64_t n, int64_t padded_dim) {
    for (int64_t row = 0; row < n; row += LANES) {
        NAME(floats) *max = (NAME(floats) *)(into.max + row), *total = (NAME(floats) *)(into.total + row);
        const NAME(floats) other = *(const NAME(floats) *)(from.max + row);
        const NAME(floats) most = NAME(choose)((NAME(ints))(other > *max), other, *max);
        const NAME(floats) keep = NAME(exp)(*max - most), add = NAME(exp)(other - most);
        *total = *total * keep + *(const NAME(floats) *)(from.total + row) * add;
        *max = most;
        for (int64_t i = row; i < n && i < row + LANES; i++) {
            float *values = into.values + i * padded_dim;
            const float *others = from.values + i * padded_dim;
            for (int64_t d = 0; d < padded_dim; d += LANES) {
                NAME(floats) *at = (NAME(floats) *)(values + d);
                *at = *at * keep[i - row] + *(const NAME(floats) *)(others + d) * add[i - row];
            }
        }
    }
}

/* y = values / total in the order of memory; in float32 also for float16. */
TARGET static void NAME(finish)(const float *values, float total, void *y, int64_t dim, int32_t dtype) {
    const float factor = 1.0f / total;
    for (int64_t d = 0; d < dim; d += 2 * LANES) {
        const NAME(floats) first = *(const NAME(floats) *)(values + d) * factor;
        const NAME(floats) second = *(const NAME(floats) *)(values + d + LANES) * factor;
        const int64_t count = dim - d < 2 * LANES ? dim - d : 2 * LANES;
        if (dtype == BFLOAT16) {
            const NAME(words) both = NAME(to_bfloat16)(first) | NAME(to_bfloat16)(second) << 16;
            memcpy((uint16_t *)y + d, &both, (size_t)count * 2);
            continue;
        }
        float ordered[2 * LANES];
        for (int i = 0; i < LANES; i++) {
            ordered[dtype == FLOAT32 ? i : 2 * i] = first[i];
            ordered[dtype == FLOAT32 ? LANES + i : 2 * i + 1] = second[i];
        }
        memcpy((float *)y + d, ordered, (size_t)count * 4);
    }
}

static const attend_set NAME(set) = {
    .prepare = NAME(prepare),
    .strip = {NAME(strip_float32), NAME(strip_bfloat16), NAME(strip_float16)},
    .fold = NAME(fold),
    .finish = NAME(finish),
};

#undef SET
#undef LANES
#undef LANE_LIST
#undef DOT
#undef MASKED
#undef TARGET
#undef NAME
#undef JOIN
#undef JOIN2
