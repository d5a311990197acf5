/* Root mean square normalisation: B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization" (2019). */
#include "rowwise.h"

#include <math.h>

typedef struct {
    const void *x;
    const float *scale;
    void *y;
    int64_t width;
    float epsilon;
    int32_t dtype;
} norm_args;

INLINE void norm(const norm_args *args, int64_t first, int64_t last, const int32_t dtype) {
    const int64_t width = args->width;
    for (int64_t row = first; row < last; row++) {
        const int64_t at = row * width;
        floats16 squares = {0};
        for (int64_t i = 0; i < width; i += LANES16) {
            const floats16 x = load16(args->x, at + i, width - i, dtype);
            squares += x * x;
        }
        float sum = 0.0f;
        for (int lane = 0; lane < LANES16; lane++) {
            sum += squares[lane];
        }
        const float factor = 1.0f / sqrtf(sum / (float)width + args->epsilon);
        for (int64_t i = 0; i < width; i += LANES16) {
            const floats16 x = load16(args->x, at + i, width - i, dtype);
            const floats16 scale = load16(args->scale, i, width - i, FLOAT32);
            store16(args->y, at + i, width - i, dtype, x * factor * scale);
        }
    }
}

CLONES static void norm_rows(const void *arguments, int64_t first, int64_t last) {
    const norm_args *args = arguments;
    if (args->dtype == FLOAT32) {
        norm(args, first, last, FLOAT32);
    } else {
        norm(args, first, last, BFLOAT16);
    }
}

/* y[rows, width] = x / sqrt(mean(x^2) + epsilon) * scale, computed in float32 and rounded once. */
void vattention_rms_norm(const void *x, const float *scale, void *y, int64_t num_rows, int64_t width, float epsilon,
                         int32_t dtype, int32_t num_threads, parallel_fn parallel) {
    const norm_args args = {x, scale, y, width, epsilon, dtype};
    for_rows(norm_rows, &args, num_rows, width, num_threads, parallel);
}
