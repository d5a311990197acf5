/* The function that computes rows, `rows` in the file ROWS, for each instruction set, and the choice at run time. */
#include "rowwise.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__x86_64__) && VATTENTION_LANES >= 16
#define SET avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx2,fma")))
#define AVX512_SET
#include "rowwise_set.h"
#include ROWS
#undef AVX512_SET
#undef SET
#undef TARGET
#undef NAME
#undef JOIN
#undef JOIN2
#endif
#if defined(__x86_64__) && VATTENTION_LANES >= 8
#define SET avx2
#define TARGET __attribute__((target("avx2,fma")))
#include "rowwise_set.h"
#include ROWS
#undef SET
#undef TARGET
#undef NAME
#undef JOIN
#undef JOIN2
#endif
#define SET baseline
#define TARGET
#include "rowwise_set.h"
#include ROWS

/* The best this processor runs. */
static rows_fn best_rows(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
#if defined(__x86_64__) && VATTENTION_LANES >= 16
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
        return rows_avx512;
    }
#endif
#if defined(__x86_64__) && VATTENTION_LANES >= 8
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return rows_avx2;
    }
#endif
    return rows_baseline;
}
