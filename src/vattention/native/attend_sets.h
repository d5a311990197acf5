/* Attention over a strip of keys for each instruction set, and the choice at run time. */
#include "kernels.h"

#include <float.h>
#include <math.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(type, a, b, ...) __builtin_shuffle(a, b, (type){__VA_ARGS__})
#endif

/* Most keys in a strip. */
enum { STRIP = 128 };
/* Numbers of a head are padded with zeros to a multiple of this, two of the widest vectors. */
enum { PAD = 32 };
/* Keys between those that are multiplied and those that memory is asked for. */
enum { KEYS_AHEAD = 8 };
/* Query rows that go over the keys together. */
enum { TOGETHER = 4 };

/* Query rows of one sequence that share a kv head lie together: number (kv head, row, head of the group). */
typedef struct {
    const vattention_heads *heads;
    const char *query;    /* as prepared */
    const char *arranged; /* the same, for sets that want it otherwise */
    int64_t num_rows, start;
    int64_t base;      /* the strip's key 0; it may lie before the keys to read */
    int64_t low, high; /* keys to read, from base */
    const char *keys[STRIP], *values[STRIP]; /* of kv head 0 */
    int even;                                /* 16 of them, from a multiple on, are the same distance apart */
    int64_t key_head_nbytes, value_head_nbytes;
} strip_args;

/* What is known of some keys: for each of n query rows the largest score, the sum of weights relative to it, and the
 * weighted sum of values, which each instruction set keeps in an order of its own. */
typedef struct {
    float *max, *total; /* [n], padded to whole vectors */
    float *values;      /* [n, value_dim padded] */
} state;

typedef struct {
    void (*prepare)(const void *x, void *query, int64_t dim, int32_t dtype);
    void (*arrange)(const strip_args *args, char *to); /* or NULL */
    void (*strip[3])(const strip_args *args, state out);
    void (*fold)(state into, state from, int64_t n, int64_t padded_dim);
    void (*finish)(const float *values, float total, void *y, int64_t dim, int32_t dtype);
} attend_set;

static int64_t padded(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/* The strip's keys that a query row sees, by its number among those that share a kv head. */
INLINE void seen_keys(const strip_args *args, int64_t number, int64_t *begin, int64_t *end) {
    const vattention_heads *h = args->heads;
    const int64_t position = args->start + number / (h->num_heads / h->num_kv_heads) - args->base;
    const int64_t low = h->window > 0 && position >= h->window ? position - h->window + 1 : 0;
    *begin = low > args->low ? low : args->low;
    *end = position + 1 < args->high ? position + 1 : args->high;
}

#ifdef HAVE_PAIRS
#define SET avx512_bf16
#define LANES 16
#define LANE_LIST LANES16
#define DOT
#define MASKED
#define TARGET PAIRS_TARGET
#include "attend_set.h"
#endif
#ifdef HAVE_TILES
#include "attend_amx.h"
#endif
#ifdef HAVE_AVX512
#define SET avx512
#define LANES 16
#define LANE_LIST LANES16
#define MASKED
#define TARGET AVX512_TARGET
#include "attend_set.h"
#endif
#ifdef HAVE_AVX2
#define SET avx2
#define LANES 8
#define LANE_LIST LANES8
#define TARGET AVX2_TARGET
#include "attend_set.h"
#endif
#define SET baseline
#define LANES 4
#define LANE_LIST LANES4
#define TARGET
#include "attend_set.h"

/* The best this processor runs for these heads. */
static const attend_set *set_for(const vattention_heads *heads, int32_t dtype) {
#ifdef HAVE_TILES
    if (amx_suits(heads) && dtype == BFLOAT16 && vattention_has_tiles() == 2) {
        return &set_amx;
    }
#endif
    (void)heads, (void)dtype;
#ifdef HAVE_PAIRS
    if (has_pairs()) {
        return &set_avx512_bf16;
    }
#endif
#ifdef HAVE_AVX512
    if (has_avx512()) {
        return &set_avx512;
    }
#endif
#ifdef HAVE_AVX2
    if (has_avx2()) {
        return &set_avx2;
    }
#endif
    return &set_baseline;
}
