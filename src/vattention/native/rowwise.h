/* Kernels that compute each row of y from the same row of x: vectors of 16 numbers, and the split over threads. */
#ifndef VATTENTION_ROWWISE_H
#define VATTENTION_ROWWISE_H

#include "common.h"

#include <string.h>

/* The compiler emits each function for these instruction sets and picks one when the library is loaded. */
#if defined(__x86_64__) && VATTENTION_LANES >= 16
#define CLONES __attribute__((target_clones("arch=skylake-avx512", "avx2,fma", "default")))
#elif defined(__x86_64__) && VATTENTION_LANES >= 8
#define CLONES __attribute__((target_clones("avx2,fma", "default")))
#else
#define CLONES
#endif

enum { LANES16 = 16 };
typedef float floats16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t words16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ints16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t halves16 __attribute__((vector_size(32), aligned(2), may_alias));

/* Up to 16 numbers of either type from x[i], the rest zeros. */
INLINE floats16 load16(const void *x, int64_t i, int64_t count, int32_t dtype) {
    if (dtype == FLOAT32) {
        floats16 out = {0};
        if (count >= LANES16) {
            return *(const floats16 *)((const float *)x + i);
        }
        memcpy(&out, (const float *)x + i, (size_t)count * 4);
        return out;
    }
    halves16 bits = {0};
    if (count >= LANES16) {
        bits = *(const halves16 *)((const uint16_t *)x + i);
    } else {
        memcpy(&bits, (const uint16_t *)x + i, (size_t)count * 2);
    }
    return (floats16)(__builtin_convertvector(bits, words16) << 16);
}

/* Stores up to 16 numbers to y[i], in bfloat16 rounded to nearest even, NaN kept. */
INLINE void store16(void *y, int64_t i, int64_t count, int32_t dtype, floats16 values) {
    const size_t n = count >= LANES16 ? LANES16 : (size_t)count;
    if (dtype == FLOAT32) {
        memcpy((float *)y + i, &values, n * 4);
        return;
    }
    const words16 bits = (words16)values;
    const words16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const words16 nan = (words16)(values != values);
    const halves16 out = __builtin_convertvector((rounded & ~nan) | (((bits >> 16) | 0x40u) & nan), halves16);
    memcpy((uint16_t *)y + i, &out, n * 2);
}

typedef void (*rows_fn)(const void *arguments, int64_t first, int64_t last);

typedef struct {
    rows_fn rows;
    const void *arguments;
    int64_t num_rows, rows_each;
    int64_t next; /* taken atomically */
} rows_job;

static void rows_work(void *argument) {
    rows_job *job = argument;
    for (;;) {
        const int64_t first = __atomic_fetch_add(&job->next, job->rows_each, __ATOMIC_RELAXED);
        if (first >= job->num_rows) {
            return;
        }
        const int64_t last = first + job->rows_each;
        job->rows(job->arguments, first, last < job->num_rows ? last : job->num_rows);
    }
}

/* Numbers below which one thread is faster than waking others. */
enum { ALONE_NUMBERS = 1 << 14 };

static void for_rows(rows_fn rows, const void *arguments, int64_t num_rows, int64_t width, int32_t num_threads,
                     parallel_fn parallel) {
    if (num_threads == 1 || num_rows * width < ALONE_NUMBERS) {
        rows(arguments, 0, num_rows);
        return;
    }
    rows_job job = {.rows = rows, .arguments = arguments, .num_rows = num_rows};
    job.rows_each = num_rows / (4 * num_threads) + 1;
    parallel(rows_work, &job, (unsigned)num_threads, 0);
}

#endif
