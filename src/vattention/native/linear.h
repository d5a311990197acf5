/* What both kinds of linear layers share. */
#ifndef VATTENTION_LINEAR_H
#define VATTENTION_LINEAR_H

#include "common.h"

/* Output columns in a panel of a packed weight. */
enum { COLUMNS = 32 };

typedef struct {
    const void *packed;
    const float *bias; /* padded to whole panels, or NULL */
    int64_t num_out;
    int64_t num_in;
    int32_t dtype;
} vattention_weight;

/* Multiplications below which waking the other threads takes longer than they save. */
enum { ALONE = 1 << 16 };

#endif
