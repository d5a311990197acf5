/* A whole decoder layer in one call: the kernels one after the other.
 *
 *     x += norm(attention(norm(x)));  x += norm(mlp(norm(x)))
 *
 * where either norm may be missing. In a decode step of a small model the calls from Python between the kernels take
 * a quarter of the time; over a long prompt, fresh memory for what lies between them does. Numbers are rounded where the
 * layer's modules would store them.
 */
#include "kernels.h"

#include <string.h>

/* Rows that go through the block behind attention together, so that what lies between its products stays in the
 * second-level cache. */
enum { BLOCK_ROWS = 256 };

static int64_t bytes(int32_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

static int64_t lines(int64_t nbytes) { return (nbytes + 63) / 64 * 64; }

/* Where the parts of the workspace begin; the block behind attention and long attention share the last. */
typedef struct {
    int64_t rows, attended, gate_up, gated, prefill, end;
} places;

static places places_of(const vattention_layer *layer, const vattention_batch *batch, int32_t num_threads) {
    const int64_t item = bytes(layer->dtype), n = batch->num_tokens, block = n < BLOCK_ROWS ? n : BLOCK_ROWS;
    places at = {.rows = lines(n * layer->hidden * item)};
    at.attended = at.rows + lines(n * layer->query_key_value->num_out * item);
    at.gate_up = at.prefill = at.attended + lines(n * layer->attention_out->num_in * item);
    at.gated = at.gate_up + lines(block * layer->gate_up->num_out * item);
    const int64_t behind = at.gated + lines(block * layer->down->num_in * item);
    const int64_t prefill =
        at.prefill + vattention_prefill_nbytes(layer->heads, batch->long_spans, batch->num_long, num_threads);
    at.end = behind > prefill ? behind : prefill;
    return at;
}

/* Bytes of workspace for a batch. */
int64_t vattention_layer_nbytes(const vattention_layer *layer, const vattention_batch *batch, int32_t num_threads) {
    return places_of(layer, batch, num_threads).end;
}

static char *place(const vattention_cache *cache, const vattention_tables *tables, int64_t slot, int64_t position,
                   int64_t item) {
    if (tables->block_size == 0) {
        return (char *)cache->numbers + (slot * cache->slot_stride + position * cache->token_stride) * item;
    }
    const int64_t block = tables->blocks[slot * tables->slot_stride + position / tables->block_size];
    const int64_t offset = position % tables->block_size;
    return (char *)cache->numbers + (block * cache->slot_stride + offset * cache->token_stride) * item;
}

/* Stores the keys and values behind each token's queries. */
static void append(const vattention_layer *layer, const vattention_cache *keys, const vattention_cache *values,
                   const vattention_tables *tables, const vattention_span *span, const char *rows) {
    const vattention_heads *heads = layer->heads;
    const int64_t item = bytes(layer->dtype), row_nbytes = layer->query_key_value->num_out * item;
    const int64_t key_nbytes = heads->key_dim * item, value_nbytes = heads->value_dim * item;
    for (int64_t i = 0; i < span->num_rows; i++) {
        char *key = place(keys, tables, span->slot, span->start + i, item);
        char *value = place(values, tables, span->slot, span->start + i, item);
        const char *from = rows + (span->first_row + i) * row_nbytes + heads->num_heads * key_nbytes;
        const char *from_value = from + heads->num_kv_heads * key_nbytes;
        for (int64_t head = 0; head < heads->num_kv_heads; head++) {
            memcpy(key + head * keys->head_stride * item, from + head * key_nbytes, (size_t)key_nbytes);
            memcpy(value + head * values->head_stride * item, from_value + head * value_nbytes, (size_t)value_nbytes);
        }
    }
}

typedef struct {
    const vattention_layer *layer;
    int32_t num_threads;
    parallel_fn parallel;
} call;

/* The input of a block: x, or `normed` with x normalised. */
static const void *norm(const call *c, const vattention_norm *how, const void *x, void *normed, int64_t num_rows) {
    if (how->scale == NULL) {
        return x;
    }
    vattention_rms_norm(x, how->scale, normed, num_rows, c->layer->hidden, how->epsilon, c->layer->dtype,
                        c->num_threads, c->parallel);
    return normed;
}

static int32_t linear(const call *c, const vattention_weight *weight, const void *x, void *y, int64_t num_rows) {
    return vattention_linear(weight, x, weight->num_in, num_rows, y, c->layer->dtype, c->num_threads, c->parallel);
}

/* gated[num_rows, width] of the block behind attention; `gate_up` is for what lies between. */
static int32_t gate(const call *c, const void *x, void *gate_up, void *gated, int64_t num_rows) {
    const vattention_layer *layer = c->layer;
    if (num_rows >= TALL && vattention_can_tall(layer->gate_up) && layer->down->num_in % COLUMNS == 0) {
        return vattention_tall(layer->gate_up, x, layer->hidden, num_rows, gated, layer->dtype, &layer->gating,
                               c->num_threads, c->parallel);
    }
    const int32_t status = linear(c, layer->gate_up, x, gate_up, num_rows);
    if (status == 0) {
        vattention_gate(gate_up, gated, num_rows, layer->down->num_in, layer->gating.linear, layer->gating.cubic,
                        layer->dtype, c->num_threads, c->parallel);
    }
    return status;
}

/* x[num_tokens, hidden] through the layer, in place; the tokens' keys and values are stored in the cache.
 *
 * Cosines and sines are [num_tokens, head_dim]. Long spans need heads that `vattention_can_prefill`. Returns 0, or -1
 * where memory ran short, with x in between. */
int32_t vattention_layer_forward(const vattention_layer *layer, const vattention_cache *keys,
                                 const vattention_cache *values, const vattention_tables *tables,
                                 const vattention_batch *batch, const void *cosines, const void *sines, void *x,
                                 int32_t num_threads, parallel_fn parallel) {
    const call c = {layer, num_threads, parallel};
    const vattention_heads *heads = layer->heads;
    const int64_t n = batch->num_tokens, width = layer->query_key_value->num_out;
    const places at = places_of(layer, batch, num_threads);
    char *normed = batch->workspace, *rows = normed + at.rows, *attended = normed + at.attended;
    char *gate_up = normed + at.gate_up, *gated = normed + at.gated;

    const void *input = norm(&c, &layer->before_attention, x, normed, n);
    int32_t status = linear(&c, layer->query_key_value, input, rows, n);
    if (status != 0) {
        return status;
    }
    vattention_rotate(layer->rotation, rows, cosines, sines, n, num_threads, parallel);
    for (int64_t i = 0; i < batch->num_short; i++) {
        append(layer, keys, values, tables, &batch->short_spans[i], rows);
    }
    for (int64_t i = 0; i < batch->num_long; i++) {
        append(layer, keys, values, tables, &batch->long_spans[i], rows);
    }
    if (batch->num_short > 0) {
        status = vattention_attend(heads, keys, values, tables, layer->dtype, rows, width, heads->key_dim,
                                   batch->short_spans, batch->num_short, NULL, attended, num_threads, parallel);
    }
    if (batch->num_long > 0) {
        vattention_prefill(heads, keys, values, tables, rows, width, heads->key_dim, batch->long_spans, batch->num_long,
                           attended, normed + at.prefill, num_threads, parallel);
    }
    if (status == 0) {
        status = linear(&c, layer->attention_out, attended, normed, n);
    }
    if (status == 0) {
        vattention_join(&layer->after_attention, normed, x, n, layer->hidden, layer->dtype, num_threads, parallel);
    }
    for (int64_t row = 0; status == 0 && row < n; row += BLOCK_ROWS) {
        const int64_t count = n - row < BLOCK_ROWS ? n - row : BLOCK_ROWS;
        char *own = (char *)x + row * layer->hidden * bytes(layer->dtype);
        input = norm(&c, &layer->before_mlp, own, normed, count);
        status = gate(&c, input, gate_up, gated, count);
        if (status == 0) {
            status = linear(&c, layer->down, gated, normed, count);
        }
        if (status == 0) {
            vattention_join(&layer->after_mlp, normed, own, count, layer->hidden, layer->dtype, num_threads, parallel);
        }
    }
    return status;
}
