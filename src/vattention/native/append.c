/* Where new keys and values go: the cache of a layer, contiguous per slot or in blocks. */
#include "kernels.h"

#include <string.h>

static char *place(const vattention_cache *cache, const vattention_tables *tables, int64_t slot, int64_t position,
                   int64_t item) {
    if (tables->block_size == 0) {
        return (char *)cache->numbers + (slot * cache->slot_stride + position * cache->token_stride) * item;
    }
    const int64_t block = tables->blocks[slot * tables->slot_stride + position / tables->block_size];
    const int64_t offset = position % tables->block_size;
    return (char *)cache->numbers + (block * cache->slot_stride + offset * cache->token_stride) * item;
}

/* Stores the keys and values that lie behind each token's queries in rows[num_tokens, ...]. */
void vattention_append(const vattention_layer *layer, const vattention_cache *keys, const vattention_cache *values,
                   const vattention_tables *tables, const vattention_span *span, const void *rows) {
    const vattention_heads *heads = layer->heads;
    const int64_t item = layer->dtype == FLOAT32 ? 4 : 2, row_nbytes = layer->query_key_value->num_out * item;
    const int64_t key_nbytes = heads->key_dim * item, value_nbytes = heads->value_dim * item;
    for (int64_t i = 0; i < span->num_rows; i++) {
        char *key = place(keys, tables, span->slot, span->start + i, item);
        char *value = place(values, tables, span->slot, span->start + i, item);
        const char *from = (const char *)rows + (span->first_row + i) * row_nbytes + heads->num_heads * key_nbytes;
        const char *from_value = from + heads->num_kv_heads * key_nbytes;
        for (int64_t head = 0; head < heads->num_kv_heads; head++) {
            memcpy(key + head * keys->head_stride * item, from + head * key_nbytes, (size_t)key_nbytes);
            memcpy(value + head * values->head_stride * item, from_value + head * value_nbytes, (size_t)value_nbytes);
        }
    }
}
