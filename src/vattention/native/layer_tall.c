/* The parts of a decoder layer around attention for many rows: each thread takes blocks of rows through all of a part,
 * so that what lies between its kernels stays in the thread's own second-level cache, and nobody waits between them. */
#include "kernels.h"

#include <stddef.h>

/* Rows of a block, at most. Each reads all weights, from memory or the third-level cache. */
enum { BLOCK_ROWS = 256 };

typedef struct {
    const vattention_layer *layer;
    const vattention_cache *keys, *values;
    const vattention_tables *tables;
    const vattention_batch *batch;
    const char *cosines, *sines;
    char *x, *rows, *attended;
    int64_t num_rows, block_rows;
    /* One thread's after the other's: rows as wide as the layer, as wide as its gate, and what products work in. */
    char *workspace;
    int64_t gated_offset, product_offset, thread_nbytes;
    int64_t next_thread, next_item; /* taken atomically */
} job;

static int64_t bytes(int32_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static job job_of(const vattention_layer *layer, int64_t num_rows, int32_t num_threads) {
    const int64_t most = num_threads * BLOCK_ROWS, item = bytes(layer->dtype);
    const int64_t num_blocks = (num_rows + most - 1) / most * num_threads;
    job j = {.layer = layer, .num_rows = num_rows};
    j.block_rows = (num_rows + num_blocks - 1) / num_blocks;
    /* Enough for fewer rows too, of which blocks may be larger. */
    const int64_t room = num_rows < most ? (num_rows + num_threads - 1) / num_threads : BLOCK_ROWS;
    j.gated_offset = (room * layer->hidden * item + 63) / 64 * 64;
    j.product_offset = (j.gated_offset + room * layer->down->num_in * item + 63) / 64 * 64;
    const int64_t in = vattention_tall_nbytes(layer->query_key_value, room, 0, 1);
    const int64_t out = vattention_tall_nbytes(layer->attention_out, room, 0, 1);
    const int64_t gate = vattention_tall_nbytes(layer->gate_up, room, 1, 1);
    const int64_t down = vattention_tall_nbytes(layer->down, room, 0, 1);
    j.thread_nbytes = (j.product_offset + larger(larger(in, out), larger(gate, down)) + 63) / 64 * 64;
    return j;
}

/* Whether a batch is large enough for each thread to have a block worth reading the weights for, and all products can
 * be computed so. */
int vattention_layer_is_tall(const vattention_layer *layer, int64_t num_rows, int32_t num_threads) {
    return num_rows >= num_threads * TALL && layer->down->num_in % COLUMNS == 0 &&
           vattention_can_tall(layer->query_key_value) && vattention_can_tall(layer->attention_out) &&
           vattention_can_tall(layer->gate_up) && vattention_can_tall(layer->down);
}

/* Bytes that the functions below work in, from a cache line on. */
int64_t vattention_layer_tall_nbytes(const vattention_layer *layer, int64_t num_rows, int32_t num_threads) {
    return num_threads * job_of(layer, num_rows, num_threads).thread_nbytes;
}

typedef void (*part_fn)(const job *j, int64_t first, int64_t count, char *workspace);

typedef struct {
    job *job;
    part_fn part;
} part_job;

static void work(void *argument) {
    const part_job *own = argument;
    job *j = own->job;
    char *workspace = j->workspace + j->thread_nbytes * __atomic_fetch_add(&j->next_thread, 1, __ATOMIC_RELAXED);
    for (;;) {
        const int64_t first = j->block_rows * __atomic_fetch_add(&j->next_item, 1, __ATOMIC_RELAXED);
        if (first >= j->num_rows) {
            return;
        }
        const int64_t left = j->num_rows - first;
        own->part(j, first, left < j->block_rows ? left : j->block_rows, workspace);
    }
}

static void run(job *j, part_fn part, int32_t num_threads, parallel_fn parallel) {
    part_job argument = {j, part};
    if (num_threads == 1) {
        work(&argument);
    } else {
        parallel(work, &argument, (unsigned)num_threads, 0);
    }
}

static void product(const job *j, const vattention_weight *weight, const void *x, void *y, int64_t count,
                    char *workspace) {
    vattention_tall(weight, x, weight->num_in, count, y, j->layer->dtype, NULL, workspace + j->product_offset, 1, NULL);
}

/* The input of a block: x, or `normed` with x normalised. */
static const void *norm(const job *j, const vattention_norm *how, const void *x, void *normed, int64_t count) {
    if (how->scale == NULL) {
        return x;
    }
    vattention_rms_norm(x, how->scale, normed, count, j->layer->hidden, how->epsilon, j->layer->dtype, 1, NULL);
    return normed;
}

static void append(const job *j, const vattention_span *spans, int64_t num_spans, int64_t first, int64_t count) {
    for (int64_t i = 0; i < num_spans; i++) {
        const int64_t from = larger(first, spans[i].first_row);
        const int64_t end = spans[i].first_row + spans[i].num_rows, until = first + count < end ? first + count : end;
        if (from < until) {
            const vattention_span part = {spans[i].slot, from, until - from, spans[i].start + from - spans[i].first_row};
            vattention_append(j->layer, j->keys, j->values, j->tables, &part, j->rows);
        }
    }
}

static void before(const job *j, int64_t first, int64_t count, char *workspace) {
    const vattention_layer *layer = j->layer;
    const int64_t item = bytes(layer->dtype), hidden = layer->hidden * item;
    const int64_t head = layer->rotation->head_dim * item;
    char *rows = j->rows + first * layer->query_key_value->num_out * item;
    const void *input = norm(j, &layer->before_attention, j->x + first * hidden, workspace, count);
    product(j, layer->query_key_value, input, rows, count, workspace);
    vattention_rotate(layer->rotation, rows, j->cosines + first * head, j->sines + first * head, count, 1, NULL);
    append(j, j->batch->short_spans, j->batch->num_short, first, count);
    append(j, j->batch->long_spans, j->batch->num_long, first, count);
}

static void behind(const job *j, int64_t first, int64_t count, char *workspace) {
    const vattention_layer *layer = j->layer;
    const int64_t item = bytes(layer->dtype), hidden = layer->hidden * item;
    char *x = j->x + first * hidden, *gated = workspace + j->gated_offset;
    const char *attended = j->attended + first * layer->attention_out->num_in * item;
    product(j, layer->attention_out, attended, workspace, count, workspace);
    vattention_join(&layer->after_attention, workspace, x, count, layer->hidden, layer->dtype, 1, NULL);
    const void *input = norm(j, &layer->before_mlp, x, workspace, count);
    vattention_tall(layer->gate_up, input, layer->hidden, count, gated, layer->dtype, &layer->gating,
                    workspace + j->product_offset, 1, NULL);
    product(j, layer->down, gated, workspace, count, workspace);
    vattention_join(&layer->after_mlp, workspace, x, count, layer->hidden, layer->dtype, 1, NULL);
}

/* rows[num_tokens, ...] of queries, keys and values from x[num_tokens, hidden]; the latter two go to the cache as well. */
void vattention_layer_tall_before(const vattention_layer *layer, const vattention_cache *keys,
                                  const vattention_cache *values, const vattention_tables *tables,
                                  const vattention_batch *batch, const void *cosines, const void *sines, void *x,
                                  void *rows, void *workspace, int32_t num_threads, parallel_fn parallel) {
    job j = job_of(layer, batch->num_tokens, num_threads);
    j.keys = keys;
    j.values = values;
    j.tables = tables;
    j.batch = batch;
    j.cosines = cosines;
    j.sines = sines;
    j.x = x;
    j.rows = rows;
    j.workspace = workspace;
    run(&j, before, num_threads, parallel);
}

/* x[num_rows, hidden] through what follows attention, in place. */
void vattention_layer_tall_behind(const vattention_layer *layer, void *attended, int64_t num_rows, void *x,
                                  void *workspace, int32_t num_threads, parallel_fn parallel) {
    job j = job_of(layer, num_rows, num_threads);
    j.x = x;
    j.attended = attended;
    j.workspace = workspace;
    run(&j, behind, num_threads, parallel);
}
