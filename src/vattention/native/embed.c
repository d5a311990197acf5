/* Rows of an embedding: from a plain table, or from a quantized weight, whose outputs are the rows then. */
#include "kernels.h"

#include <string.h>

typedef struct {
    const void *table;               /* [num, width], or NULL */
    const vattention_weight *packed; /* where there is no table: packed as quantized.c describes it */
    int64_t num, width;
    float factor; /* on the rows, which are rounded before and behind it */
    int32_t dtype;
} vattention_embedding;

typedef struct {
    const vattention_embedding *embedding;
    const int64_t *token_ids;
    int64_t num_tokens;
    char *y;
    int64_t next; /* taken atomically */
} job;

/* To the nearest, of two the even one. */
static uint16_t rounded(float number) {
    const union {
        float number;
        uint32_t bits;
    } both = {.number = number};
    return number != number ? 0x7fc0 : (uint16_t)((both.bits + 0x7fff + (both.bits >> 16 & 1)) >> 16);
}

/* Which steps a column's four bytes of a line have. */
static const int steps[4] = {0, 2, 1, 3};

/* The whole numbers of one column in one group: column `i` of 16, whose lines begin at `line` and `lower`. */
static void read_group(int32_t format, const uint8_t *line, const uint8_t *lower, int i, float *numbers) {
    if (format == INT4) {
        for (int part = 0; part < GROUP / 8; part++, line += 2 * LINE, numbers += 8) {
            for (int s = 0; s < 2; s++) {
                const uint8_t *word = line + 4 * i + 2 * s;
                for (int k = 0; k < 4; k++) {
                    numbers[2 * k + s] = vattention_code_book[word[k / 2] >> k % 2 * 4 & 15];
                }
            }
        }
        return;
    }
    if (format == HALVES) {
        for (int part = 0; part < GROUP / 8; part++, line += 2 * LINE, lower += 2 * LINE, numbers += 8) {
            for (int k = 0; k < 4; k++) {
                const int high = line[4 * i + k], low = lower[4 * i + k];
                numbers[steps[k]] = (float)(((high << 4 & 240) | (low & 15)) - 128);
                numbers[4 + steps[k]] = (float)(((high & 240) | low >> 4) - 128);
            }
        }
        return;
    }
    for (int part = 0; part < GROUP / 4; part++, line += 2 * LINE, numbers += 4) {
        for (int k = 0; k < 4; k++) {
            numbers[steps[k]] = (float)(int8_t)line[4 * i + k];
        }
    }
}

static void store(const vattention_embedding *embedding, const float *numbers, int64_t count, char *y) {
    for (int64_t i = 0; i < count; i++) {
        if (embedding->dtype == FLOAT32) {
            const float number = numbers[i] * embedding->factor;
            memcpy(y + 4 * i, &number, 4);
        } else {
            const uint16_t number = rounded(widened(rounded(numbers[i])) * embedding->factor);
            memcpy(y + 2 * i, &number, 2);
        }
    }
}

static void row_of_packed(const vattention_embedding *embedding, int64_t id, char *y) {
    const vattention_weight *weight = embedding->packed;
    const int64_t panel = id / COLUMNS, column = id % COLUMNS, half = column / HALF, width = embedding->width;
    const int64_t item = embedding->dtype == FLOAT32 ? 4 : 2, num_groups = (width + GROUP - 1) / GROUP;
    const int64_t nbytes = vattention_panel_nbytes(weight) / num_groups;
    const uint8_t *group = (const uint8_t *)weight->packed + panel * num_groups * nbytes;
    const uint8_t *lower =
        weight->format == HALVES ? (const uint8_t *)vattention_lower_halves(weight, panel) + half * LINE : NULL;
    for (int64_t first = 0; first < width; first += GROUP, group += nbytes) {
        float numbers[GROUP];
        uint16_t scale;
        memcpy(&scale, group + 2 * column, 2);
        read_group(weight->format, group + 2 * COLUMNS + half * LINE, lower, (int)(column % HALF), numbers);
        for (int k = 0; k < GROUP; k++) {
            numbers[k] *= widened(scale);
        }
        store(embedding, numbers, width - first < GROUP ? width - first : GROUP, y + first * item);
        lower = lower ? lower + HALVES_NBYTES : NULL;
    }
}

static void row_of_table(const vattention_embedding *embedding, int64_t id, char *y) {
    const int64_t width = embedding->width, row_nbytes = width * (embedding->dtype == FLOAT32 ? 4 : 2);
    const char *from = (const char *)embedding->table + id * row_nbytes;
    if (embedding->factor == 1.0f) {
        memcpy(y, from, (size_t)row_nbytes);
        return;
    }
    if (embedding->dtype == FLOAT32) {
        store(embedding, (const float *)from, width, y);
        return;
    }
    for (int64_t i = 0; i < width; i += GROUP) {
        const int64_t count = width - i < GROUP ? width - i : GROUP;
        float numbers[GROUP];
        for (int64_t k = 0; k < count; k++) {
            numbers[k] = widened(((const uint16_t *)from)[i + k]);
        }
        store(embedding, numbers, count, y + 2 * i);
    }
}

static void work(void *argument) {
    enum { TOKENS_EACH = 16 };
    job *j = argument;
    const vattention_embedding *embedding = j->embedding;
    const int64_t row_nbytes = embedding->width * (embedding->dtype == FLOAT32 ? 4 : 2);
    for (;;) {
        const int64_t first = __atomic_fetch_add(&j->next, TOKENS_EACH, __ATOMIC_RELAXED);
        for (int64_t i = first; i < first + TOKENS_EACH && i < j->num_tokens; i++) {
            const int64_t id = j->token_ids[i];
            (embedding->table ? row_of_table : row_of_packed)(embedding, id, j->y + i * row_nbytes);
        }
        if (first + TOKENS_EACH >= j->num_tokens) {
            return;
        }
    }
}

/* y[num_tokens, width], the tokens' rows. Returns 0, or -1 where there is no such token, and y means nothing. */
int32_t vattention_embed(const vattention_embedding *embedding, const int64_t *token_ids, int64_t num_tokens, void *y,
                         int32_t num_threads, parallel_fn parallel) {
    enum { ALONE_TOKENS = 128 }; /* below which one thread is faster than waking others */
    for (int64_t i = 0; i < num_tokens; i++) {
        if (token_ids[i] < 0 || token_ids[i] >= embedding->num) {
            return -1;
        }
    }
    job j = {embedding, token_ids, num_tokens, y, 0};
    if (num_threads == 1 || num_tokens < ALONE_TOKENS) {
        work(&j);
    } else {
        parallel(work, &j, (unsigned)num_threads, 0);
    }
    return 0;
}
