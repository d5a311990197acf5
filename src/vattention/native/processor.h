/* Which instruction sets kernels are compiled for, and which of them this processor has. */
#ifndef VATTENTION_PROCESSOR_H
#define VATTENTION_PROCESSOR_H

/* The widest vectors of float32 that may be used, if the processor has them; tests lower it. */
#ifndef VATTENTION_LANES
#define VATTENTION_LANES 16
#endif

/* Whether instructions that multiply bfloat16 may be used, if the processor has them: 1 for pairs, 2 for matrix tiles
 * too; tests lower it. Without them there are none that multiply bytes either. */
#ifndef VATTENTION_DOT
#define VATTENTION_DOT 2
#endif

/* What this compiler knows: vectors of 8 and of 16 numbers, products of pairs of bfloat16 (AVX512_BF16) and of bytes
 * (VNNI), and matrix tiles (AMX), which need the system as well. */
#if defined(__x86_64__)
#if VATTENTION_LANES >= 8
#define HAVE_AVX2
#endif
#if VATTENTION_LANES >= 16
#define HAVE_AVX512
#if VATTENTION_DOT && (defined(__clang__) || __GNUC__ >= 9)
#define HAVE_BYTES
#endif
#if VATTENTION_DOT && (defined(__clang__) || __GNUC__ >= 10)
#define HAVE_PAIRS
#endif
#if VATTENTION_DOT > 1 && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define HAVE_TILES
#endif
#endif
#endif

#define AVX2_TARGET __attribute__((target("avx2,fma")))
#define AVX512_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx2,fma")))
#define PAIRS_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma")))

/* Whether functions for each of these can run here. Asking costs some loads: the compiler's library looks once. */
static inline int has_avx2(void) {
#ifdef HAVE_AVX2
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 0;
#endif
}

static inline int has_avx512(void) {
#ifdef HAVE_AVX512
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#else
    return 0;
#endif
}

static inline int has_pairs(void) {
#ifdef HAVE_PAIRS
    return has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
    return 0;
#endif
}

static inline int has_bytes(void) {
#ifdef HAVE_BYTES
    return has_avx512() && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
#else
    return 0;
#endif
}

#endif
