/* Which number of a row is the largest, alone or with Gumbel noise. */
#include "largest.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* y[COLUMNS] with the noise of columns from `first` on, if any of their hashes begins with so many zeros. */
#define PERTURB(set, lanes) \
    static int perturb_##set(const vattention_noise *noise, int64_t first, int32_t zeros, float *y) { \
        uint32_t own[COLUMNS], least = UINT32_MAX; \
        for (int i = 0; i < COLUMNS; i += lanes) { \
            *(hashes_##set *)(own + i) = hash_##set(noise, first + i); \
        } \
        for (int i = 0; i < COLUMNS; i++) { \
            least = own[i] < least ? own[i] : least; \
        } \
        if (least > UINT64_C(0xffffffff) >> zeros) { \
            return 0; \
        } \
        for (int i = 0; i < COLUMNS; i += lanes) { \
            *(noises_##set *)(y + i) += noise_##set(noise, *(const hashes_##set *)(own + i)); \
        } \
        return 1; \
    }

#ifdef HAVE_AVX512
#define SET avx512
#define LANES 16
#define TARGET AVX512_TARGET
#include "gumbel.h"
AVX512_TARGET PERTURB(avx512, 16)
#endif
#ifdef HAVE_AVX2
#define SET avx2
#define LANES 8
#define TARGET AVX2_TARGET
#include "gumbel.h"
AVX2_TARGET PERTURB(avx2, 8)
#endif
#define SET baseline
#define LANES 4
#define TARGET
#include "gumbel.h"
PERTURB(baseline, 4)

/* The best this processor runs, found once as the library is loaded. */
static int (*perturb)(const vattention_noise *, int64_t, int32_t, float *) = perturb_baseline;

__attribute__((constructor)) static void find_best(void) {
#ifdef HAVE_AVX2
    if (has_avx2()) {
        perturb = perturb_avx2;
    }
#endif
#ifdef HAVE_AVX512
    if (has_avx512()) {
        perturb = perturb_avx512;
    }
#endif
}

static int larger(float a, float b) { return a > b || (a != a && b == b); }

/* Whether a number takes the winner's place; of equal ones the first stays, in whatever order they come. */
static int beats(int64_t column, float value, const vattention_best *winner) {
    return winner->column < 0 || larger(value, winner->value) ||
           (column < winner->column && !larger(winner->value, value));
}

typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t four_words __attribute__((vector_size(16), aligned(4), may_alias));

INLINE four larger_four(four a, four b) {
    const four_words first = a > b;
    return (four)(((four_words)a & first) | ((four_words)b & ~first));
}

/* The largest of y[COLUMNS], which is NaN if any of them is. */
static float largest(const float *y) {
    const four *parts = (const four *)y;
    four even = parts[0], odd = parts[1];
    four_words nan = (even != even) | (odd != odd);
#pragma GCC unroll 4
    for (int i = 2; i < COLUMNS / 4; i += 2) {
        even = larger_four(parts[i], even);
        odd = larger_four(parts[i + 1], odd);
        nan |= (parts[i] != parts[i]) | (parts[i + 1] != parts[i + 1]);
    }
    if (nan[0] | nan[1] | nan[2] | nan[3]) {
        return NAN;
    }
    const four most = larger_four(even, odd);
    const float left = most[0] > most[1] ? most[0] : most[1], right = most[2] > most[3] ? most[2] : most[3];
    return left > right ? left : right;
}

vattention_best *vattention_no_winners(int64_t count) {
    vattention_best *winners = malloc((size_t)count * sizeof(vattention_best));
    for (int64_t i = 0; winners && i < count; i++) {
        winners[i].column = -1;
    }
    return winners;
}

void vattention_compete(vattention_best *winners, const float *y, int64_t stride, int64_t rows, int64_t first,
                        int64_t columns, const vattention_noise *noise) {
    for (int64_t m = 0; m < rows; m++, y += stride) {
        vattention_best *winner = &winners[m];
        const float *own = y;
        float copy[COLUMNS];
        if (columns < COLUMNS) {
            for (int64_t i = 0; i < COLUMNS; i++) {
                copy[i] = i < columns ? y[i] : -INFINITY;
            }
            own = copy;
        }
        float most = largest(own);
        if (noise && noise[m].temperature > 0.0f) {
            const int32_t zeros = winner->column < 0 ? 0 : gumbel_zeros(most, winner->value, noise[m].temperature);
            if (zeros == GUMBEL_ZEROS) {
                continue;
            }
            memmove(copy, own, sizeof(copy));
            if (!perturb(&noise[m], first, zeros, copy)) {
                continue;
            }
            own = copy;
            most = largest(own);
        }
        if (!beats(first, most, winner)) {
            continue;
        }
        for (int64_t i = 0; i < columns; i++) {
            if (beats(first + i, own[i], winner)) {
                *winner = (vattention_best){first + i, own[i]};
            }
        }
    }
}

void vattention_agree(const vattention_best *winners, int64_t num_threads, int64_t num_rows, int64_t *columns,
                      float *values) {
    for (int64_t m = 0; m < num_rows; m++) {
        vattention_best best = {.column = -1};
        for (int64_t i = m; i < num_threads * num_rows; i += num_rows) {
            const vattention_best *own = &winners[i];
            if (own->column >= 0 && beats(own->column, own->value, &best)) {
                best = *own;
            }
        }
        columns[m] = best.column;
        values[m] = best.value;
    }
}

typedef struct {
    const float *y;
    int64_t y_stride, num_rows, num_columns;
    const vattention_noise *noise;
    vattention_best *winners; /* [threads, num_rows] */
    int64_t next_thread, next_item; /* taken atomically */
} job;

/* Columns that a thread takes at a time. */
enum { TOGETHER = 1 << 13 };

static void work(void *argument) {
    job *j = argument;
    vattention_best *winners = j->winners + j->num_rows * __atomic_fetch_add(&j->next_thread, 1, __ATOMIC_RELAXED);
    const int64_t groups = (j->num_columns + TOGETHER - 1) / TOGETHER;
    for (;;) {
        const int64_t item = __atomic_fetch_add(&j->next_item, 1, __ATOMIC_RELAXED);
        const int64_t row = item / groups, begin = item % groups * TOGETHER;
        if (row >= j->num_rows) {
            break;
        }
        const int64_t end = begin + TOGETHER < j->num_columns ? begin + TOGETHER : j->num_columns;
        for (int64_t column = begin; column < end; column += COLUMNS) {
            vattention_compete(winners + row, j->y + row * j->y_stride + column, j->y_stride, 1, column,
                               end - column < COLUMNS ? end - column : COLUMNS, j->noise ? j->noise + row : NULL);
        }
    }
}

/* Each row's first largest number of y[num_rows, num_columns] with its noise, which is NULL or one for each row; as
 * `vattention_largest` of the product y. Returns 0, or -1 where memory ran short. */
int32_t vattention_largest_of(const float *y, int64_t y_stride, int64_t num_rows, int64_t num_columns,
                              const vattention_noise *noise, int64_t *columns, float *values, int32_t num_threads, parallel_fn parallel) {
    job j = {.y = y, .y_stride = y_stride, .num_rows = num_rows, .num_columns = num_columns, .noise = noise};
    j.winners = vattention_no_winners(num_threads * num_rows);
    if (j.winners == NULL) {
        return -1;
    }
    if (num_threads == 1) {
        work(&j);
    } else {
        parallel(work, &j, (unsigned)num_threads, 0);
    }
    vattention_agree(j.winners, num_threads, num_rows, columns, values);
    free(j.winners);
    return 0;
}
