/* Attention of many query rows of one sequence over its keys, by matrix tiles (AMX) of bfloat16.
 *
 * The algorithm is that of T. Dao, "FlashAttention-2" (2023), section 3.1: blocks of queries stay, blocks of keys go
 * by, and scores live in the first-level cache only. Everything is computed turned over: scores as K Q^T, results as
 * V^T P. Queries then lie side by side in vectors, so that each step of the softmax is done for 16 of them
 * at once, and keys are the first factor, which takes them as they lie in the cache.
 *
 * A lane is a query row and one of the heads that share a kv head. Blocks of keys lie at multiples of their size,
 * so a row's result depends neither on the rest of its chunk nor on the way the cache is stored, as long as the values it
 * must not see are finite: those meet weights of zero. Sums are float32.
 */
#include "kernels.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && VATTENTION_LANES >= 16 && VATTENTION_DOT > 1 && \
    (defined(__clang__) || __GNUC__ >= 11)
#define HAVE_PREFILL
#include <immintrin.h>
#endif

/* Keys in a block, lanes that are multiplied at a time, and how often as many an item has. */
enum { KEYS = 128, WIDE = 32, BLOCKS_EACH = 4 };
/* A matrix tile is 16 rows of 64 bytes. */
enum { TILE_NBYTES = 1024 };
/* Packed keys and values of as many heads as go into this are made at a time, of one at least. */
enum { PACKED_NBYTES = 32 << 20 };

static int64_t head_nbytes(const vattention_heads *heads, const vattention_span *sp) {
    const int64_t end = sp->start + sp->num_rows, first = first_key(heads, sp->start);
    return ((end - 1) / KEYS - first / KEYS + 1) * KEYS * (heads->key_dim + heads->value_dim) * 2;
}

/* Of one thread: an item's queries and results, scores, weights, and each lane's largest score and sum. */
static int64_t scratch_nbytes(const vattention_heads *heads) {
    const int64_t lanes = WIDE * BLOCKS_EACH;
    return lanes * (heads->key_dim * 2 + heads->value_dim * 4 + 8) + KEYS * WIDE * 6;
}

int vattention_can_prefill(const vattention_heads *heads, int32_t dtype) {
#ifdef HAVE_PREFILL
    return dtype == BFLOAT16 && vattention_has_tiles() == 2 && heads->key_dim % 32 == 0 && heads->value_dim % 32 == 0;
#else
    (void)heads;
    (void)dtype;
    return 0;
#endif
}

/* Bytes that `vattention_prefill` works in, from a cache line on. */
int64_t vattention_prefill_nbytes(const vattention_heads *heads, const vattention_span *spans, int64_t num_spans,
                                  int32_t num_threads) {
    int64_t most = 0;
    for (int64_t i = 0; i < num_spans; i++) {
        /* Enough for fewer of its rows too, with which more heads may be packed together. */
        const int64_t one = head_nbytes(heads, &spans[i]), packed = one > PACKED_NBYTES ? one : PACKED_NBYTES;
        const int64_t nbytes = heads->num_kv_heads * one < packed ? heads->num_kv_heads * one : packed;
        most = nbytes > most ? nbytes : most;
    }
    return num_spans == 0 ? 0 : most + num_threads * scratch_nbytes(heads);
}

#ifdef HAVE_PREFILL
#define PREFILL_TARGET \
    __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")))
#define EXP_TARGET PREFILL_TARGET
#include "exp2.h"

static int64_t heads_together(const vattention_heads *heads, const vattention_span *sp) {
    const int64_t fit = PACKED_NBYTES / head_nbytes(heads, sp);
    return fit < 1 ? 1 : fit > heads->num_kv_heads ? heads->num_kv_heads : fit;
}

typedef struct {
    const vattention_heads *heads;
    const vattention_cache *keys, *values;
    const vattention_tables *tables;
    const uint16_t *query;
    int64_t query_row_stride, query_head_stride;
    const vattention_span *span;
    uint16_t *output;
    int64_t group;                   /* heads that share a kv head */
    int64_t first_head, num_heads;   /* kv heads at work */
    int64_t first_block, num_blocks; /* of keys, counted from the sequence's start */
    char *packed;                    /* [num_heads, num_blocks]: a block's keys, then its values */
    int64_t block_nbytes;
    char *scratch; /* one thread's after the other's */
    int64_t num_items;
    int64_t next_thread, next_item; /* taken atomically */
} job;

/* rows[i] has the numbers i of all 16 vectors. */
PREFILL_TARGET INLINE void transpose(__m512i *rows) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        rows[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        rows[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        rows[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        rows[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        rows[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        rows[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

static const uint16_t *token(const job *j, const vattention_cache *cache, int64_t position) {
    const int64_t size = j->tables->block_size;
    int64_t slot = j->span->slot;
    if (size > 0) {
        slot = j->tables->blocks[slot * j->tables->slot_stride + position / size];
        position %= size;
    }
    return (const uint16_t *)cache->numbers + slot * cache->slot_stride + position * cache->token_stride;
}

/* A block's keys as tiles [key / 16, dim / 32] of 16 keys, and its values as tiles [dim / 16, key / 32] of 16 dims.
 * Tokens outside the span's keys are zeros: their memory may not be there. */
PREFILL_TARGET static void pack(const job *j, int64_t head, int64_t block, char *to) {
    const int64_t first = first_key(j->heads, j->span->start), end = j->span->start + j->span->num_rows;
    const int64_t key_dim = j->heads->key_dim, value_dim = j->heads->value_dim;
    const uint16_t *values[KEYS];
    for (int64_t i = 0; i < KEYS; i++) {
        const int64_t position = (j->first_block + block) * KEYS + i;
        const int exists = position >= first && position < end;
        const uint16_t *key = exists ? token(j, j->keys, position) + head * j->keys->head_stride : NULL;
        values[i] = exists ? token(j, j->values, position) + head * j->values->head_stride : NULL;
        char *row = to + i / 16 * (key_dim / 32) * TILE_NBYTES + i % 16 * 64;
        for (int64_t k = 0; k < key_dim; k += 32, row += TILE_NBYTES) {
            _mm512_storeu_si512(row, key ? _mm512_loadu_si512(key + k) : _mm512_setzero_si512());
        }
    }
    to += KEYS * key_dim * 2;
    const __m512i pairs = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                           5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    for (int64_t dim = 0; dim < value_dim; dim += 16) {
        for (int64_t step = 0; step < KEYS; step += 32, to += TILE_NBYTES) {
            __m512i rows[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                const uint16_t *even = values[step + 2 * i], *odd = values[step + 2 * i + 1];
                const __m256i zeros = _mm256_setzero_si256();
                const __m256i a = even ? _mm256_loadu_si256((const __m256i *)(even + dim)) : zeros;
                const __m256i b = odd ? _mm256_loadu_si256((const __m256i *)(odd + dim)) : zeros;
                rows[i] = _mm512_permutex2var_epi16(_mm512_castsi256_si512(a), pairs, _mm512_castsi256_si512(b));
            }
            transpose(rows);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                _mm512_storeu_si512(to + 64 * i, rows[i]);
            }
        }
    }
}

PREFILL_TARGET static void pack_work(void *argument) {
    job *j = argument;
    for (;;) {
        const int64_t item = __atomic_fetch_add(&j->next_item, 1, __ATOMIC_RELAXED);
        if (item >= j->num_heads * j->num_blocks) {
            return;
        }
        pack(j, j->first_head + item / j->num_blocks, item % j->num_blocks, j->packed + item * j->block_nbytes);
    }
}

/* Queries of lanes that lie side by side, and what is known of them so far. */
typedef struct {
    int64_t first, count;   /* lanes; the rest of WIDE are zeros */
    int64_t lowest, highest; /* positions */
    char *query;            /* tiles [dim / 32, lane / 16] of 16 pairs of dims */
    float *result;          /* [value_dim, WIDE] */
    float *max, *total;     /* [WIDE] */
} lanes;

PREFILL_TARGET INLINE __m512 capped(__m512 x, float cap) {
    /* tanh(z) = 1 - 2 / (e^2z + 1), of |z|. */
    const __m512 z = _mm512_mul_ps(x, _mm512_set1_ps(1.0f / cap));
    const __m512 small = exp2_of(_mm512_mul_ps(_mm512_abs_ps(z), _mm512_set1_ps(-2.0f * LOG2_E)));
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 size = _mm512_div_ps(_mm512_sub_ps(one, small), _mm512_add_ps(one, small));
    const __m512 sign = _mm512_and_ps(z, _mm512_set1_ps(-0.0f));
    return _mm512_mul_ps(_mm512_or_ps(size, sign), _mm512_set1_ps(cap));
}

PREFILL_TARGET static void load_queries(const job *j, int64_t head, const lanes *own) {
    const int64_t group = j->group;
    const uint16_t *rows[WIDE];
    for (int64_t i = 0; i < WIDE; i++) {
        const int64_t lane = own->first + i;
        const int64_t row = j->span->first_row + lane / group;
        rows[i] = i < own->count ? j->query + row * j->query_row_stride +
                                       (head * group + lane % group) * j->query_head_stride
                                 : NULL;
    }
    char *to = own->query;
    for (int64_t k = 0; k < j->heads->key_dim; k += 32) {
        for (int64_t half = 0; half < WIDE; half += 16, to += TILE_NBYTES) {
            __m512i tile[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                tile[i] = rows[half + i] ? _mm512_loadu_si512(rows[half + i] + k) : _mm512_setzero_si512();
            }
            transpose(tile);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                _mm512_storeu_si512(to + 64 * i, tile[i]);
            }
        }
    }
    memset(own->result, 0, (size_t)(j->heads->value_dim * WIDE) * sizeof(float));
    for (int64_t i = 0; i < WIDE; i++) {
        own->max[i] = -FLT_MAX;
        own->total[i] = 0.0f;
    }
}

/* scores[key, lane] of key steps [from, until), each of 32 keys. */
PREFILL_TARGET INLINE void score(const job *j, const lanes *own, const char *keys, int64_t from, int64_t until,
                                 float *scores) {
    const int64_t row_nbytes = j->heads->key_dim / 32 * TILE_NBYTES;
    TILES_READ_MEMORY;
    for (int64_t step = from; step < until; step++) {
        const char *upper = keys + 2 * step * row_nbytes, *lower = upper + row_nbytes, *query = own->query;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < row_nbytes; k += TILE_NBYTES, query += 2 * TILE_NBYTES) {
            _tile_loadd(4, upper + k, 64);
            _tile_loadd(6, query, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, query + TILE_NBYTES, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, lower + k, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        float *to = scores + step * 32 * WIDE;
        _tile_stored(0, to, WIDE * 4);
        _tile_stored(1, to + 16, WIDE * 4);
        _tile_stored(2, to + 16 * WIDE, WIDE * 4);
        _tile_stored(3, to + 16 * WIDE + 16, WIDE * 4);
    }
    TILES_READ_MEMORY;
}

/* What scores are multiplied by to become powers of two; where `largest` changes them, it has done so. */
PREFILL_TARGET INLINE float unit_of(const vattention_heads *heads) {
    return heads->softcap == 0.0f && heads->scale > 0.0f ? heads->scale * LOG2_E : 1.0f;
}

/* A product that is rounded before anything else is done with it, so that the largest score weighs 1 however large. */
PREFILL_TARGET INLINE __m512 times(__m512 x, __m512 unit) { return _mm512_mul_round_ps(x, unit, _MM_FROUND_CUR_DIRECTION); }

/* The largest of 16 lanes' scores so far, in powers of two. Scores that a lane must not see become -inf; otherwise they
 * stay as they are unless they are capped, or turned over by a scale below zero. `base` is the position of key 0. */
PREFILL_TARGET INLINE __m512 largest(const job *j, const lanes *own, int64_t half, int64_t base, int64_t from,
                                     int64_t until, float *scores) {
    const vattention_heads *heads = j->heads;
    const int raw = heads->softcap == 0.0f && heads->scale > 0.0f;
    const int masks = base + 32 * until - 1 > own->lowest ||
                      (heads->window > 0 && base + 32 * from <= own->highest - heads->window);
    const __m512 unit = _mm512_set1_ps(unit_of(heads));
    __m512 most = _mm512_set1_ps(-INFINITY), other_most = most;
    if (!masks && raw) {
        for (int64_t i = 32 * from; i < 32 * until; i += 2) {
            most = _mm512_max_ps(most, _mm512_loadu_ps(scores + i * WIDE + half));
            other_most = _mm512_max_ps(other_most, _mm512_loadu_ps(scores + (i + 1) * WIDE + half));
        }
        return _mm512_max_ps(_mm512_loadu_ps(own->max + half), times(_mm512_max_ps(most, other_most), unit));
    }
    int32_t offsets[16];
    for (int i = 0; i < 16; i++) {
        /* The last key that the lane sees, counted from `base`. */
        offsets[i] = (int32_t)(j->span->start + (own->first + half + i) / j->group - base);
    }
    const __m512i last = _mm512_loadu_si512(offsets);
    const __m512i before = _mm512_sub_epi32(last, _mm512_set1_epi32((int32_t)heads->window));
    const __m512 nothing = _mm512_set1_ps(-INFINITY);
    for (int64_t i = 32 * from; i < 32 * until; i++) {
        __m512 x = _mm512_loadu_ps(scores + i * WIDE + half);
        if (heads->softcap > 0.0f) {
            x = capped(_mm512_mul_ps(x, _mm512_set1_ps(heads->scale)), heads->softcap);
        }
        if (!raw) {
            x = _mm512_mul_ps(x, _mm512_set1_ps(heads->softcap > 0.0f ? LOG2_E : heads->scale * LOG2_E));
        }
        const __m512i key = _mm512_set1_epi32((int32_t)i);
        __mmask16 sees = _mm512_cmple_epi32_mask(key, last);
        if (heads->window > 0) {
            sees &= _mm512_cmpgt_epi32_mask(key, before);
        }
        x = _mm512_mask_mov_ps(nothing, sees, x);
        most = _mm512_max_ps(most, x);
        _mm512_storeu_ps(scores + i * WIDE + half, x);
    }
    return _mm512_max_ps(_mm512_loadu_ps(own->max + half), times(most, unit));
}

/* The weight of a score. */
PREFILL_TARGET INLINE __m512 weight(const float *score, __m512 unit, __m512 most) {
    return exp2_of(_mm512_sub_ps(times(_mm512_loadu_ps(score), unit), most));
}

/* Turns scores into weights, as tiles [key / 32, lane / 16] of 16 pairs of keys, relative to the largest score so far;
 * results so far are brought into the same relation. */
PREFILL_TARGET INLINE void weigh(const job *j, const lanes *own, int64_t base, int64_t from, int64_t until,
                                 float *scores, char *weights) {
    const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512 unit = _mm512_set1_ps(unit_of(j->heads));
    __m512 shrink[2];
    int changed = 0;
    for (int64_t half = 0; half < 2; half++) {
        const __m512 before = _mm512_loadu_ps(own->max + 16 * half);
        const __m512 most = largest(j, own, 16 * half, base, from, until, scores);
        shrink[half] = exp2_of(_mm512_sub_ps(before, most));
        changed |= _mm512_cmpneq_ps_mask(before, most) != 0;
        __m512 total = _mm512_mul_ps(_mm512_loadu_ps(own->total + 16 * half), shrink[half]);
        for (int64_t i = 32 * from; i < 32 * until; i += 2) {
            const __m512 a = weight(scores + i * WIDE + 16 * half, unit, most);
            const __m512 b = weight(scores + (i + 1) * WIDE + 16 * half, unit, most);
            total = _mm512_add_ps(total, _mm512_add_ps(a, b));
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b, a);
            char *to = weights + (i / 32 * 2 + half) * TILE_NBYTES + i % 32 / 2 * 64;
            _mm512_storeu_si512(to, _mm512_permutexvar_epi16(pairs, both));
        }
        _mm512_storeu_ps(own->max + 16 * half, most);
        _mm512_storeu_ps(own->total + 16 * half, total);
    }
    if (changed) {
        for (int64_t dim = 0; dim < j->heads->value_dim; dim++) {
            float *row = own->result + dim * WIDE;
            _mm512_storeu_ps(row, _mm512_mul_ps(_mm512_loadu_ps(row), shrink[0]));
            _mm512_storeu_ps(row + 16, _mm512_mul_ps(_mm512_loadu_ps(row + 16), shrink[1]));
        }
    }
}

/* Adds the weighted values of key steps [from, until) to the results. */
PREFILL_TARGET INLINE void gather(const job *j, const lanes *own, const char *values, int64_t from, int64_t until,
                                  const char *weights) {
    const int64_t row_nbytes = KEYS / 32 * TILE_NBYTES;
    TILES_READ_MEMORY;
    for (int64_t dim = 0; dim < j->heads->value_dim; dim += 32, values += 2 * row_nbytes) {
        float *result = own->result + dim * WIDE;
        _tile_loadd(0, result, WIDE * 4);
        _tile_loadd(1, result + 16, WIDE * 4);
        _tile_loadd(2, result + 16 * WIDE, WIDE * 4);
        _tile_loadd(3, result + 16 * WIDE + 16, WIDE * 4);
        for (int64_t step = from; step < until; step++) {
            _tile_loadd(4, values + step * TILE_NBYTES, 64);
            _tile_loadd(6, weights + 2 * step * TILE_NBYTES, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, weights + (2 * step + 1) * TILE_NBYTES, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, values + row_nbytes + step * TILE_NBYTES, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, result, WIDE * 4);
        _tile_stored(1, result + 16, WIDE * 4);
        _tile_stored(2, result + 16 * WIDE, WIDE * 4);
        _tile_stored(3, result + 16 * WIDE + 16, WIDE * 4);
    }
    TILES_READ_MEMORY;
}

PREFILL_TARGET static void finish(const job *j, int64_t head, const lanes *own) {
    const int64_t value_dim = j->heads->value_dim, group = j->group;
    for (int64_t dim = 0; dim < value_dim; dim += 16) {
        for (int64_t half = 0; half < WIDE; half += 16) {
            __m512i tile[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                tile[i] = _mm512_loadu_si512(own->result + (dim + i) * WIDE + half);
            }
            transpose(tile);
            for (int i = 0; i < 16 && half + i < own->count; i++) {
                const int64_t lane = own->first + half + i;
                const int64_t row = j->span->first_row + lane / group, which = head * group + lane % group;
                const __m512 factor = _mm512_set1_ps(1.0f / own->total[half + i]);
                const __m256i y = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_castsi512_ps(tile[i]), factor));
                uint16_t *to = j->output + (row * j->heads->num_heads + which) * value_dim + dim;
                _mm256_storeu_si256((__m256i *)to, y);
            }
        }
    }
}

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* A thread's share: items of BLOCKS_EACH times WIDE lanes of a kv head, the longest first. */
PREFILL_TARGET static void work(void *argument) {
    job *j = argument;
    const vattention_heads *heads = j->heads;
    const int64_t num_lanes = j->span->num_rows * j->group, lanes_each = BLOCKS_EACH * WIDE;
    const int64_t thread = __atomic_fetch_add(&j->next_thread, 1, __ATOMIC_RELAXED);
    char *queries = j->scratch + thread * scratch_nbytes(heads);
    float *results = (float *)(queries + lanes_each * heads->key_dim * 2);
    float *scores = results + lanes_each * heads->value_dim;
    char *weights = (char *)(scores + KEYS * WIDE);
    float *states = (float *)(weights + KEYS * WIDE * 2);
    int begun = 0;
    for (;;) {
        const int64_t item = __atomic_fetch_add(&j->next_item, 1, __ATOMIC_RELAXED);
        if (item >= j->num_items) {
            break;
        }
        if (!begun) {
            vattention_tiles_begin(32);
            begun = 1;
        }
        const int64_t head = item % j->num_heads, first = (j->num_items - 1 - item) / j->num_heads * lanes_each;
        const char *packed = j->packed + head * j->num_blocks * j->block_nbytes;
        lanes all[BLOCKS_EACH];
        int64_t count = 0;
        for (int64_t at = first; at < smaller(first + lanes_each, num_lanes); at += WIDE, count++) {
            const int64_t number = smaller(WIDE, num_lanes - at);
            all[count] = (lanes){
                .first = at,
                .count = number,
                .lowest = j->span->start + at / j->group,
                .highest = j->span->start + (at + number - 1) / j->group,
                .query = queries + count * WIDE * heads->key_dim * 2,
                .result = results + count * WIDE * heads->value_dim,
                .max = states + count * 2 * WIDE,
                .total = states + (count * 2 + 1) * WIDE,
            };
            load_queries(j, j->first_head + head, &all[count]);
        }
        const int64_t begin = first_key(heads, all[0].lowest) / KEYS, end = all[count - 1].highest / KEYS + 1;
        for (int64_t block = begin; block < end; block++) {
            const char *keys = packed + (block - j->first_block) * j->block_nbytes;
            const char *values = keys + KEYS * heads->key_dim * 2;
            const int64_t base = block * KEYS;
            for (int64_t i = 0; i < count; i++) {
                const lanes *own = &all[i];
                const int64_t low = first_key(heads, own->lowest) - base;
                const int64_t from = low > 0 ? low / 32 : 0;
                const int64_t until = smaller(KEYS / 32, (own->highest - base) / 32 + 1);
                if (from < until && own->highest >= base) {
                    score(j, own, keys, from, until, scores);
                    weigh(j, own, base, from, until, scores, weights);
                    gather(j, own, values, from, until, weights);
                }
            }
        }
        for (int64_t i = 0; i < count; i++) {
            finish(j, j->first_head + head, &all[i]);
        }
    }
    if (begun) {
        vattention_tiles_end();
    }
}
#endif

/* Attention of the spans' query rows [rows, num_heads, key_dim] over the tokens up to each row's own, for heads that
 * `vattention_can_prefill`; `workspace` has as many bytes as `vattention_prefill_nbytes` says. Otherwise as
 * `vattention_attend`, without sinks. */
void vattention_prefill(const vattention_heads *heads, const vattention_cache *keys, const vattention_cache *values,
                        const vattention_tables *tables, const void *query, int64_t query_row_stride,
                        int64_t query_head_stride, const vattention_span *spans, int64_t num_spans, void *output,
                        void *workspace, int32_t num_threads, parallel_fn parallel) {
#ifdef HAVE_PREFILL
    for (int64_t i = 0; i < num_spans; i++) {
        const vattention_span *sp = &spans[i];
        job j = {
            .heads = heads,
            .keys = keys,
            .values = values,
            .tables = tables,
            .query = query,
            .query_row_stride = query_row_stride,
            .query_head_stride = query_head_stride,
            .span = sp,
            .output = output,
            .group = heads->num_heads / heads->num_kv_heads,
            .first_block = first_key(heads, sp->start) / KEYS,
            .block_nbytes = KEYS * (heads->key_dim + heads->value_dim) * 2,
            .scratch = workspace,
            .packed = (char *)workspace + num_threads * scratch_nbytes(heads),
        };
        j.num_blocks = (sp->start + sp->num_rows - 1) / KEYS - j.first_block + 1;
        const int64_t together = heads_together(heads, sp), lanes_each = BLOCKS_EACH * WIDE;
        for (; j.first_head < heads->num_kv_heads; j.first_head += together) {
            j.num_heads = smaller(together, heads->num_kv_heads - j.first_head);
            j.next_item = 0;
            parallel(pack_work, &j, (unsigned)num_threads, 0);
            j.num_items = (sp->num_rows * j.group + lanes_each - 1) / lanes_each * j.num_heads;
            j.next_item = j.next_thread = 0;
            parallel(work, &j, (unsigned)num_threads, 0);
        }
    }
#else
    (void)heads, (void)keys, (void)values, (void)tables, (void)query, (void)query_row_stride, (void)query_head_stride;
    (void)spans, (void)num_spans, (void)output, (void)workspace, (void)num_threads, (void)parallel;
#endif
}
