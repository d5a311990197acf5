/* The way of queries and keys from their linear layers to attention: normalised per head where a model does so, then
 * rotated by their positions, J. Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), in
 * the form that pairs a head's first half with its second. */
#include "kernels.h"

#include <math.h>

typedef struct {
    vattention_rotation shape;
    void *x;
    const void *cosines, *sines;
} rotate_args;

#define ROWS "rotate_rows.h"
#include "rowwise_sets.h"

/* In place: x[num_tokens, width] = (query heads, key heads, the rest), cosines and sines[num_tokens, head_dim]. */
void vattention_rotate(const vattention_rotation *shape, void *x, const void *cosines, const void *sines,
                       int64_t num_tokens, int32_t num_threads, parallel_fn parallel) {
    const rotate_args args = {*shape, x, cosines, sines};
    for_rows(best_rows(), &args, num_tokens, shape->width, num_threads, parallel);
}
