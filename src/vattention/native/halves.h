/* Numbers of 8 bits, raised by 128, from lines of their halves (quantized.c), on processors with AVX-512. */
#ifndef VATTENTION_HALVES_H
#define VATTENTION_HALVES_H

#include "kernels.h"

#include <immintrin.h>

#define HALVES_TARGET __attribute__((target("avx512f,avx512bw,avx512vl")))

/* Bits of `a` where a byte's upper half is, of `b` elsewhere. */
HALVES_TARGET INLINE __m512i upper_of(__m512i a, __m512i b) {
    return _mm512_ternarylogic_epi64(_mm512_set1_epi8((char)0xf0), a, b, 0xca);
}

HALVES_TARGET INLINE __m512i first_halves(__m512i upper, __m512i lower) {
    return upper_of(_mm512_slli_epi16(upper, 4), lower);
}

HALVES_TARGET INLINE __m512i second_halves(__m512i upper, __m512i lower) {
    return upper_of(upper, _mm512_srli_epi16(lower, 4));
}

#endif
