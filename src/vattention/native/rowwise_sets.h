/* The function that computes rows, `rows` in the file ROWS, for each instruction set, and the choice at run time. */
#include "rowwise.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifdef HAVE_AVX512
#define SET avx512
#define TARGET AVX512_TARGET
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
#ifdef HAVE_AVX2
#define SET avx2
#define TARGET AVX2_TARGET
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
#ifdef HAVE_AVX512
    if (has_avx512()) {
        return rows_avx512;
    }
#endif
#ifdef HAVE_AVX2
    if (has_avx2()) {
        return rows_avx2;
    }
#endif
    return rows_baseline;
}
