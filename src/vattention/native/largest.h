/* The first largest number of each row, of numbers that come in parts: with noise, a sample. */
#ifndef VATTENTION_LARGEST_H
#define VATTENTION_LARGEST_H

#include "kernels.h"

/* The first largest number of a row so far, NaN counting as largest; column is -1 before there is one. */
typedef struct {
    int64_t column;
    float value;
} vattention_best;

/* So many without a column, to be freed; or NULL where memory ran short. */
vattention_best *vattention_no_winners(int64_t count);

/* Lets the numbers of y[rows, columns], which follow column `first` of the result, compete; of at most COLUMNS. `noise` is
 * the first row's, or NULL. */
void vattention_compete(vattention_best *winners, const float *y, int64_t stride, int64_t rows, int64_t first,
                        int64_t columns, const vattention_noise *noise);

/* The best of each row, from those of [num_threads, num_rows]. */
void vattention_agree(const vattention_best *winners, int64_t num_threads, int64_t num_rows, int64_t *columns,
                      float *values);

#endif
