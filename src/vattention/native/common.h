/* What the kernels share: number types, vectors, and the split of rows over torch's threads. */
#ifndef VATTENTION_COMMON_H
#define VATTENTION_COMMON_H

#include "processor.h"

#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "bfloat16 numbers are taken apart as little-endian words"
#endif

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

/* GOMP_parallel of the OpenMP runtime that torch runs on. Passed in rather than linked: a second runtime's pool of
 * spinning threads would fight for the same cores. */
typedef void (*parallel_fn)(void (*body)(void *), void *argument, unsigned num_threads, unsigned flags);

/* Compilers' functions that load matrix tiles do not say that they read memory; this keeps stores before them. */
#define TILES_READ_MEMORY __asm__ volatile("" ::: "memory")

#define INLINE static inline __attribute__((always_inline))

/* A bfloat16 as float32. */
INLINE float widened(uint16_t bits) {
    const union {
        uint32_t bits;
        float number;
    } both = {.bits = (uint32_t)bits << 16};
    return both.number;
}

#endif
