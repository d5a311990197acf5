/* A whole decoder layer for tokens that bring one row each: the kernels one after the other, in one call.
 *
 *     x += norm(attention(norm(x)));  x += norm(mlp(norm(x)))
 *
 * where either norm may be missing. In a decode step of a small model the calls from Python between the kernels take
 * a quarter of the time. Numbers are rounded where the layer's modules would store them.
 */
#include "kernels.h"

#include <string.h>

/* A root mean square norm. */
typedef struct {
    const float *scale; /* [hidden], or NULL for no norm */
    float epsilon;
} vattention_norm;

typedef struct {
    const vattention_weight *query_key_value, *attention_out, *gate_up, *down;
    const vattention_rotation *rotation;
    const vattention_heads *heads;
    vattention_norm before_attention, after_attention, before_mlp, after_mlp;
    float gate_linear, gate_cubic; /* as in gate.c */
    int64_t hidden;
    int32_t dtype;
} vattention_layer;

/* Where the tokens are and where the layer works. */
typedef struct {
    int64_t num_tokens;
    const void *spans; /* [num_tokens]: slot, row, 1, position */
    void *workspace;   /* num_tokens times what `vattention_layer_width` says */
} vattention_tokens;

enum { SPAN = 4 };

static int64_t bytes(int32_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

/* Numbers that a token needs in the workspace. */
int64_t vattention_layer_width(const vattention_layer *layer) {
    return layer->hidden + layer->query_key_value->num_out + layer->attention_out->num_in + layer->gate_up->num_out +
           layer->down->num_in;
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
                   const vattention_tables *tables, const vattention_tokens *tokens, const char *rows) {
    const vattention_heads *heads = layer->heads;
    const int64_t item = bytes(layer->dtype), row_nbytes = layer->query_key_value->num_out * item;
    const int64_t key_nbytes = heads->key_dim * item, value_nbytes = heads->value_dim * item;
    const int64_t *span = tokens->spans;
    for (int64_t i = 0; i < tokens->num_tokens; i++, span += SPAN, rows += row_nbytes) {
        char *key = place(keys, tables, span[0], span[3], item), *value = place(values, tables, span[0], span[3], item);
        const char *from = rows + heads->num_heads * key_nbytes;
        const char *from_value = from + heads->num_kv_heads * key_nbytes;
        for (int64_t head = 0; head < heads->num_kv_heads; head++) {
            memcpy(key + head * keys->head_stride * item, from + head * key_nbytes, (size_t)key_nbytes);
            memcpy(value + head * values->head_stride * item, from_value + head * value_nbytes, (size_t)value_nbytes);
        }
    }
}

/* x += y, rounded as a store would. */
static void add(void *x, const void *y, int64_t count, int32_t dtype) {
    if (dtype == FLOAT32) {
        for (int64_t i = 0; i < count; i++) {
            ((float *)x)[i] += ((const float *)y)[i];
        }
        return;
    }
    uint16_t *to = x;
    const uint16_t *from = y;
    for (int64_t i = 0; i < count; i++) {
        const union {
            float number;
            uint32_t bits;
        } sum = {.number = widened(to[i]) + widened(from[i])};
        const uint32_t rounded = (sum.bits + 0x7fffu + ((sum.bits >> 16) & 1u)) >> 16;
        to[i] = (uint16_t)(sum.number != sum.number ? (sum.bits >> 16) | 0x40u : rounded);
    }
}

typedef struct {
    const vattention_layer *layer;
    int64_t num_tokens;
    int32_t num_threads;
    parallel_fn parallel;
} call;

static void norm(const call *c, const vattention_norm *how, const void *x, void *y) {
    vattention_rms_norm(x, how->scale, y, c->num_tokens, c->layer->hidden, how->epsilon, c->layer->dtype, c->num_threads,
                        c->parallel);
}

static int32_t linear(const call *c, const vattention_weight *weight, const void *x, void *y) {
    return vattention_linear(weight, x, weight->num_in, c->num_tokens, y, c->layer->dtype, c->num_threads, c->parallel);
}

/* The residual connection: x += norm(y), y being lost. */
static void join(const call *c, const vattention_norm *how, void *x, void *y) {
    if (how->scale) {
        norm(c, how, y, y);
    }
    add(x, y, c->num_tokens * c->layer->hidden, c->layer->dtype);
}

/* x[num_tokens, hidden] through the layer, in place; the tokens' keys and values are stored in the cache.
 *
 * Cosines and sines are [num_tokens, head_dim]. Returns 0, or -1 where memory ran short, with x in between. */
int32_t vattention_layer_forward(const vattention_layer *layer, const vattention_cache *keys,
                                 const vattention_cache *values, const vattention_tables *tables,
                                 const vattention_tokens *tokens, const void *cosines, const void *sines, void *x,
                                 int32_t num_threads, parallel_fn parallel) {
    const call c = {layer, tokens->num_tokens, num_threads, parallel};
    const int64_t item = bytes(layer->dtype), n = tokens->num_tokens, width = layer->query_key_value->num_out;
    char *normed = tokens->workspace;
    char *rows = normed + n * layer->hidden * item;
    char *attended = rows + n * width * item;
    char *gate_up = attended + n * layer->attention_out->num_in * item;
    char *gated = gate_up + n * layer->gate_up->num_out * item;
    const void *input = x;

    if (layer->before_attention.scale) {
        norm(&c, &layer->before_attention, x, normed);
        input = normed;
    }
    int32_t status = linear(&c, layer->query_key_value, input, rows);
    if (status == 0) {
        vattention_rotate(layer->rotation, rows, cosines, sines, n, num_threads, parallel);
        append(layer, keys, values, tables, tokens, rows);
        status = vattention_attend(layer->heads, keys, values, tables, layer->dtype, rows, width, layer->heads->key_dim,
                                   tokens->spans, n, NULL, attended, num_threads, parallel);
    }
    if (status == 0) {
        status = linear(&c, layer->attention_out, attended, normed);
    }
    if (status != 0) {
        return status;
    }
    join(&c, &layer->after_attention, x, normed);

    input = x;
    if (layer->before_mlp.scale) {
        norm(&c, &layer->before_mlp, x, normed);
        input = normed;
    }
    status = linear(&c, layer->gate_up, input, gate_up);
    if (status == 0) {
        vattention_gate(gate_up, gated, n, layer->down->num_in, layer->gate_linear, layer->gate_cubic, layer->dtype,
                        num_threads, parallel);
        status = linear(&c, layer->down, gated, normed);
    }
    if (status == 0) {
        join(&c, &layer->after_mlp, x, normed);
    }
    return status;
}
