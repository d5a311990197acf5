/* A whole decoder layer in one call: the kernels one after the other.
 *
 *     x += norm(attention(norm(x)));  x += norm(mlp(norm(x)))
 *
 * where either norm may be missing. In a decode step of a small model the calls from Python between the kernels take
 * a quarter of the time; over a long prompt, fresh memory for what lies between them does. Numbers are rounded where the
 * layer's modules would store them.
 */
#include "kernels.h"

#include <stddef.h>

/* Rows that go through the block behind attention together, so that what lies between its products stays in the
 * second-level cache. */
enum { BLOCK_ROWS = 256 };

static int64_t bytes(int32_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

static int64_t lines(int64_t nbytes) { return (nbytes + 63) / 64 * 64; }

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Whether the gate is computed with the product before it. */
static int gates_tall(const vattention_layer *layer, int64_t num_rows) {
    return num_rows >= TALL && vattention_can_tall(layer->gate_up) && layer->down->num_in % COLUMNS == 0;
}

/* Where the parts of the workspace begin; the block behind attention, long attention and the parts of `layer_tall.c`
 * share the last. */
typedef struct {
    int64_t rows, attended, spans, gate_up, gated, shared, end;
} places;

static places places_of(const vattention_layer *layer, const vattention_batch *batch, int32_t num_threads) {
    const int64_t item = bytes(layer->dtype), n = batch->num_tokens, block = n < BLOCK_ROWS ? n : BLOCK_ROWS;
    places at = {.rows = lines(n * layer->hidden * item)};
    at.attended = at.rows + lines(n * layer->query_key_value->num_out * item);
    at.spans = at.attended + lines(n * layer->attention_out->num_in * item);
    at.gate_up = at.shared = at.spans + lines(batch->num_wanted < 0 ? 0 : vattention_narrow_nbytes(batch));
    const int64_t gating = gates_tall(layer, block) ? vattention_tall_nbytes(layer->gate_up, block, 1, num_threads) : 0;
    at.gated = at.gate_up + lines(larger(block * layer->gate_up->num_out * item, gating));
    const int64_t behind = at.gated + lines(block * layer->down->num_in * item);
    const int64_t prefill =
        at.shared + vattention_prefill_nbytes(layer->heads, batch->long_spans, batch->num_long, num_threads);
    at.end = larger(behind, prefill);
    if (vattention_layer_is_tall(layer, n, num_threads)) {
        const int64_t tall = at.shared + vattention_layer_tall_nbytes(layer, n, num_threads);
        at.end = larger(at.end, tall);
    }
    return at;
}

/* Bytes of workspace for a batch. */
int64_t vattention_layer_nbytes(const vattention_layer *layer, const vattention_batch *batch, int32_t num_threads) {
    return places_of(layer, batch, num_threads).end;
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
    if (gates_tall(layer, num_rows)) {
        vattention_tall(layer->gate_up, x, layer->hidden, num_rows, gated, layer->dtype, &layer->gating, gate_up,
                        c->num_threads, c->parallel);
        return 0;
    }
    const int32_t status = linear(c, layer->gate_up, x, gate_up, num_rows);
    if (status == 0) {
        vattention_gate(gate_up, gated, num_rows, layer->down->num_in, layer->gating.linear, layer->gating.cubic,
                        layer->dtype, c->num_threads, c->parallel);
    }
    return status;
}

static int32_t attend(const call *c, const vattention_cache *keys, const vattention_cache *values,
                      const vattention_tables *tables, const vattention_batch *batch, const char *rows, char *attended,
                      char *workspace) {
    const vattention_layer *layer = c->layer;
    const vattention_heads *heads = layer->heads;
    const int64_t width = layer->query_key_value->num_out;
    int32_t status = 0;
    if (batch->num_short > 0) {
        status = vattention_attend(heads, keys, values, tables, layer->dtype, rows, width, heads->key_dim,
                                   batch->short_spans, batch->num_short, NULL, attended, c->num_threads, c->parallel);
    }
    if (batch->num_long > 0) {
        vattention_prefill(heads, keys, values, tables, rows, width, heads->key_dim, batch->long_spans, batch->num_long,
                           attended, workspace, c->num_threads, c->parallel);
    }
    return status;
}

/* x[num_rows, hidden] through what follows attention, in place. */
static int32_t behind(const call *c, const char *attended, int64_t num_rows, char *x, const places *at, char *normed) {
    const vattention_layer *layer = c->layer;
    char *gate_up = normed + at->gate_up, *gated = normed + at->gated;
    int32_t status = num_rows > 0 ? linear(c, layer->attention_out, attended, normed, num_rows) : 0;
    if (status == 0) {
        vattention_join(&layer->after_attention, normed, x, num_rows, layer->hidden, layer->dtype, c->num_threads,
                        c->parallel);
    }
    /* Blocks of nearly equal size, for they are computed in the same way then. */
    const int64_t num_blocks = (num_rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    for (int64_t i = 0; status == 0 && i < num_blocks; i++) {
        const int64_t row = num_rows * i / num_blocks, count = num_rows * (i + 1) / num_blocks - row;
        char *own = x + row * layer->hidden * bytes(layer->dtype);
        const void *input = norm(c, &layer->before_mlp, own, normed, count);
        status = gate(c, input, gate_up, gated, count);
        if (status == 0) {
            status = linear(c, layer->down, gated, normed, count);
        }
        if (status == 0) {
            vattention_join(&layer->after_mlp, normed, own, count, layer->hidden, layer->dtype, c->num_threads,
                            c->parallel);
        }
    }
    return status;
}

/* x[num_tokens, hidden] through the layer, in place; the tokens' keys and values are stored in the cache. Of the results
 * only the rows that are wanted are computed, and come first in x.
 *
 * Cosines and sines are [num_tokens, head_dim]. Long spans need heads that `vattention_can_prefill`. Returns 0, or -1
 * where memory ran short, with x in between. */
int32_t vattention_layer_forward(const vattention_layer *layer, const vattention_cache *keys,
                                 const vattention_cache *values, const vattention_tables *tables,
                                 const vattention_batch *batch, const void *cosines, const void *sines, void *x,
                                 int32_t num_threads, parallel_fn parallel) {
    const call c = {layer, num_threads, parallel};
    const int64_t n = batch->num_tokens;
    const places at = places_of(layer, batch, num_threads);
    char *normed = batch->workspace, *rows = normed + at.rows, *attended = normed + at.attended;
    char *shared = normed + at.shared;

    int32_t status = 0;
    if (vattention_layer_is_tall(layer, n, num_threads)) {
        vattention_layer_tall_before(layer, keys, values, tables, batch, cosines, sines, x, rows, shared, num_threads,
                                     parallel);
    } else {
        const void *input = norm(&c, &layer->before_attention, x, normed, n);
        status = linear(&c, layer->query_key_value, input, rows, n);
        if (status != 0) {
            return status;
        }
        vattention_rotate(layer->rotation, rows, cosines, sines, n, num_threads, parallel);
        for (int64_t i = 0; i < batch->num_short; i++) {
            vattention_append(layer, keys, values, tables, &batch->short_spans[i], rows);
        }
        for (int64_t i = 0; i < batch->num_long; i++) {
            vattention_append(layer, keys, values, tables, &batch->long_spans[i], rows);
        }
    }
    vattention_batch own = *batch;
    if (batch->num_wanted >= 0) {
        vattention_narrow(&own, normed + at.spans, rows, layer->query_key_value->num_out * bytes(layer->dtype), x,
                          layer->hidden * bytes(layer->dtype));
    }
    status = attend(&c, keys, values, tables, &own, rows, attended, shared);
    if (status != 0) {
        return status;
    }
    if (vattention_layer_is_tall(layer, own.num_tokens, num_threads)) {
        vattention_layer_tall_behind(layer, attended, own.num_tokens, x, shared, num_threads, parallel);
        return 0;
    }
    return behind(&c, attended, own.num_tokens, x, &at, normed);
}
