/* One instruction set's Gumbel noise; included once for each by whoever adds it, with
 *   SET     a name
 *   LANES   float32 numbers in a vector register
 *   TARGET  the function attribute that turns the instruction set on
 *
 * The largest of logit + temperature G, with independent G = -ln(-ln u), is a sample of the softmax of logit /
 * temperature (E. J. Gumbel, "Statistical Theory of Extreme Values and Some Practical Applications", 1954; C. Maddison
 * et al., "A* Sampling", 2014). u is a hash of the row's key and the column, so the noise is the same wherever and in
 * whatever order it is computed, and to the last bit that of model/gumbel.py: all steps are of integers, or round to
 * float32.
 */
#ifndef VATTENTION_GUMBEL_H
#define VATTENTION_GUMBEL_H

#include "kernels.h"

#include <math.h>

/* More zeros than a hash has. */
enum { GUMBEL_ZEROS = 33 };

/* Zeros that a column's hash must begin with, for its noise to lift a number of at most `most` to at least `least`;
 * GUMBEL_ZEROS where none can. Most columns are done with by this, before logarithms: noise of a hash h is at most
 * -ln((h + 1/2) / 2^32). What is taken off is more than all that rounding adds. */
INLINE int32_t gumbel_zeros(float most, float least, float temperature) {
    const float zeros = (least - most - fabsf(least) * 0x1p-22f) / temperature * 1.4426f - 0.001f;
    return !(zeros > 0.0f) ? 0 : zeros > GUMBEL_ZEROS ? GUMBEL_ZEROS : (int32_t)zeros;
}

/* Keeps compilers from rounding a product and a sum at once. */
#if defined(__x86_64__)
#define ROUNDED(x) __asm__("" : "+v"(x))
#elif defined(__aarch64__)
#define ROUNDED(x) __asm__("" : "+w"(x))
#else
#define ROUNDED(x) __asm__("" : "+m"(x))
#endif

#endif

#define JOIN2(a, b) a##_##b
#define JOIN(a, b) JOIN2(a, b)
#define NAME(name) JOIN(name, SET)

typedef float NAME(noises) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t NAME(hashes) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t NAME(wholes) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

/* The finaliser of A. Appleby's MurmurHash3. */
TARGET INLINE NAME(hashes) NAME(mixed)(NAME(hashes) x) {
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    return x ^ (x >> 16);
}

TARGET INLINE NAME(noises) NAME(product)(NAME(noises) a, NAME(noises) b) {
    NAME(noises) product = a * b;
    ROUNDED(product);
    return product;
}

/* -ln x of x > 0, off by 2e-7 of it; where x is 1 - `rest`, a `rest` that is too small for x to show counts. */
TARGET INLINE NAME(noises) NAME(negative_log)(NAME(noises) x, const NAME(noises) *rest) {
    const uint32_t root_of_half = 0x3f3504f3u;
    const NAME(hashes) shifted = (NAME(hashes))x - root_of_half;
    /* x is 2^power (1 + part), with a part from sqrt(1/2) - 1 to sqrt(2) - 1. */
    const NAME(wholes) power = (NAME(wholes))shifted >> 23;
    NAME(noises) part = (NAME(noises))((shifted & 0x007fffffu) + root_of_half) - 1.0f;
    if (rest) {
        const NAME(hashes) close = (NAME(hashes))(power == 0);
        part = (NAME(noises))(((NAME(hashes)) - *rest & close) | ((NAME(hashes))part & ~close));
    }
    static const float factors[] = {-0.172432244f, 0.199068829f, -0.249712288f, 0.333347142f, -0.500003219f, 1.0f};
    NAME(noises) y = NAME(product)(part, (NAME(noises)){0} - 0.100823775f) + 0.161805004f;
#pragma GCC unroll 6
    for (int i = 0; i < 6; i++) {
        y = NAME(product)(y, part) + factors[i];
    }
    const NAME(noises) powers = __builtin_convertvector(power, NAME(noises));
    return -(NAME(product)(powers, (NAME(noises)){0} + 0.693147181f) + NAME(product)(y, part));
}

/* The hashes of columns [first, first + LANES). */
TARGET INLINE NAME(hashes) NAME(hash)(const vattention_noise *noise, int64_t first) {
    NAME(hashes) column;
    for (int i = 0; i < LANES; i++) {
        column[i] = (uint32_t)i;
    }
    column += (uint32_t)first;
    return NAME(mixed)(NAME(mixed)(column ^ (uint32_t)noise->key) ^ (uint32_t)(noise->key >> 32));
}

/* The noise of columns with these hashes. */
TARGET INLINE NAME(noises) NAME(noise)(const vattention_noise *noise, NAME(hashes) hash) {
    /* Its distance from the nearer end of [0, 1], and whether that is the upper one. */
    const NAME(hashes) upper = (NAME(hashes))((NAME(wholes))hash >> 31);
    const NAME(noises) distance = (__builtin_convertvector((NAME(wholes))(hash ^ upper), NAME(noises)) + 0.5f) * 0x1p-32f;
    const NAME(noises) other = 1.0f - distance;
    const NAME(noises) u = (NAME(noises))(((NAME(hashes))distance & upper) | ((NAME(hashes))other & ~upper));
    const NAME(noises) gumbel = NAME(negative_log)(NAME(negative_log)(u, &distance), NULL);
    return NAME(product)(gumbel, (NAME(noises)){0} + noise->temperature);
}

#undef SET
#undef LANES
#undef TARGET
#undef NAME
#undef JOIN
#undef JOIN2
