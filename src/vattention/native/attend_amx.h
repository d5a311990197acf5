/* Attention over a strip of keys by matrix tiles (AMX) of bfloat16; included by attend_sets.h.
 *
 * A lane is a query row and one of the heads that share a kv head. Keys are the first factor of the scores, as they lie in
 * the cache, and 16 lanes the second. Weights are the first factor of the sums, as two numbers of bfloat16 each, and pairs
 * of values the second: of each 32 numbers, those whose third bit is 0 come before the others, which is how words
 * of two vectors interleave most cheaply. Values leave that order when they are finished.
 */
#define AMX_TARGET \
    __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")))
#define TRANSPOSE_TARGET AMX_TARGET
#include "transpose.h"
#define EXP_TARGET AMX_TARGET
#include "exp2.h"

/* Rows of a matrix tile, its bytes, and the keys that one weighs. */
enum { TILE = 16, TILE_NBYTES = 1024, WEIGHED = 32 };
/* Numbers that a head may have, and heads that shall share keys, for vectors to be slower. */
enum { AMX_DIM = 128, AMX_GROUP = 4 };

static int amx_suits(const vattention_heads *heads) {
    return heads->num_heads / heads->num_kv_heads >= AMX_GROUP && heads->key_dim % 32 == 0 && heads->key_dim <= AMX_DIM &&
           heads->value_dim % 32 == 0 && heads->value_dim <= AMX_DIM;
}

/* Prepared queries as second factors: of each kv head and each 16 lanes tiles [dim / 32] of 16 pairs of dims. */
AMX_TARGET static void amx_arrange(const strip_args *args, char *to) {
    const vattention_heads *h = args->heads;
    const int64_t num_lanes = args->num_rows * (h->num_heads / h->num_kv_heads), stride = padded(h->key_dim, PAD);
    for (int64_t kv_head = 0; kv_head < h->num_kv_heads; kv_head++) {
        const float *query = (const float *)args->query + kv_head * num_lanes * stride;
        for (int64_t lane = 0; lane < num_lanes; lane += TILE) {
            for (int64_t k = 0; k < h->key_dim; k += 32, to += TILE_NBYTES) {
                __m512i rows[TILE];
#pragma GCC unroll 16
                for (int i = 0; i < TILE; i++) {
                    const uint16_t *own = (const uint16_t *)(query + (lane + i) * stride) + k;
                    rows[i] = lane + i < num_lanes ? _mm512_loadu_si512(own) : _mm512_setzero_si512();
                }
                transpose(rows);
#pragma GCC unroll 16
                for (int i = 0; i < TILE; i++) {
                    _mm512_store_si512(to + 64 * i, rows[i]);
                }
            }
        }
    }
}

/* 16 keys of a kv head as a first factor's rows, which are as far apart as `stride` becomes: as they lie in the cache
 * where they do so evenly, elsewhere copied to `copy`. Keys that are not to be read are zeros. */
AMX_TARGET INLINE const char *amx_keys(const strip_args *args, int64_t kv_head, int64_t first, char *copy,
                                       int64_t *stride) {
    const int64_t offset = kv_head * args->key_head_nbytes, nbytes = args->heads->key_dim * 2;
    if (args->even && first >= args->low && first + TILE <= args->high) {
        *stride = args->keys[first + 1] - args->keys[first];
        return args->keys[first] + offset;
    }
    *stride = nbytes;
    for (int64_t i = 0; i < TILE; i++) {
        if (first + i < args->low || first + i >= args->high) {
            memset(copy + i * nbytes, 0, (size_t)nbytes);
        } else {
            memcpy(copy + i * nbytes, args->keys[first + i] + offset, (size_t)nbytes);
        }
    }
    return copy;
}

/* Asks memory for the values of 16 keys and for 16 keys some way ahead, of all kv heads. */
AMX_TARGET INLINE void amx_fetch(const strip_args *args, int64_t first) {
    const vattention_heads *h = args->heads;
    const int64_t end = first + TILE < args->high ? first + TILE : args->high;
    for (int64_t i = first > args->low ? first : args->low; i < end; i++) {
        const int64_t ahead = i + 2 * TILE;
        for (int64_t head = 0; head < h->num_kv_heads; head++) {
            const char *value = args->values[i] + head * args->value_head_nbytes;
            for (int64_t line = 0; line < h->value_dim * 2; line += 64) {
                __builtin_prefetch(value + line, 0, 2);
            }
            if (ahead < args->high) {
                const char *key = args->keys[ahead] + head * args->key_head_nbytes;
                for (int64_t line = 0; line < h->key_dim * 2; line += 64) {
                    __builtin_prefetch(key + line, 0, 3);
                }
            }
        }
    }
}

/* scores[lane, STRIP] of 16 keys from `first` on, of 16 lanes or, if `few`, of 8. */
AMX_TARGET INLINE void amx_turn(const float *sums, int64_t first, float *scores, const int few) {
    __m512i rows[TILE];
    if (few) {
        transpose_narrow((const int32_t *)sums, TILE, rows);
    } else {
#pragma GCC unroll 16
        for (int i = 0; i < TILE; i++) {
            rows[i] = _mm512_load_si512(sums + i * TILE);
        }
        transpose(rows);
    }
#pragma GCC unroll 16
    for (int i = 0; i < TILE; i++) {
        if (few && i == TILE / 2) {
            break;
        }
        _mm512_store_si512(scores + i * STRIP + first, rows[i]);
    }
}

/* scores[lane, STRIP] of the strip's keys and the lanes of `query`. */
AMX_TARGET INLINE void amx_scores(const strip_args *args, int64_t kv_head, const char *query, int fetches, float *scores,
                                  const int few) {
    const int64_t dim = args->heads->key_dim;
    float sums[2][TILE * TILE] __attribute__((aligned(64)));
    char copies[2][TILE * 2 * AMX_DIM] __attribute__((aligned(64)));
    vattention_tiles_begin(2 * TILE);
    for (int64_t first = args->low / TILE * TILE; first < args->high; first += 2 * TILE) {
        const int64_t second = first + TILE < args->high ? first + TILE : first;
        int64_t stride, other_stride;
        const char *keys = amx_keys(args, kv_head, first, copies[0], &stride);
        const char *others = amx_keys(args, kv_head, second, copies[1], &other_stride);
        if (fetches) {
            amx_fetch(args, first);
            amx_fetch(args, first + TILE);
        }
        TILES_READ_MEMORY;
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t k = 0; k < dim; k += 32) {
            _tile_loadd(6, query + k / 32 * TILE_NBYTES, 64);
            _tile_loadd(4, keys + 2 * k, stride);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, others + 2 * k, other_stride);
            _tile_dpbf16ps(1, 5, 6);
        }
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        TILES_READ_MEMORY;
        amx_turn(sums[0], first, scores, few);
        if (second > first) {
            amx_turn(sums[1], second, scores, few);
        }
    }
}

/* 16 scores from key j on, scaled and capped; those of keys outside [low, high) become -inf. */
AMX_TARGET INLINE __m512 amx_score(const vattention_heads *h, const float *scores, int64_t j, int64_t low, int64_t high) {
    __m512 x = _mm512_mul_ps(_mm512_load_ps(scores + j), _mm512_set1_ps(h->scale));
    if (h->softcap > 0.0f) {
        x = _mm512_mul_ps((__m512)tanh_avx512_bf16((floats_avx512_bf16)_mm512_div_ps(x, _mm512_set1_ps(h->softcap))),
                          _mm512_set1_ps(h->softcap));
    }
    const int64_t before = low - j, until = high - j;
    if (before > 0 || until < TILE) {
        const uint32_t seen = until <= 0 ? 0 : until < TILE ? (1u << until) - 1 : 0xffff;
        const uint32_t hidden = before <= 0 ? 0 : before < TILE ? (1u << before) - 1 : 0xffff;
        x = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), (__mmask16)(seen & ~hidden), x);
    }
    return x;
}

/* Turns one lane's scores into weights relative to the largest, in whole WEIGHED: what bfloat16 has of them, and
 * TILE * STRIP numbers on what it leaves out. Those of keys that the lane does not see are 0. */
AMX_TARGET INLINE void amx_weights(const strip_args *args, int64_t lane, float *scores, uint16_t *weights, float *max,
                                   float *total) {
    const vattention_heads *h = args->heads;
    int64_t low, high;
    seen_keys(args, lane, &low, &high);
    const int64_t from = args->low / WEIGHED * WEIGHED, until = padded(args->high, WEIGHED);
    __m512 largest = _mm512_set1_ps(-FLT_MAX), sum = _mm512_setzero_ps();
    for (int64_t j = from; j < until; j += TILE) {
        const __m512 x = amx_score(h, scores, j, low, high);
        largest = _mm512_max_ps(x, largest);
        _mm512_store_ps(scores + j, x);
    }
    const float most = _mm512_reduce_max_ps(largest);
    const __m512 unit = _mm512_set1_ps(LOG2_E), base = _mm512_set1_ps(most);
    for (int64_t j = from; j < until; j += WEIGHED) {
        const __m512 first = exp2_of(_mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(scores + j), base), unit));
        const __m512 second = exp2_of(_mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(scores + j + TILE), base), unit));
        sum = _mm512_add_ps(sum, _mm512_add_ps(first, second));
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
        const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
        const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1));
        const __m512 first_rest = _mm512_sub_ps(first, _mm512_castsi512_ps(_mm512_slli_epi32(low, 16)));
        const __m512 second_rest = _mm512_sub_ps(second, _mm512_castsi512_ps(_mm512_slli_epi32(high, 16)));
        _mm512_store_si512(weights + j, both);
        _mm512_store_si512(weights + TILE * STRIP + j, (__m512i)_mm512_cvtne2ps_pbh(second_rest, first_rest));
    }
    *max = most;
    *total = _mm512_reduce_add_ps(sum);
}

/* Numbers [d, d + 32) of the values of steps of WEIGHED keys, as two second factors each. */
AMX_TARGET INLINE void amx_pairs(const char *const *values, int64_t d, int64_t from, int64_t until, char *pairs) {
    for (int64_t step = from; step < until; step++) {
        char *to = pairs + step * 2 * TILE_NBYTES;
#pragma GCC unroll 16
        for (int i = 0; i < TILE; i++) {
            const char *const *two = values + step * WEIGHED + 2 * i;
            const __m512i even = _mm512_loadu_si512(two[0] + 2 * d), odd = _mm512_loadu_si512(two[1] + 2 * d);
            _mm512_store_si512(to + 64 * i, _mm512_unpacklo_epi16(even, odd));
            _mm512_store_si512(to + TILE_NBYTES + 64 * i, _mm512_unpackhi_epi16(even, odd));
        }
    }
}

/* out[lane, out_stride]: the strip's values times the weights of `count` lanes. */
AMX_TARGET INLINE void amx_values(const strip_args *args, int64_t kv_head, const uint16_t *weights, int64_t count,
                                  float *out, int64_t out_stride) {
    static const uint16_t zeros[AMX_DIM];
    const int64_t from = args->low / WEIGHED, until = padded(args->high, WEIGHED) / WEIGHED, dim = args->heads->value_dim;
    const char *values[STRIP];
    for (int64_t j = from * WEIGHED; j < until * WEIGHED; j++) {
        const int exists = j >= args->low && j < args->high;
        values[j] = exists ? args->values[j] + kv_head * args->value_head_nbytes : (const char *)zeros;
    }
    char pairs[STRIP / WEIGHED * 2 * TILE_NBYTES] __attribute__((aligned(64)));
    vattention_tiles_begin(count);
    for (int64_t d = 0; d < dim; d += 32) {
        amx_pairs(values, d, from, until, pairs);
        TILES_READ_MEMORY;
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t step = from; step < until; step++) {
            _tile_loadd(4, weights + step * WEIGHED, STRIP * 2);
            _tile_loadd(6, pairs + step * 2 * TILE_NBYTES, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, pairs + step * 2 * TILE_NBYTES + TILE_NBYTES, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(4, weights + TILE * STRIP + step * WEIGHED, STRIP * 2);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_stored(0, out + d, out_stride * 4);
        _tile_stored(1, out + d + TILE, out_stride * 4);
    }
    TILES_READ_MEMORY;
}

AMX_TARGET static void amx_strip(const strip_args *args, state out) {
    const vattention_heads *h = args->heads;
    const int64_t group = h->num_heads / h->num_kv_heads, num_lanes = args->num_rows * group;
    const int64_t out_stride = padded(h->value_dim, PAD);
    const char *query = args->arranged;
    float scores[TILE * STRIP] __attribute__((aligned(64)));
    uint16_t weights[2 * TILE * STRIP] __attribute__((aligned(64)));
    for (int64_t kv_head = 0; kv_head < h->num_kv_heads; kv_head++) {
        for (int64_t lane = 0; lane < num_lanes; lane += TILE, query += h->key_dim / 32 * TILE_NBYTES) {
            const int64_t count = num_lanes - lane < TILE ? num_lanes - lane : TILE, at = kv_head * num_lanes + lane;
            const int fetches = kv_head == 0 && lane == 0;
            if (count <= TILE / 2) {
                amx_scores(args, kv_head, query, fetches, scores, 1);
            } else {
                amx_scores(args, kv_head, query, fetches, scores, 0);
            }
            for (int64_t i = 0; i < count; i++) {
                amx_weights(args, lane + i, scores + i * STRIP, weights + i * STRIP, out.max + at + i, out.total + at + i);
            }
            amx_values(args, kv_head, weights, count, out.values + at * out_stride, out_stride);
        }
    }
    vattention_tiles_end();
}

/* y = values / total in the order of memory. */
AMX_TARGET static void amx_finish(const float *values, float total, void *y, int64_t dim, int32_t dtype) {
    (void)dtype;
    const __m512i order = _mm512_set_epi16(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8, 23, 22, 21, 20, 7, 6,
                                           5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512 factor = _mm512_set1_ps(1.0f / total);
    for (int64_t d = 0; d < dim; d += 32) {
        const __m512 first = _mm512_mul_ps(_mm512_loadu_ps(values + d), factor);
        const __m512 second = _mm512_mul_ps(_mm512_loadu_ps(values + d + TILE), factor);
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
        _mm512_storeu_si512((uint16_t *)y + d, _mm512_permutexvar_epi16(order, both));
    }
}

static const attend_set set_amx = {
    .prepare = prepare_avx512_bf16,
    .arrange = amx_arrange,
    .strip = {NULL, amx_strip, NULL},
    .fold = fold_avx512_bf16,
    .finish = amx_finish,
};
