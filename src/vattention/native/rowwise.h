/* Kernels that compute each row of y from the same row of x, and the split of rows over threads. */
#ifndef VATTENTION_ROWWISE_H
#define VATTENTION_ROWWISE_H

#include "common.h"

#include "rowwise_numbers.h"

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
