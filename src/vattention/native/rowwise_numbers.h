/* Vectors of 16 numbers, as rowwise_set.h takes them. */
#ifndef VATTENTION_ROWWISE_NUMBERS_H
#define VATTENTION_ROWWISE_NUMBERS_H

#include "common.h"

#include <string.h>

enum { LANES16 = 16 };
typedef float floats16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t words16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ints16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t halves16 __attribute__((vector_size(32), aligned(2), may_alias));

#endif
