/* Root mean square normalisation: B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization" (2019). */
#include "kernels.h"

#include <math.h>

typedef struct {
    const void *x;
    const float *scale; /* or NULL for no norm */
    void *y;
    void *sum; /* to which y is added, or NULL */
    int64_t width;
    float epsilon;
    int32_t dtype;
} norm_args;

#define ROWS "norm_rows.h"
#include "rowwise_sets.h"

/* y[rows, width] = x / sqrt(mean(x^2) + epsilon) * scale, computed in float32 and rounded once. */
void vattention_rms_norm(const void *x, const float *scale, void *y, int64_t num_rows, int64_t width, float epsilon,
                         int32_t dtype, int32_t num_threads, parallel_fn parallel) {
    const norm_args args = {x, scale, y, NULL, width, epsilon, dtype};
    for_rows(best_rows(), &args, num_rows, width, num_threads, parallel);
}

/* A residual connection: sum[rows, width] += y, normalised first if there is a norm, in y itself. */
void vattention_join(const vattention_norm *norm, void *y, void *sum, int64_t num_rows, int64_t width, int32_t dtype,
                     int32_t num_threads, parallel_fn parallel) {
    const norm_args args = {y, norm->scale, y, sum, width, norm->epsilon, dtype};
    for_rows(best_rows(), &args, num_rows, width, num_threads, parallel);
}
