/* One instruction set's attention over a strip of keys; included once for each by attend_sets.h with
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

#include "attend_numbers.h"
#include "attend_strip.h"

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
        const NAME(floats) keep = NAME(exp_below)(*max - most), add = NAME(exp_below)(other - most);
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
