/* A batch without the rows that nobody wants to see: in the last layer, only their keys and values are of use. */
#include "kernels.h"

#include <string.h>

/* Bytes of the spans that `vattention_narrow` makes. */
int64_t vattention_narrow_nbytes(const vattention_batch *batch) {
    return 2 * batch->num_wanted * (int64_t)sizeof(vattention_span);
}

/* The first span from `at` on that does not end before the row. */
static const vattention_span *until(const vattention_span *at, const vattention_span *end, int64_t row) {
    while (at < end && at->first_row + at->num_rows <= row) {
        at++;
    }
    return at;
}

/* Narrows a batch, rows[num_tokens, ...] and x[num_tokens, ...] to the rows that are wanted; `spans` is for the new ones.
 * What was a long span stays one, so that the same kernel computes it. */
void vattention_narrow(vattention_batch *batch, void *spans, void *rows, int64_t row_nbytes, void *x, int64_t x_nbytes) {
    const vattention_span *of_one = batch->short_spans, *of_more = batch->long_spans;
    const vattention_span *end_of_one = of_one + batch->num_short, *end_of_more = of_more + batch->num_long;
    vattention_span *shorts = spans, *longs = shorts + batch->num_wanted;
    int64_t num_short = 0, num_long = 0;
    for (int64_t i = 0; i < batch->num_wanted; i++) {
        const int64_t row = batch->wanted[i];
        of_one = until(of_one, end_of_one, row);
        of_more = until(of_more, end_of_more, row);
        memmove((char *)rows + i * row_nbytes, (char *)rows + row * row_nbytes, (size_t)row_nbytes);
        memmove((char *)x + i * x_nbytes, (char *)x + row * x_nbytes, (size_t)x_nbytes);
        if (of_one < end_of_one && of_one->first_row <= row) {
            shorts[num_short++] = (vattention_span){of_one->slot, i, 1, of_one->start};
            continue;
        }
        const int64_t position = of_more->start + row - of_more->first_row;
        vattention_span *last = num_long > 0 ? &longs[num_long - 1] : NULL;
        if (last && last->slot == of_more->slot && last->start + last->num_rows == position) {
            last->num_rows++;
        } else {
            longs[num_long++] = (vattention_span){of_more->slot, i, 1, position};
        }
    }
    batch->num_tokens = batch->num_wanted;
    batch->short_spans = shorts;
    batch->long_spans = longs;
    batch->num_short = num_short;
    batch->num_long = num_long;
}
