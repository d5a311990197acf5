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

#ifdef HAVE_TILES
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
#ifdef HAVE_TILES
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

#ifdef HAVE_TILES
#define PREFILL_TARGET \
    __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")))
#define TRANSPOSE_TARGET PREFILL_TARGET
#include "transpose.h"
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

/* Queries of lanes that lie side by side, and what is known of them so far. */
typedef struct {
    int64_t first, count;   /* lanes; the rest of WIDE are zeros */
    int64_t lowest, highest; /* positions */
    char *query;            /* tiles [dim / 32, lane / 16] of 16 pairs of dims */
    float *result;          /* [value_dim, WIDE] */
    float *max, *total;     /* [WIDE] */
} lanes;

#include "prefill_tiles.h"
#include "prefill_block.h"

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
#ifdef HAVE_TILES
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
