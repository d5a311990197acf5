/* How keys, values and queries become matrix tiles, and results the rows that they are of; included by prefill.c. */
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
