/* Attention of few query rows per sequence over a KV cache, contiguous or in blocks, for a whole ragged batch.
 *
 * The keys of a sequence are cut into strips of the same size, at its multiples. Each strip is a softmax of its own: its largest
 * score, its sum of weights and its weighted values. Strips are folded together in the order of their keys, by the
 * online softmax of M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax" (2018); threads share
 * the strips of a long sequence as in T. Dao et al., "Flash-Decoding for long-context inference" (2023). Since
 * strips never depend on who computes them, neither the number of threads, nor the rest of the batch, nor the way the
 * cache is stored changes a bit of the result.
 *
 * All sums are float32. Keys are read once for all query heads that share them.
 */
#include "attend_sets.h"

#include <stdlib.h>

/* Numbers of the cache below which waking the other threads takes longer than they save. */
enum { ALONE = 1 << 15 };

/* Strips of one sequence that one thread computes: of item k of `num_items`, strips [k strips_each, ...) from the
 * first. Item 0 folds its strips as it goes; the others leave each strip to whoever finishes last. */
typedef struct {
    int64_t first_item, num_items;
    int64_t first_strip, num_strips;
    int64_t first_state; /* among those that threads share; where num_items is 1 there are none */
    int64_t unfinished;  /* items, counted down atomically */
} plan;

typedef struct {
    const attend_set *set;
    const vattention_heads *heads;
    vattention_cache keys, values;
    vattention_tables tables;
    const void *query;
    int64_t query_row_stride, query_head_stride;
    const vattention_span *spans;
    int64_t num_spans;
    const float *sinks;
    void *output;
    int32_t dtype;
    int64_t item_nbytes; /* of a number in the cache */
    plan *plans;
    int64_t num_items, strips_each;
    int64_t padded_key_dim, padded_value_dim;
    int64_t state_floats;
    float *shared;  /* states */
    float *scratch; /* one thread's after the other's: a query, the same arranged, and two states */
    int64_t scratch_floats, query_floats, arranged_floats;
    int64_t next_thread, next_item; /* taken atomically */
} job;

static state state_at(const job *j, float *at, int64_t num_rows) {
    const int64_t n = padded(num_rows * j->heads->num_heads, PAD);
    return (state){.max = at, .total = at + n, .values = at + 2 * n};
}

static void begin(const job *j, state s, int64_t num_rows) {
    const vattention_heads *heads = j->heads;
    const int64_t n = num_rows * heads->num_heads, group = heads->num_heads / heads->num_kv_heads;
    for (int64_t i = 0; i < padded(n, PAD); i++) {
        s.max[i] = -FLT_MAX;
        s.total[i] = 0.0f;
        if (j->sinks && i < n) {
            s.max[i] = j->sinks[i / (group * num_rows) * group + i % group];
            s.total[i] = 1.0f;
        }
    }
    memset(s.values, 0, (size_t)(n * j->padded_value_dim) * sizeof(float));
}

static void finish(const job *j, const vattention_span *sp, state s) {
    const vattention_heads *heads = j->heads;
    const int64_t group = heads->num_heads / heads->num_kv_heads;
    const int64_t out_nbytes = j->dtype == BFLOAT16 ? 2 : 4;
    for (int64_t i = 0; i < sp->num_rows * heads->num_heads; i++) {
        const int64_t row = sp->first_row + i / group % sp->num_rows;
        const int64_t head = i / (group * sp->num_rows) * group + i % group;
        char *y = (char *)j->output + (row * heads->num_heads + head) * heads->value_dim * out_nbytes;
        j->set->finish(s.values + i * j->padded_value_dim, s.total[i], y, heads->value_dim, j->dtype);
    }
}

static void prepare(const job *j, const vattention_span *sp, void *query) {
    const vattention_heads *heads = j->heads;
    const int64_t group = heads->num_heads / heads->num_kv_heads;
    for (int64_t i = 0; i < sp->num_rows * heads->num_heads; i++) {
        const int64_t row = sp->first_row + i / group % sp->num_rows;
        const int64_t head = i / (group * sp->num_rows) * group + i % group;
        const int64_t at = row * j->query_row_stride + head * j->query_head_stride;
        j->set->prepare((const char *)j->query + at * j->item_nbytes, (float *)query + i * j->padded_key_dim,
                        heads->key_dim, j->dtype);
    }
}

/* Where the strip's keys and values are. */
static void locate(const job *j, int64_t slot, strip_args *args) {
    const int64_t item = j->item_nbytes;
    const int64_t key_step = j->keys.token_stride * item, value_step = j->values.token_stride * item;
    if (j->tables.block_size == 0) {
        const char *key = (const char *)j->keys.numbers + slot * j->keys.slot_stride * item + args->base * key_step;
        const char *value = (const char *)j->values.numbers + slot * j->values.slot_stride * item + args->base * value_step;
        for (int64_t i = args->low; i < args->high; i++) {
            args->keys[i] = key + i * key_step;
            args->values[i] = value + i * value_step;
        }
        return;
    }
    const int32_t *blocks = j->tables.blocks + slot * j->tables.slot_stride;
    const int64_t size = j->tables.block_size;
    int64_t index = (args->base + args->low) / size, offset = (args->base + args->low) % size;
    for (int64_t i = args->low; i < args->high; index++, offset = 0) {
        const int64_t block = blocks[index];
        const char *key = (const char *)j->keys.numbers + block * j->keys.slot_stride * item;
        const char *value = (const char *)j->values.numbers + block * j->values.slot_stride * item;
        for (; offset < size && i < args->high; offset++, i++) {
            args->keys[i] = key + offset * key_step;
            args->values[i] = value + offset * value_step;
        }
    }
}

/* A thread's share: items until none is left. Threads that run late, because other processes hold their cores, take
 * fewer. */
static void work(void *argument) {
    job *j = argument;
    const vattention_heads *heads = j->heads;
    float *query = j->scratch + j->scratch_floats * __atomic_fetch_add(&j->next_thread, 1, __ATOMIC_RELAXED);
    char *arranged = (char *)(query + j->query_floats);
    float *own = query + j->query_floats + j->arranged_floats;
    strip_args args = {
        .heads = heads,
        .query = (const char *)query,
        .arranged = arranged,
        .even = j->tables.block_size % 16 == 0,
        .key_head_nbytes = j->keys.head_stride * j->item_nbytes,
        .value_head_nbytes = j->values.head_stride * j->item_nbytes,
    };
    int64_t which = 0;
    for (;;) {
        const int64_t item = __atomic_fetch_add(&j->next_item, 1, __ATOMIC_RELAXED);
        if (item >= j->num_items) {
            return;
        }
        while (item >= j->plans[which].first_item + j->plans[which].num_items) {
            which++;
        }
        plan *p = &j->plans[which];
        const vattention_span *sp = &j->spans[which];
        const int64_t n = sp->num_rows * heads->num_heads;
        const int64_t first = first_key(heads, sp->start), end = sp->start + sp->num_rows;
        const int64_t from = (item - p->first_item) * j->strips_each;
        const int64_t until = from + j->strips_each < p->num_strips ? from + j->strips_each : p->num_strips;
        float *shared = p->num_items == 1 ? own : j->shared + p->first_state * j->state_floats;
        const state total = state_at(j, shared, sp->num_rows);
        if (from == 0) {
            begin(j, total, sp->num_rows);
        }
        prepare(j, sp, query);
        args.num_rows = sp->num_rows;
        args.start = sp->start;
        if (j->set->arrange) {
            j->set->arrange(&args, arranged);
        }
        for (int64_t strip = from; strip < until; strip++) {
            args.base = (p->first_strip + strip) * heads->strip;
            args.low = first > args.base ? first - args.base : 0;
            args.high = end - args.base < heads->strip ? end - args.base : heads->strip;
            locate(j, sp->slot, &args);
            if (from == 0) {
                const state part = state_at(j, own + j->state_floats, sp->num_rows);
                j->set->strip[j->dtype](&args, part);
                j->set->fold(total, part, n, j->padded_value_dim);
            } else {
                float *at = shared + (strip - j->strips_each + 1) * j->state_floats;
                j->set->strip[j->dtype](&args, state_at(j, at, sp->num_rows));
            }
        }
        if (p->num_items > 1) {
            if (__atomic_sub_fetch(&p->unfinished, 1, __ATOMIC_ACQ_REL) > 0) {
                continue;
            }
            for (int64_t i = 1; i <= p->num_strips - j->strips_each; i++) {
                j->set->fold(total, state_at(j, shared + i * j->state_floats, sp->num_rows), n, j->padded_value_dim);
            }
        }
        finish(j, sp, total);
    }
}

/* Attention of the spans' query rows [rows, num_heads, key_dim] over the tokens up to each row's own.
 *
 * Writes the spans' rows of output[rows, num_heads, value_dim], which is of the cache's type, but float32 where that is
 * float16. Numbers of a head are adjacent everywhere. A span is a slot, its first row, its number of rows, and the
 * position of the first; sinks are num_heads logits or NULL. Returns 0, or -1 where memory ran short, with the output
 * untouched. */
int32_t vattention_attend(const vattention_heads *heads, const vattention_cache *keys, const vattention_cache *values,
                          const vattention_tables *tables, int32_t dtype, const void *query, int64_t query_row_stride,
                          int64_t query_head_stride, const vattention_span *spans, int64_t num_spans, const float *sinks,
                          void *output, int32_t num_threads, parallel_fn parallel) {
    job j = {
        .set = set_for(heads, dtype),
        .heads = heads,
        .keys = *keys,
        .values = *values,
        .tables = *tables,
        .query = query,
        .query_row_stride = query_row_stride,
        .query_head_stride = query_head_stride,
        .spans = spans,
        .num_spans = num_spans,
        .sinks = sinks,
        .output = output,
        .dtype = dtype,
        .item_nbytes = dtype == FLOAT32 ? 4 : 2,
        .padded_key_dim = padded(heads->key_dim, PAD),
        .padded_value_dim = padded(heads->value_dim, PAD),
    };
    int64_t most_rows = 0, num_strips = 0, num_keys = 0;
    const size_t plans_nbytes = (size_t)padded(num_spans * (int64_t)sizeof(plan), 64);
    for (int64_t i = 0; i < num_spans; i++) {
        const vattention_span *sp = &j.spans[i];
        const int64_t first = first_key(heads, sp->start), end = sp->start + sp->num_rows;
        most_rows = most_rows > sp->num_rows ? most_rows : sp->num_rows;
        num_strips += (end - 1) / heads->strip - first / heads->strip + 1;
        num_keys += end - first;
    }
    const int64_t numbers = num_keys * heads->num_kv_heads * (heads->key_dim + heads->value_dim);
    const int64_t threads = numbers < ALONE ? 1 : num_threads;
    const int64_t n = most_rows * heads->num_heads;
    j.strips_each = threads == 1 ? num_strips : num_strips / (4 * threads) + 1;
    j.state_floats = 2 * padded(n, PAD) + n * j.padded_value_dim;
    j.query_floats = n * j.padded_key_dim;
    j.arranged_floats = j.set->arrange ? heads->num_kv_heads * padded(n / heads->num_kv_heads, PAD) * j.padded_key_dim : 0;
    j.scratch_floats = j.query_floats + j.arranged_floats + 2 * j.state_floats;
    /* No more states are shared than there are strips. */
    const int64_t states = threads == 1 ? 0 : num_strips;
    const size_t floats = (size_t)(threads * j.scratch_floats + states * j.state_floats);
    char *workspace = aligned_alloc(64, plans_nbytes + (size_t)padded((int64_t)(floats * sizeof(float)), 64));
    if (workspace == NULL) {
        return -1;
    }
    j.plans = (plan *)workspace;
    j.scratch = (float *)(workspace + plans_nbytes);
    j.shared = j.scratch + threads * j.scratch_floats;
    int64_t next_state = 0;
    for (int64_t i = 0; i < num_spans; i++) {
        const vattention_span *sp = &j.spans[i];
        plan *p = &j.plans[i];
        p->first_strip = first_key(heads, sp->start) / heads->strip;
        p->num_strips = (sp->start + sp->num_rows - 1) / heads->strip - p->first_strip + 1;
        p->first_item = j.num_items;
        p->num_items = p->unfinished = (p->num_strips + j.strips_each - 1) / j.strips_each;
        p->first_state = next_state;
        next_state += p->num_items == 1 ? 0 : p->num_strips - j.strips_each + 1;
        j.num_items += p->num_items;
    }
    if (threads == 1) {
        work(&j);
    } else {
        parallel(work, &j, (unsigned)threads, 0);
    }
    free(workspace);
    return 0;
}
