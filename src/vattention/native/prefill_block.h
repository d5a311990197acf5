/* What a block of keys adds to the results of some lanes: scores, their softmax so far, and weighted values; included by
 * prefill.c. */
PREFILL_TARGET INLINE __m512 capped(__m512 x, float cap) {
    /* tanh(z) = 1 - 2 / (e^2z + 1), of |z|. */
    const __m512 z = _mm512_mul_ps(x, _mm512_set1_ps(1.0f / cap));
    const __m512 small = exp2_of(_mm512_mul_ps(_mm512_abs_ps(z), _mm512_set1_ps(-2.0f * LOG2_E)));
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 size = _mm512_div_ps(_mm512_sub_ps(one, small), _mm512_add_ps(one, small));
    const __m512 sign = _mm512_and_ps(z, _mm512_set1_ps(-0.0f));
    return _mm512_mul_ps(_mm512_or_ps(size, sign), _mm512_set1_ps(cap));
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
